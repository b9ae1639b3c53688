"""The planner against every step that was measured on GPUs: the records of the docs, predicted anew by today's code."""

from pathlib import Path

import pytest

from launch.memory_choice import plan_memory
from launch.memory_search import DeviceFacts
from tools.bench.step_cases import Case
from tools.bench.step_rows import GIB, StepRow, read_rows
from tools.report.kinds import settings_of

RECORDS = Path(__file__).parents[2] / "docs/records"
ROWS = [
    row
    for name in ("steps-4-h100.jsonl", "steps-4-h200.jsonl")
    for row in read_rows(RECORDS / name)
    if row.variant == "ours" and row.status == "ok"
]
NAMES = [f"{row.model} cp {row.num_ranks} {row.tokens} {row.settings}" for row in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_memory_is_within_a_tenth_of_what_was_measured(row: StepRow, tmp_path: Path) -> None:
    case = Case(
        variant="ours",
        model=row.model,
        size=row.num_ranks,
        tokens=row.tokens,
        overrides=settings_of(row.settings),
        keep_documents=row.documents == "kept",
    )
    config = case.config(device="cuda", folder=tmp_path, timeout_seconds=60)
    facts = DeviceFacts(device_bytes=int((row.device_total or 79.2) * GIB), host_bytes=int(503 * GIB / row.num_ranks))
    planned = plan_memory(config, row.num_ranks, facts)
    assert row.peak_allocated is not None
    # measured before a head of its own was reduced by itself, which is more at the end of a short row
    before = row.model == "llama-3-8b" and row.tokens == 65_536
    assert planned.estimate.allocated / GIB == pytest.approx(row.peak_allocated, rel=0.1 if before else 0.05)
    assert row.device_used is not None
    if row.device_used > (row.peak_reserved or 0):  # else it was read after the step
        assert planned.estimate.device_bytes / GIB == pytest.approx(row.device_used, rel=device_tolerance(row))
    assert row.seconds is not None
    if row.documents == "one":  # several shorten attention
        slower, faster = time_tolerance(row, waits_for_host=planned.time.host != 0)
        assert (1 - slower) * row.seconds <= planned.time.seconds <= (1 + faster) * row.seconds


def device_tolerance(row: StepRow) -> float:
    """Where a GPU has room to spare the allocator keeps more than is in use: 8 to 13 GiB of Llama-3-8B's."""
    return 0.2 if row.model == "llama-3-8b" else 0.1 if (row.tokens, row.num_ranks) == (8_192, 2) else 0.05


def time_tolerance(row: StepRow, *, waits_for_host: bool) -> tuple[float, float]:
    """By how much a step may have been slower, and faster, than predicted."""
    if not waits_for_host:
        return 0.2, 0.25
    if row.num_ranks == 2 or "attention=sas" in row.settings:
        return 0.65, 0.3  # on that day two GPUs were half as fast; and passes of SAS were no graphs yet
    return 0.2, 0.3


def test_there_is_something_of_each_kind() -> None:
    text = " ".join(NAMES)
    assert all(word in text for word in ("selection_lag=128", "attention=sas", "llama-3-8b cp 1", "offload=inputs"))
