"""The passes that the selection benchmark times, on the plain torch kernel, against its own float64 definition."""

from __future__ import annotations

from argparse import Namespace

import pytest

from tests.ringattn.unwritten import watched
from tools.bench_selection import _Case, main


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
