"""What differs on CUDA: the loss multiplies bf16 matrices into fp32, the norms are fused, memory can be measured."""

import functools

import pytest
import torch
from torch.nn import functional as F

import ringattn
from model.config import preset
from model.decoder import Decoder
from model.flops import flight_bytes_per_token, layer_bytes_per_token, loss_bytes
from model.loss import tiled_cross_entropy
from model.memory import Memory
from tests.model.dense import dense_causal, random_row, tiny
from tests.model.kinds import kind

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

SIMULATED = {"simulated_heads": 8, "simulated_dim": 96, "kernel_size": 5}
MODES = [(torch.float32, False, 1e-6), (torch.bfloat16, False, 3e-3), (torch.float32, True, 3e-3)]


@pytest.mark.parametrize(("dtype", "autocast", "tolerance"), MODES, ids=["fp32", "bf16", "autocast"])
def test_loss_on_cuda_sums_in_fp32(dtype: torch.dtype, autocast: bool, tolerance: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 1000, 512).bfloat16().cuda(), torch.randn(3001, 512).mul(0.1).bfloat16().cuda()
    labels = torch.randint(0, 3001, (1, 1000)).cuda()
    labels[:, ::4] = -100
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy((exact[0] @ exact[1].T)[0], labels[0], ignore_index=-100, reduction="sum")
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = tiled_cross_entropy(hidden, weight, labels, 256)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    got, wanted = torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, exact)
    for gradient, oracle in zip(got, wanted, strict=True):
        assert gradient.dtype == dtype
        assert (gradient - oracle).norm() < tolerance * oracle.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_decoder_is_near_fp64(autocast: bool) -> None:
    config = tiny(dim=256, heads=8, head_dim=64, ffn_dim=512)
    row = [x.cuda() for x in random_row(config, 256)]
    exact, module = Decoder(config), Decoder(config)
    exact.init_weights(1)
    module.init_weights(1)
    exact, module = exact.double().cuda(), module.to("cuda", torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = module(*row, dense_causal, 64)
    loss.backward()
    expected = exact(*row, dense_causal, 64)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for (name, parameter), oracle in zip(module.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None
        assert oracle.grad is not None
        assert (parameter.grad - oracle.grad).norm() < 0.05 * oracle.grad.norm(), name


@pytest.mark.parametrize("selection", [None, "lagged", "guided learned"])
@pytest.mark.parametrize("name", ["gqa", "mla", "tpa", "sas"])
def test_every_kind_in_bf16_is_near_fp64(name: str, selection: str | None) -> None:
    wide = {"gqa": {}, "mla": {"latent_dim": 64, "rope_dim": 32, "value_dim": 64}, "tpa": {}, "sas": SIMULATED}
    config = kind(name, selection, dim=128, heads=4, head_dim=64, ffn_dim=256, **wide[name])
    row = [x.cuda() for x in random_row(config, 300)]
    attention = functools.partial(ringattn.ring_attention, plan=ringattn.Plan(300, 1))
    exact, module = Decoder(config), Decoder(config, Memory(recompute=True))
    exact.init_weights(1)
    module.init_weights(1)
    exact, module = exact.double().cuda(), module.to("cuda", torch.bfloat16)
    loss, expected = module(*row, attention, 64), exact(*row, attention, 64)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    for (key, parameter), oracle in zip(module.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None
        assert oracle.grad is not None
        if "selector" in key or "bias" in key:  # scalars and biases, whose terms nearly cancel
            assert bool(torch.isfinite(parameter.grad).all()), key
        else:
            assert (parameter.grad - oracle.grad).norm() < 0.15 * oracle.grad.norm(), key


def test_peak_memory_is_as_estimated() -> None:
    config = preset("qwen3-0.6b", vocab_size=50_000, layers=4)
    tokens = torch.randint(0, config.vocab_size, (1, 8192), device="cuda")
    positions = torch.arange(8192, device="cuda")
    hidden = torch.randn(1, 8192, config.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with_loss = _peak(lambda: tiled_cross_entropy(hidden, weight, tokens, 2048).backward())
    assert with_loss == pytest.approx(loss_bytes(config, 2048, 2), rel=0.1)
    small = preset("qwen3-0.6b", vocab_size=1000, layers=8)
    for recompute in (False, True):
        module = Decoder(small, Memory(recompute=recompute))
        module.init_weights(0)
        module = module.to("cuda", torch.bfloat16)

        def step(module: Decoder = module) -> None:
            module(tokens % 1000, tokens % 1000, positions, dense_causal, 1024).backward()

        step()  # gradients exist from here on
        layer, state = layer_bytes_per_token(small, 2), 2 * small.dim
        kept = small.layers * state + layer if recompute else small.layers * layer
        expected = kept + 2 * state + flight_bytes_per_token(small, 2)
        assert _peak(step) / 8192 == pytest.approx(expected, rel=0.05)


def _peak(work) -> int:  # type: ignore[no-untyped-def]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before
