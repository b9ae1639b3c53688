"""Records are predicted anew by today's planner, in the whole report alike."""

from dataclasses import replace
from typing import Any

import pytest

from launch.memory_advice import describe
from launch.memory_choice import MemoryPlan, plan_memory
from launch.memory_plan import GIB
from launch.memory_search import DeviceFacts
from tests.tools.report_records import CPU, cpu_row, gpu_row
from tools.bench.step_rows import StepRow
from tools.report.anew import predicted_anew
from tools.report.longest import Limits
from tools.report.model import Report, make_report
from tools.report.names import config_of
from tools.report.render import render_markdown, render_page
from tools.report.summary import summary_sentences

ROW = gpu_row("softmax", 4, 32768, 0.5)


def _plan(row: StepRow, gpu: float, host: float) -> MemoryPlan:
    facts = DeviceFacts(device_bytes=int(gpu * GIB), host_bytes=int(host * GIB / row.num_ranks))
    return plan_memory(config_of(row), row.num_ranks, facts)


def _report(*steps: StepRow, anew: bool) -> Report:
    return make_report(steps, command="python", date="2026-01-02", limits=Limits(), anew=anew)


def test_a_row_gets_the_predictions_of_today_for_its_own_machine() -> None:
    plan = _plan(ROW, 79.0, 500.0)
    (row,) = predicted_anew((ROW,), Limits(gpu=12, host=40))
    assert row.predicted_allocated == pytest.approx(plan.estimate.allocated / GIB) != ROW.predicted_allocated
    assert row.predicted_device == pytest.approx(plan.estimate.device_bytes / GIB)
    assert row.predicted_host == pytest.approx(plan.estimate.host_bytes / GIB)
    assert row.predicted_seconds == pytest.approx(plan.time.seconds)
    untold = replace(ROW, device_total=None, host_total=None)
    told = predicted_anew((untold, ROW), Limits(gpu=12, host=40))[0]
    assert told.predicted_host == row.predicted_host, "as others on such a GPU say, not as is planned for"
    assert predicted_anew((untold,), Limits(gpu=79, host=500))[0].predicted_host == row.predicted_host
    assert predicted_anew((untold,), Limits())[0].predicted_host is None


@pytest.mark.parametrize(
    "change", [{"memory": "recompute=true"}, {"settings": "model.no_such=1"}, {"device_total": 0.5, "host_total": 1.0}]
)
def test_there_is_none_for_what_today_s_planner_would_not_run(change: dict[str, Any]) -> None:
    (row,) = predicted_anew((replace(ROW, **change),), Limits())
    assert (row.predicted_host, row.predicted_seconds, row.predicted_device, row.predicted_allocated) == (None,) * 4


def test_times_of_kept_documents_and_rows_that_were_not_measured() -> None:
    (kept,) = predicted_anew((replace(ROW, documents="kept"),), Limits())
    assert kept.predicted_seconds is None
    assert kept.predicted_device is not None
    failed = replace(ROW, status="out of memory", seconds=None)
    rival = replace(ROW, variant="rival", settings="alltoall")
    assert predicted_anew((failed, rival), Limits()) == [failed, rival], "as it was decided then"
    small = replace(cpu_row(1, 1024, 0.5), memory=describe(plan_memory(config_of(CPU), 1, None).memory))
    (cpu,) = predicted_anew((small,), Limits())
    assert cpu.predicted_host not in (None, small.predicted_host)
    assert cpu.predicted_allocated is None


def test_the_report_says_whose_predictions_they_are() -> None:
    steps = (ROW, replace(ROW, tokens=65536, memory="recompute=true"))
    made = _report(*steps, anew=True)
    plan = _plan(ROW, 79.0, 500.0)
    (told,) = [one for one in summary_sentences(made) if "redicted" in one]
    error = f"{plan.time.seconds / 0.5 - 1:+.0%}"
    assert told.startswith("Predicted anew by today's planner, against measured: ")
    assert f"step time {error} to {error}; rows of older code" in told
    assert told.endswith("Not for 1 of these rows, see the notes.")
    text = render_markdown(made, [])
    assert f"25.0 ({plan.estimate.device_bytes / GIB:.1f})" in text
    assert "**Predicted**: by today's planner" in text
    assert "Predicted anew" in render_page(made, [])
    made = _report(*steps, anew=False)
    assert any(one.startswith("Predicted before each step, against measured: ") for one in summary_sentences(made))
    assert "25.0 (24.0)" in render_markdown(made, [])
    assert "**Predicted**: by the planner before the step" in render_markdown(made, [])


def test_a_disturbed_row_is_no_measure_of_predictions() -> None:
    loud = replace(ROW, tokens=65536, seconds=9.0, step_seconds=(5.0, 9.0, 15.0))
    one, both = (
        [told for told in summary_sentences(_report(*steps, anew=False)) if told.startswith("Predicted before")]
        for steps in ((ROW,), (ROW, loud))
    )
    assert one == both
    assert one
