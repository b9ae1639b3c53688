"""The passes that the selection benchmark times, on the plain torch kernel, against its own float64 definition."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

from tests.ringattn.unwritten import watched
from tools.bench_selection import GAIN, _Case, main


@pytest.mark.parametrize(("lag", "kv_heads"), [(1, 2), (16, 4)])
def test_what_is_timed_is_right_and_finds_nothing_set_to_zero_for_it(lag: int, kv_heads: int) -> None:
    case = _Case(150, Namespace(heads=4, kv_heads=kv_heads, head_dim=16), device="cpu")
    with watched():
        forward, backward = case.selective(lag, kernel="tiled")
        kept = forward()
        found = [kept[0], *backward(kept)]
    for name, x, truth in zip(("out", "dq", "dk", "dv"), found, case.truth(lag), strict=True):
        assert float((x - truth).norm() / truth.norm()) < 1e-5, name


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--tokens", "64"]) != 0
    assert "bench_selection: CUDA: expected a GPU, found none" in capsys.readouterr().err


def test_what_a_ring_does_besides_is_the_ballots_alone() -> None:
    """Sums of the votes of head 0, and the gradients of their sum with each key's vote weighed by those sums."""
    case = _Case(150, Namespace(heads=4, kv_heads=2, head_dim=16), device="cpu")
    forward, backward = case.between_pieces(kernel="tiled")
    (sums,) = kept = forward()
    q, k = (x[:, :, 0].double().requires_grad_() for x in (case.q, case.k))
    weight = torch.tensor(GAIN, dtype=torch.float64, requires_grad=True)
    i = torch.arange(150)
    votes = (q @ k.transpose(1, 2) * case.scale).relu() * weight * ((i[None, :] < i[:, None]) & (i[None, :] > 0))
    torch.testing.assert_close(sums.double(), votes.sum(1).detach(), rtol=1e-4, atol=1e-5)
    true = torch.autograd.grad((votes.sum(1) * sums.double()).sum(), (q, k, weight))
    for found, expected in zip(backward(kept), true, strict=True):
        torch.testing.assert_close(found.double().reshape(expected.shape), expected, rtol=2e-2, atol=1e-3)
