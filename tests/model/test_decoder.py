"""The decoder as engines use it: dtypes, empty shards, recompute, initial values, far-apart shards."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.decoder import Decoder
from model.layers import RMSNorm
from model.memory import Memory
from tests.model.dense import dense_causal, random_row, tiny


def _built(dtype: torch.dtype = torch.float32, *, recompute: bool = False, **overrides) -> Decoder:  # type: ignore[no-untyped-def]
    module = Decoder(tiny(**overrides), Memory(recompute=recompute))
    module.init_weights(3)
    return module.to(dtype)


def _gradients(module: Decoder) -> dict[str, Tensor]:
    missing = [name for name, parameter in module.named_parameters() if parameter.grad is None]
    assert missing == [], "every parameter needs a gradient, or an engine's reduction hangs"
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def test_loss_is_the_sum_over_valid_labels_whatever_the_tile() -> None:
    module = _built()
    tokens, labels, positions = random_row(module.config, 20)
    losses = [module(tokens, labels, positions, dense_causal, tile) for tile in (1, 7, 64)]
    valid = int((labels != -100).sum())
    assert losses[0].item() / valid == pytest.approx(math.log(61), rel=0.05)  # untrained: about uniform
    torch.testing.assert_close(losses[1:], [losses[0]] * 2)


@pytest.mark.parametrize("tied", [False, True])
def test_empty_shard_gives_zero_and_zero_gradients_everywhere(tied: bool) -> None:
    for recompute in (False, True):
        module = _built(tied_head=tied, recompute=recompute)
        nothing = torch.zeros(1, 0, dtype=torch.long)
        loss = module(nothing, nothing, nothing[0], lambda q, k, v: q + 0 * (k.sum() + v.sum()), 8)
        loss.backward()
        assert loss.item() == 0.0
        assert all(torch.count_nonzero(gradient) == 0 for gradient in _gradients(module).values())


def test_a_row_without_labels_gives_zero_and_zero_gradients() -> None:
    module = _built()
    tokens, labels, positions = random_row(module.config, 9)
    loss = module(tokens, labels.fill_(-100), positions, dense_causal, 4)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in _gradients(module).values())


@pytest.mark.parametrize("autocast", [False, True])
def test_recompute_changes_memory_only(autocast: bool) -> None:
    results, runs = [], []
    for recompute in (False, True):
        module = _built(recompute=recompute)
        tokens, labels, positions = random_row(module.config, 16)
        calls, kept = 0, 0

        def counted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return dense_causal(q, k, v)

        def pack(saved: Tensor) -> Tensor:
            nonlocal kept
            kept += saved.numel()
            return saved

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved),
            torch.autocast("cpu", enabled=autocast),
        ):
            loss = module(tokens, labels, positions, counted, 8)
        loss.backward()
        results.append((loss, _gradients(module)))
        runs.append((calls, kept))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert [calls for calls, _ in runs] == [2, 4]
    assert runs[1][1] < runs[0][1] / 4


@pytest.mark.parametrize("mode", ["bf16 weights", "autocast"])
def test_bf16_works_and_q_k_v_arrive_in_one_dtype(mode: str) -> None:
    exact = _built(torch.float64)
    module = _built(torch.bfloat16 if mode == "bf16 weights" else torch.float32)
    tokens, labels, positions = random_row(module.config, 32)
    seen: set[torch.dtype] = set()

    def noted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.update((q.dtype, k.dtype, v.dtype))
        assert q.is_contiguous()
        assert k.is_contiguous()
        assert v.is_contiguous()
        return dense_causal(q, k, v)

    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        loss = module(tokens, labels, positions, noted, 8)
    loss.backward()
    oracle = exact(tokens, labels, positions, dense_causal, 8)
    oracle.backward()
    assert seen == {torch.bfloat16}
    assert (loss.dtype, oracle.dtype) == (torch.float32, torch.float64)
    assert loss.item() == pytest.approx(oracle.item(), rel=2e-3)
    for name, gradient in _gradients(module).items():
        assert gradient.dtype == (torch.bfloat16 if mode == "bf16 weights" else torch.float32)
        wanted = _gradients(exact)[name]
        assert (gradient - wanted).norm() < 0.03 * wanted.norm(), name


def test_norm_of_bf16_sums_in_fp32() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(4096, 1e-6)
    x = (torch.rand(3, 4096) + 5).bfloat16()  # far from zero: a bf16 sum of squares would be off by percents
    expected = F.rms_norm(x.double(), (4096,), None, 1e-6)
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).double(), expected, rtol=2**-8, atol=0)
    assert norm.double()(x.double()).dtype == torch.float64
    torch.testing.assert_close(norm(x.double()), expected)


def test_positions_decide_not_the_order_in_the_shard() -> None:
    # a permuted row with a callable that puts it back in order: what a zigzag or striped shard relies on
    module = _built(torch.float64)
    tokens, labels, positions = random_row(module.config, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    back = order.argsort()

    def reordered(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_causal(q[:, back], k[:, back], v[:, back])[:, order]

    whole = module(tokens, labels, positions, dense_causal, 8)
    cut = module(tokens[:, order], labels[:, order], positions[order], reordered, 8)
    torch.testing.assert_close(cut, whole, rtol=1e-12, atol=0)


def test_initial_values_depend_on_seed_and_name_only() -> None:
    small, large = _built(layers=2), _built(layers=3)
    weights, others = dict(small.named_parameters()), dict(large.named_parameters())
    name = "layers.1.attention.q_proj.weight"
    torch.testing.assert_close(weights[name], others[name], rtol=0, atol=0)
    assert not torch.equal(weights[name], weights["layers.0.attention.q_proj.weight"])
    with torch.device("meta"):
        sharded_later = Decoder(small.config)
    for key, values in sharded_later.initial_values(3):
        torch.testing.assert_close(values, weights[key].detach(), rtol=0, atol=0)
    small.init_weights(4)
    assert not torch.equal(weights[name], others[name])


def test_initial_values_have_the_scale_of_gpt2() -> None:
    module = _built(dim=96, ffn_dim=200, layers=8)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            assert bool((parameter == 1).all())
            continue
        residual = name.endswith(("attention.o_proj.weight", "mlp.down_proj.weight"))
        assert parameter.std().item() == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.1), name
        assert abs(parameter.mean().item()) < 2e-3


def test_every_parameter_is_initialised() -> None:
    module = Decoder(tiny(tied_head=False))
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    module.init_weights(0)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters())


def test_bad_inputs_are_named() -> None:
    module = _built()
    tokens, labels, positions = random_row(module.config, 6)
    with pytest.raises(ValueError, match=r"got \[1, 6\], \[1, 6\] and \[5\]; cut all three by the same plan"):
        module(tokens, labels, positions[1:], dense_causal, 4)
    with pytest.raises(ValueError, match=r"tokens range from \d+ to 61, but the vocabulary has 61 entries"):
        module(tokens.clone().fill_(61), labels, positions, dense_causal, 4)
    with pytest.raises(ValueError, match=r"labels range from -101 to"):
        module(tokens, labels.clone().index_fill_(1, torch.tensor([0]), -101), positions, dense_causal, 4)
    with pytest.raises(ValueError, match=r"expected tokens as int64, got torch\.int32"):
        module(tokens.int(), labels, positions, dense_causal, 4)
    with pytest.raises(ValueError, match=r"expected torch.float32 of shape \[1, 6, 4, 8\], got torch.float64"):
        module(tokens, labels, positions, lambda q, k, v: q.double(), 4)
    module.head.weight, module.embed.weight = None, torch.nn.Parameter(torch.empty(0))
    with pytest.raises(
        ValueError, match=r"embed.weight has shape \[0\] instead of \[61, 24\]; call it before the engine"
    ):
        module.init_weights(0)
