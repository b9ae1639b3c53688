"""What each picture asks: of which rows, which number, against what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tools.report.axes import Looks
from tools.report.derive import Row
from tools.report.model import Report
from tools.report.yardsticks import priced


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """A picture to be drawn.

    Attributes:
        value: What a row contributes; None: nothing.
        predicted: A second, dashed line.
        only: The cp it is about; None: all of them.
        reference: (height, name) of a horizontal line; None: none.
        compares: The comparison that it shows; "": none.
        shown: Whether a row is a point of it.
        hollow: (words, whether it is true of a row) of what hollow markers tell apart.
    """

    name: str
    title: str
    unit: str
    value: Callable[[Row], float | None]
    predicted: Callable[[Row], float | None] | None = None
    log: bool = False
    percent: bool = False
    reference: tuple[float, str] | None = None
    only: int | None = None
    compares: str = ""
    shown: Callable[[Row], bool] = lambda row: row.best
    hollow: tuple[tuple[str, Callable[[Row], bool]], ...] = ()


def sketches(report: Report, looks: Looks) -> list[Sketch]:
    """The questions, for this kind of machine."""
    limit = report.machine.gpu
    has = "a GPU planned for has" if len({row.gpu for row in report.rows}) > 1 else "a GPU has"
    # Two lines for each kind and ring would be a thicket.
    only = looks.rings[-1] if len(looks.kinds) > 2 and len(looks.rings) > 1 else None
    at = "" if only is None else f", cp {only}"
    speed = Sketch(
        name="mfu",
        title="MFU, causal count",
        unit="of the GPU's dense peak",
        value=lambda row: row.mfu_causal,
        percent=True,
    )
    # Without a mark its lines would fall, where a longer row is run with other settings, as if less were needed.
    saving = (("recomputes, moves or tiles, see the table", lambda row: row.saves_memory),)
    memory = Sketch(
        name="gpu_memory",
        title=f"Memory in use on a GPU{at}",
        only=only,
        unit="GiB; dashed: predicted",
        value=lambda row: row.gpu_used_gib,
        predicted=lambda row: row.predicted_used_gib,
        hollow=saving,
        reference=None if limit is None else (limit, f"{has} {limit:.0f}"),
    )
    if not report.on_gpu:
        speed = Sketch(
            name="speed",
            title="Speed, causal count",
            unit="GFLOP/s per core in use",
            value=lambda row: None if row.tflops_per_unit_causal is None else 1000 * row.tflops_per_unit_causal,
        )
        memory = Sketch(
            name="host_memory",
            title=f"Peak memory per process{at}",
            only=only,
            unit="GiB; dashed: predicted",
            value=lambda row: row.host_peak_gib,
            predicted=lambda row: row.predicted_host_gib,
            hollow=saving,
        )
    return [
        Sketch(name="step_time", title="Step time", unit="s", value=lambda row: row.step_seconds, log=True),
        speed,
        memory,
        _cost_of_cp(report, "cost_same_tokens", "same tokens per rank", "FLOP/s"),
        _cost_of_cp(report, "cost_same_length", "same length", "tokens/s"),
        Sketch(
            name="exposed",
            title="Exposed communication",
            unit="of the step time",
            value=lambda row: row.exposed_fraction,
            percent=True,
        ),
        Sketch(
            name="against_softmax",
            title="Step time against softmax",
            unit="times",
            value=lambda row: row.reliable("against_softmax"),
            compares="against_softmax",
            hollow=_others("against_softmax"),
            reference=(1.0, "softmax"),
        ),
    ]


def _others(name: str) -> tuple[tuple[str, Callable[[Row], bool]], ...]:
    """How the two rows of a comparison may differ beside what is compared."""
    return (
        ("against another GPU", lambda row: name in row.across),
        ("against another commit", lambda row: name in row.other_code),
        ("against other settings of memory", lambda row: name in row.other_memory),
    )


def _cost_of_cp(report: Report, name: str, same: str, lost: str) -> Sketch:
    shown = priced(report.rows, name)
    return Sketch(
        name=name,
        title=f"Cost of cp, {same}",
        unit=f"{lost} lost against cp 1",
        value=lambda row: row.reliable(name),
        compares=name,
        shown=lambda row: row in shown,
        hollow=_others(name),
        percent=True,
        reference=(0.0, "as cp 1"),
    )
