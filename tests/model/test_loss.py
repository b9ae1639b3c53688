"""The tiled loss against dense cross-entropy: values, gradients, precision, peak memory, and its edge cases."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.loss import tiled_cross_entropy


def _inputs(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    hidden = torch.randn(1, tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (1, tokens))
    labels[:, ::4] = -100
    return hidden, weight, labels


def _dense(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.T).flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("tile", [1, 3, 4, 11, 12, 100])
def test_equals_dense_cross_entropy_in_fp64(tile: int) -> None:
    hidden, weight, labels = _inputs(11, 5, 13, torch.float64)
    # a factor, because engines scale the sum by the number of valid tokens
    expected = torch.autograd.grad(0.37 * _dense(hidden, weight, labels), (hidden, weight))
    loss = tiled_cross_entropy(hidden, weight, labels, tile)
    got = torch.autograd.grad(0.37 * loss, (hidden, weight))
    torch.testing.assert_close(loss, _dense(hidden, weight, labels), rtol=1e-13, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_gradcheck() -> None:
    hidden, weight, labels = _inputs(5, 3, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: tiled_cross_entropy(h, w, labels, 2), (hidden, weight))


def test_only_wanted_gradients_are_made() -> None:
    hidden, weight, labels = _inputs(9, 4, 6, torch.float64)
    for h, w in ((hidden, weight.detach()), (hidden.detach(), weight)):
        wanted = h if h.requires_grad else w
        (got,) = torch.autograd.grad(tiled_cross_entropy(h, w, labels, 4), wanted)
        (expected,) = torch.autograd.grad(_dense(h, w, labels), wanted)
        torch.testing.assert_close(got, expected)
    with torch.no_grad():
        assert not tiled_cross_entropy(hidden, weight, labels, 4).requires_grad


def test_backward_may_run_twice() -> None:
    hidden, weight, labels = _inputs(9, 4, 6, torch.float32)
    loss = tiled_cross_entropy(hidden, weight, labels, 4) * 3.0
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), first, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [0, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_valid_label_gives_zero_and_zero_gradients(tokens: int, dtype: torch.dtype) -> None:
    hidden, weight, labels = _inputs(tokens, 4, 6, dtype)
    loss = tiled_cross_entropy(hidden, weight, labels.fill_(-100), 3)
    (loss / 5).backward()
    assert loss.item() == 0.0
    assert loss.dtype == torch.float32
    for leaf in (hidden, weight):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert torch.count_nonzero(leaf.grad) == 0  # NaN would count


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_inputs_are_summed_in_fp32(autocast: bool) -> None:
    hidden, weight, labels = _inputs(96, 64, 257, torch.bfloat16)
    exact_hidden, exact_weight = (leaf.detach().double().requires_grad_() for leaf in (hidden, weight))
    expected = _dense(exact_hidden, exact_weight, labels)
    expected.backward()
    if autocast:
        hidden, weight = (leaf.detach().float().requires_grad_() for leaf in (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = tiled_cross_entropy(hidden, weight, labels, 32)
    loss.backward()
    assert loss.dtype == torch.float32
    # bf16 logits would be wrong by 1e-3
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    for leaf, oracle in zip((hidden, weight), (exact_hidden, exact_weight), strict=True):
        assert leaf.grad is not None
        assert oracle.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad - oracle.grad).norm() < 4e-3 * oracle.grad.norm()  # one or two bf16 roundings


def test_large_logits_stay_finite() -> None:
    hidden = torch.full((1, 2, 4), 1e4, requires_grad=True)
    weight = torch.eye(4).mul(1e3).requires_grad_()
    loss = tiled_cross_entropy(hidden, weight, torch.tensor([[0, -100]]), 2)
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item())
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_non_finite_hidden_states_show_in_the_loss() -> None:
    hidden, weight, labels = _inputs(6, 4, 6, torch.float32)
    poisoned = hidden.detach().clone()
    poisoned[0, 1, 2] = float("nan")
    assert not torch.isfinite(tiled_cross_entropy(poisoned, weight, labels, 4))


class _LiveBytes(TorchDispatchMode):
    """Notes the most bytes that the results of all operations inside occupy at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        alive = [tensor for made in self._made if (tensor := made()) is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
        self.peak = max(self.peak, sum(storages.values()))
        return result


def test_memory_is_that_of_one_tile_of_logits() -> None:
    tokens, vocabulary, width, tile = 512, 1000, 8, 32
    hidden, weight, labels = _inputs(tokens, width, vocabulary, torch.float32)
    with _LiveBytes() as tiled:
        tiled_cross_entropy(hidden, weight, labels, tile).backward()
    with _LiveBytes() as dense:
        _dense(hidden, weight, labels).backward()
    one_tile, gradients = tile * vocabulary * 4, (vocabulary + tokens) * width * 4
    assert one_tile < tiled.peak < 1.1 * one_tile + 2 * gradients
    assert dense.peak >= tokens * vocabulary * 4  # the probe sees what it should see


def test_bad_arguments_are_named() -> None:
    hidden, weight, labels = _inputs(6, 4, 7, torch.float32)
    with pytest.raises(ValueError, match=r"got hidden \[1, 6, 4\] and weight \[0\]; if an engine shards the weight"):
        tiled_cross_entropy(hidden, torch.empty(0), labels, 2)
    with pytest.raises(
        ValueError, match=r"one long label for each of \[1, 6\] hidden states, got .*int64 of shape \[1, 5\]"
    ):
        tiled_cross_entropy(hidden, weight, labels[:, 1:], 2)
    with pytest.raises(ValueError, match=r"got torch\.int32"):
        tiled_cross_entropy(hidden, weight, labels.int(), 2)
    with pytest.raises(ValueError, match="expected at least 1, got 0"):
        tiled_cross_entropy(hidden, weight, labels, 0)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        tiled_cross_entropy(hidden, weight, labels.clamp_min(0) + 7, 2)
