"""Row 32: what does not fit is refused with a table, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.checkpoint import CheckpointStore, Found
from launch.errors import CheckpointError
from tests.launch.checkpoint.helpers import blank, save


@pytest.fixture
def found(tmp_path: Path) -> Found:
    store = CheckpointStore(tmp_path / "c")
    save(store, 7)
    latest = store.find_latest()
    assert latest is not None
    return latest


def refusal(found: Found, into: dict[str, torch.Tensor]) -> str:
    before = {name: tensor.clone() for name, tensor in into.items()}
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(found.path.parent).load(found, into)
    assert all(torch.equal(into[name], before[name]) for name in into), "something was loaded"
    return str(caught.value)


def test_every_difference_is_in_the_table(found: Found) -> None:
    into = blank()
    del into["model.norm.weight"]
    into["model.bias"] = torch.full((4,), -1.0)
    into["model.embed.weight"] = torch.full((8, 3), -1.0)
    into["optim.step"] = torch.tensor(-1)
    text = refusal(found, into)
    assert "4 of 5 tensors differ; nothing was loaded" in text
    rows = [line.split(maxsplit=2) for line in text.splitlines() if line.startswith("  ")]
    assert [" ".join(" ".join(row).split()) for row in rows] == [
        "name problem checkpoint this run",
        "model.bias missing - float32 [4]",
        "model.embed.weight shape [7, 3] [8, 3]",
        "model.norm.weight extra float32 [5] -",
        "optim.step dtype float32 int64",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_is_not_cast(found: Found, dtype: torch.dtype) -> None:
    into = blank()
    into["model.norm.weight"] = into["model.norm.weight"].to(dtype)
    assert "1 of 4 tensors differ" in refusal(found, into)


def test_long_tables_are_cut(found: Found) -> None:
    text = refusal(found, {**blank(), **{f"model.layers.{index}": torch.zeros(1) for index in range(50)}})
    assert "50 of 54 tensors differ" in text
    assert "... and 30 more" in text
    assert len(text.splitlines()) < 30
