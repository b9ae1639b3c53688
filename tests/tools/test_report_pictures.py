"""Nothing of a picture is cut off or lies over something else, however many lines it has: boxes as Agg draws them."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tests.tools.report_records import gpu_row, report
from tools.bench.step_rows import StepRow
from tools.report.axes import Looks
from tools.report.kinds import kind_settings
from tools.report.model import Report
from tools.report.plots import Drawing, draw_plots, list_drawings, make_figure
from tools.report.render import render_markdown, render_page
from tools.report.style import COLOURS, RIVAL_COLOUR, STYLE, darkened

LENGTHS = (8192, 33000, 34816, 65536, 131072, 262144, 1 << 20)
KINDS = ("softmax", "selective", "lagged")
OTHERS = ("", "model.layers=4", "data.max_documents=20 model.layers=12")


def _report(series: int, rings: tuple[int, ...] = (4,), lengths: tuple[int, ...] = LENGTHS) -> Report:
    """Up to nine kinds of ours and the rival's, with longest contexts that no planner had to find."""
    steps = []
    for number in range(min(series, 9)):
        kind, other = KINDS[number % 3], OTHERS[number // 3]
        change = {"settings": f"{' '.join(kind_settings(kind, 'qwen3-0.6b'))} {other}", "host_total": None}
        change |= {"gpu": "NVIDIA H200"} if (kind, other) == ("softmax", "model.layers=4") else {}
        steps += [
            gpu_row(kind, cp, n, (1 + number) * n / 8192 / cp**0.9, exposed_seconds=0.01, **change)
            for cp in rings
            for n in lengths
        ]
    if series > 9:
        steps.append(gpu_row("softmax", 4, 8192, 9.0, variant="rival", settings="alltoall loss=fused"))
    made = report(tuple(steps))
    return replace(made, longest=tuple(replace(one, planned=7663616) for one in made.longest))


def _drawn(drawings: list[Drawing], looks: Looks) -> Figure:
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        figure = make_figure(drawings, looks)
        figure.draw_without_rendering()
    assert isinstance(figure.canvas, FigureCanvasAgg)
    return figure


def _texts(figure: Figure) -> Iterator[Text]:
    """All that is shown."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if low <= tick.get_loc() <= high:
                    yield tick.label1
            yield axis.label
        yield from (axes.title, *axes.texts)
    for legend in figure.legends:
        yield from legend.get_texts()


def _boxes(figure: Figure) -> dict[str, Bbox]:
    shown = [text for text in _texts(figure) if text.get_visible() and text.get_text()]
    return {f"{number} {text.get_text()!r}": text.get_window_extent() for number, text in enumerate(shown)}


def _overlap(one: Bbox, other: Bbox) -> bool:
    return one.x0 < other.x1 and other.x0 < one.x1 and one.y0 < other.y1 and other.y0 < one.y1


def _check(figure: Figure) -> None:
    page = figure.bbox
    boxes = _boxes(figure)
    for name, box in boxes.items():
        inside = box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1
        assert inside, f"{name} leaves the figure: {box} is not in {page}"
    touching = [(a, b) for (a, one), (b, other) in combinations(boxes.items(), 2) if _overlap(one, other)]
    assert not touching, f"these lie over each other: {touching}"
    (legend,) = figure.legends  # once per figure
    told = [text.get_text() for text in legend.get_texts()]
    assert len(set(told)) == len(told), "a line is told once"
    area = legend.get_window_extent()
    assert area.x0 >= page.x0, "the first marker of the legend is cut"
    assert area.x1 <= page.x1
    for axes in figure.axes:
        assert not _overlap(area, axes.get_window_extent()), "the legend lies over lines"
        width, height = axes.get_window_extent().size / figure.dpi
        assert width > 2.6, f"the axes are squeezed to {width:.2f} in of 5.6"
        assert height > 2.2, f"the axes are squeezed to {height:.2f} in of 3.7"


def _by_columns(names: list[str], figure: Figure) -> list[str]:
    """Names that are read row by row, in the order of the legend's columns."""
    lefts = sorted({round(text.get_window_extent().x0) for text in figure.legends[0].get_texts()})
    return [name for column in range(len(lefts)) for name in names[column :: len(lefts)]]


@pytest.mark.filterwarnings("error")  # "constrained_layout not applied"
@pytest.mark.parametrize(("series", "rings"), [(1, (4,)), (1, (1, 2, 4)), (4, (4,)), (4, (1, 4)), (10, (4,))])
def test_nothing_is_cut_or_overlaps_in_the_overview(series: int, rings: tuple[int, ...]) -> None:
    made = _report(series, rings)
    looks = Looks.of(made.rows)
    drawings = list_drawings(made, looks)
    assert len(drawings) >= 5
    _check(_drawn(drawings, looks))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("series", "rings", "name"),
    [
        *((series, rings, name) for series, rings in ((1, (1, 4)), (4, (4,))) for name in ("step_time", "longest")),
        *((10, (1, 4), name) for name in ("step_time", "gpu_memory", "cost_same_length", "against_softmax", "longest")),
    ],
)
def test_nothing_is_cut_or_overlaps_in_a_picture(series: int, rings: tuple[int, ...], name: str) -> None:
    made = _report(series, rings)
    looks = Looks.of(made.rows)
    drawing = next(one for one in list_drawings(made, looks) if one.name == name)
    figure = _drawn([drawing], looks)
    _check(figure)
    told = [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]
    if name == "longest":
        assert told == ["trained a step", "planner: fits"]
    elif series == 1:
        assert told == ["cp 1", "cp 4"]
    else:
        rings = sorted({cp for _, cp in drawing.lines})
        assert told == _by_columns(
            [*dict.fromkeys(kind for kind, _ in drawing.lines), *(f"cp {cp}" for cp in rings if len(rings) > 1)], figure
        )


def test_where_colours_tell_the_ring_the_legend_does() -> None:
    made = report((*_report(1, (1, 4)).steps, gpu_row("softmax", 4, 8192, 9.0, variant="rival", settings="alltoall")))
    looks = Looks.of(made.rows)
    assert looks.by_ring
    (legend,) = _drawn([list_drawings(made, looks)[0]], looks).legends
    told = {
        text.get_text(): line.get_color() for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert told == {"cp 1": COLOURS[0], "cp 4": COLOURS[1], "rival, cp 4": RIVAL_COLOUR}


def test_a_picture_of_one_kind_of_many_names_it() -> None:
    """And where a title has no room for the unit, a note says it."""
    layers = {"settings": "model.layers=4", "host_total": None}
    made = report(
        (gpu_row("softmax", 4, 65536, 9.0), *(gpu_row("softmax", cp, 8192, 1.0, **layers) for cp in (1, 2, 4)))
    )
    looks = Looks.of(made.rows)
    figure = _drawn([one for one in list_drawings(made, looks) if one.name == "cost_same_length"], looks)
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == ["softmax, 4 layers, cp 2", "softmax, 4 layers, cp 4"]
    heading = [text.get_text() for text in figure.axes[0].texts]
    assert heading == ["tokens/s lost against cp 1; dotted: as cp 1", "Cost of cp, same length"]


def test_ticks_without_room_are_left_out_and_the_others_stay() -> None:
    """33,000 and 34,816 tokens are 0.08 doublings apart; 32k to 256k have room."""
    for lengths, wanted in (
        (LENGTHS, ["8k", "34k", "64k", "128k", "256k", "1M"]),
        ((32768, 131072, 262144, 1 << 20), ["32k", "128k", "256k", "1M"]),
        ((1024, 1536, 1 << 26), ["1,536", "64M"]),
    ):
        made = _report(1, lengths=lengths)
        looks = Looks.of(made.rows)
        (axes,) = _drawn([list_drawings(made, looks)[0]], looks).axes
        assert [label.get_text() for label in axes.get_xticklabels()] == wanted


@pytest.mark.parametrize("series", [1, 9])
def test_no_place_of_the_overview_is_empty(series: int) -> None:
    """With as many pictures as there are, which nine kinds make end with a tall one, and with one less."""
    made = _report(series, lengths=(8192, 32768))
    looks = Looks.of(made.rows)
    drawings = list_drawings(made, looks)
    for shown in (drawings, drawings[1:]):
        figure = _drawn(shown, looks)
        rows: dict[float, float] = {}
        for part in figure.subfigs:
            rows[round(part.bbox.y0)] = rows.get(round(part.bbox.y0), 0.0) + part.bbox.width
        assert list(rows.values()) == pytest.approx([figure.bbox.width] * len(rows), rel=0.02), len(shown)


def test_kinds_of_a_single_length_are_left_out_where_others_have_lines() -> None:
    layers = "model.layers=4 memory=auto"
    lines = [gpu_row("softmax", cp, n, n / 1e5, exposed_seconds=0.01) for cp in (1, 4) for n in (8192, 32768)]
    points = [gpu_row("softmax", cp, 65536, 1.0 / cp, settings=layers) for cp in (1, 4)]
    rival = gpu_row("softmax", 4, 8192, 9.0, variant="rival", settings="alltoall")
    made = report((*lines, *points, rival))
    drawn = {one.name: one for one in list_drawings(made, Looks.of(made.rows))}
    for name in ("step_time", "mfu", "gpu_memory", "cost_same_length"):
        assert {kind for kind, _ in drawn[name].lines} - {"rival"} == {"softmax"}, name
        assert "65,536" not in drawn[name].text
        assert drawn[name].left_out == ("softmax, 4 layers",)
    assert ("rival", 4) in drawn["step_time"].lines
    assert (drawn["against_softmax"].left_out, drawn["longest"].left_out) == ((), ())
    plots, _ = draw_plots(made)
    note = "left out where other kinds have lines: softmax, 4 layers. The table has them"
    assert note in render_markdown(made, plots)
    assert note in render_page(made, plots)
    # costs are of such a kind alone: it stays
    alone = report((*[row for row in lines if row.num_ranks == 4], *points))
    drawn = {one.name: one for one in list_drawings(alone, Looks.of(alone.rows))}
    assert drawn["cost_same_length"].lines == (("softmax, 4 layers", 4),)
    only = report((*points, rival))
    drawn = {one.name: one for one in list_drawings(only, Looks.of(only.rows))}
    assert {kind for kind, _ in drawn["step_time"].lines} == {"softmax, 4 layers", "rival"}
    assert "left out where other kinds" not in render_markdown(only, draw_plots(only)[0])


@pytest.mark.filterwarnings("error")
def test_a_length_beyond_the_planned_is_marked_and_told_exactly() -> None:
    why = "trained on a larger GPU: H200"
    made = _report(4)
    first, *others = made.longest
    made = replace(made, longest=(replace(first, measured=2097152, planned=2093056, beyond=why), *others))
    looks = Looks.of(made.rows)
    drawings = list_drawings(made, looks)
    _check(_drawn(drawings, looks))
    figure = _drawn([one for one in drawings if one.name == "longest"], looks)
    _check(figure)
    assert f"2,097,152 measured, 2,093,056 planned to fit ({why}); selective" in drawings[-1].text
    assert "2,097,152 / 2,093,056" in [text.get_text() for text in figure.axes[0].texts]
    assert [text.get_text() for text in figure.legends[0].get_texts()][-1] == why
    assert len([patch for patch in figure.axes[0].patches if patch.get_hatch()]) == 1


@pytest.mark.parametrize("seconds", [0.0502, 0.0485])
def test_a_small_cost_is_drawn_small(seconds: float) -> None:
    """A lone cost of 0.4% filled its picture, beside ticks of 0.2% and 0.2%."""
    made = report(tuple(gpu_row("softmax", cp, 8192, each, host_total=None) for cp, each in ((1, 0.2), (4, seconds))))
    looks = Looks.of(made.rows)
    drawing = next(one for one in list_drawings(made, looks) if one.name == "cost_same_length")
    (axes,) = _drawn([drawing], looks).axes
    told = [label.get_text() for label in axes.get_yticklabels()]
    assert len(set(told)) == len(told)
    assert axes.get_ylim()[1] - axes.get_ylim()[0] >= 0.05


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("seconds", "told"), [(0.0502, "0.4%"), (0.0498, "-0.4%"), (0.0465, "-7.5%"), (0.05, "0.0%"), (0.1, "50.0%")]
)
@pytest.mark.parametrize("other", ["", "data.max_documents=20 model.layers=12 engine.name=ddp"])
def test_a_lone_point_says_what_it_is(seconds: float, told: str, other: str) -> None:
    """There is no line to read it by, and just below 0 half of its marker was cut."""
    settings = {"settings": f"memory=auto {other}", "host_total": None}
    made = report(tuple(gpu_row("softmax", cp, 8192, each, **settings) for cp, each in ((1, 0.2), (4, seconds))))
    looks = Looks.of(made.rows)
    drawings = list_drawings(made, looks)
    drawing = next(one for one in drawings if one.name == "cost_same_length")
    for figure in (_drawn([drawing], looks), _drawn(drawings, looks)):
        _check(figure)
        (axes,) = [axes for axes in figure.axes if any("Cost of cp" in text.get_text() for text in axes.texts)]
        (words,) = [text for text in axes.texts if text.get_text().startswith(told)]
        assert words.get_text().replace("\n", " ") == f"{told} {made.rows[1].kind}, cp 4"
        box, inside = words.get_window_extent(), axes.get_window_extent()
        assert inside.x0 <= box.x0
        assert box.x1 <= inside.x1
        assert box.y1 <= inside.y1
        (marker,) = [line for line in axes.lines if line.get_marker() == "^"]
        assert not marker.get_clip_on(), "all of the marker is shown"
        dotted = axes.transData.transform((8192, 0.0))[1]
        assert not box.y0 < dotted < box.y1, "the dotted line goes through the words"
    several = report(
        (*made.steps, gpu_row("softmax", 1, 32768, 2.0, **settings), gpu_row("softmax", 4, 32768, 0.6, **settings))
    )
    looks = Looks.of(several.rows)
    drawing = next(one for one in list_drawings(several, looks) if one.name == "cost_same_length")
    (axes,) = _drawn([drawing], looks).axes
    assert not [text for text in axes.texts if "softmax" in text.get_text()]


def test_ten_kinds_have_ten_colours() -> None:
    looks = Looks.of(_report(10).rows)
    assert len(looks.kinds) == 10
    assert len({looks.colour(kind, 4) for kind in looks.kinds}) == 10
    light = "".join(f'<path style="stroke: {colour}"/>' for colour in COLOURS)
    dark = re.findall(r"#\w{6}", darkened(light.encode()).decode())
    assert len(set(dark)) == len(COLOURS), "on dark paper too"


def test_points_of_settings_that_save_memory_are_hollow() -> None:
    """A line of memory falls where a longer row is run with other settings, and the picture says so."""
    settings = ("nothing recomputed or moved", "recompute=keep_attention", "recompute=true, tile=4096")
    lengths = (8192, 32768, 65536)
    steps = [
        gpu_row("softmax", 4, n, 1.0, memory=memory, device_used=used, host_total=None)
        for n, memory, used in zip(lengths, settings, (50.0, 20.0, 30.0), strict=True)
    ]
    rival = [
        gpu_row("softmax", 4, n, 2.0, variant="rival", settings=f"alltoall loss=fused layers={layers}", memory="")
        for n, layers in ((8192, "kept"), (32768, "recomputed"))
    ]
    made = report((*steps, *rival))
    assert [row.memory for row in made.rows] == [*settings, "layers kept", "layers recomputed"]
    looks = Looks.of(made.rows)

    def drawn(made: Report) -> tuple[list[list[float]], str]:
        drawing = next(one for one in list_drawings(made, looks) if one.name == "gpu_memory")
        (axes,) = _drawn([drawing], looks).axes
        hollow = [list(line.get_xdata()) for line in axes.lines if line.get_markerfacecolor() == "white"]
        return hollow, " ".join(text.get_text() for text in reversed(axes.texts))

    hollow, notes = drawn(made)
    assert hollow == [[32768, 65536], [32768]]
    assert "hollow: recomputes, moves or tiles, see the table" in notes
    hollow, notes = drawn(report((steps[0], rival[0])))
    assert (hollow, "hollow" in notes) == ([], False)


def _told(made: Report, name: str) -> tuple[Drawing, str, str]:
    """(a picture, its notes, and of these what it says is not drawn)."""
    looks = Looks.of(made.rows)
    drawing = next(one for one in list_drawings(made, looks) if one.name == name)
    figure = _drawn([drawing], looks)
    _check(figure)
    above = [text for text in figure.axes[0].texts if text.xycoords == "axes fraction"]  # and not beside a point
    notes = " ".join(text.get_text() for text in reversed(above))
    return drawing, notes, notes.partition("not drawn, as disturbed: ")[2]


def _restless(step: StepRow) -> StepRow:
    seconds = step.seconds or 0.0
    return replace(step, step_seconds=(seconds, 2 * seconds))


def test_comparisons_with_disturbed_points_are_not_drawn() -> None:
    steps = [gpu_row(kind, 4, n, n / 1e5 * (1 + number)) for number, kind in enumerate(KINDS) for n in (8192, 32768)]

    def drawn(*steps: StepRow) -> tuple[int, int, str]:
        drawing, _, missing = _told(report(steps), "against_softmax")
        return drawing.text.count("8,192"), drawing.text.count("32,768"), missing

    assert drawn(*steps) == (2, 2, "")
    both = "selective cp 4 at 8,192, lagged 128 cp 4 at 8,192"
    assert drawn(_restless(steps[0]), *steps[1:]) == (0, 2, both)
    assert drawn(*steps[:2], _restless(steps[2]), *steps[3:]) == (1, 2, "selective cp 4 at 8,192"), "its own"
    # Nothing is left out where another GPU's row, which is faster and quiet, is the point.
    slower = {"gpu": "NVIDIA H200", "seconds": 10 * (steps[0].seconds or 0.0)}
    elsewhere = (replace(steps[0], **slower, step_seconds=(1.0, 9.0)), replace(steps[2], **slower))
    assert drawn(*steps, *elsewhere) == (2, 2, "")
    more = [gpu_row(kind, 4, 65536, 1.0 + number) for number, kind in enumerate(KINDS)]
    found = drawn(*(_restless(step) if "selection" not in step.settings else step for step in steps), *more)
    assert found == (0, 0, "selective cp 4 at 8,192, selective cp 4 at 32,768, 2 more")


def test_costs_with_disturbed_points_are_told_where_no_other_row_stands_for_them() -> None:
    """Whichever of two GPUs is the faster one: the point is there."""
    h100 = [gpu_row("softmax", cp, n, n / 1e4 / cp**0.9) for cp in (1, 4) for n in (8192, 65536)]
    slow = [replace(step, gpu="NVIDIA H200", seconds=2 * (step.seconds or 0.0), step_seconds=()) for step in h100]

    def drawn(*steps: StepRow) -> tuple[bool, bool, str]:
        drawing, notes, missing = _told(report(steps), "cost_same_length")
        assert "hollow" not in notes, "costs are told between equal GPUs alone"
        return " 8,192" in drawing.text, "65,536" in drawing.text, missing

    assert drawn(*h100) == drawn(*h100, *slow) == (True, True, "")
    for fast in (h100, slow):
        other = slow if fast is h100 else h100
        for number in (0, 2):  # cp 1, cp 4
            steps = [_restless(step) if step is fast[number] else step for step in fast]
            assert drawn(*steps) == (False, True, "softmax cp 4 at 8,192")
            assert drawn(*steps, *other) == (True, True, "")
            assert drawn(*steps, *other[1:]) == (False, True, "softmax cp 4 at 8,192"), "the other has no yardstick"


def test_points_compared_with_another_gpu_are_hollow() -> None:
    made = _report(5, lengths=(8192,))
    looks = Looks.of(made.rows)
    drawing = next(one for one in list_drawings(made, looks) if one.name == "against_softmax")
    (axes,) = _drawn([drawing], looks).axes
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "white"]
    crossed = [row.against_softmax for row in made.rows if row.across]
    assert [list(line.get_ydata()) for line in hollow] == [[value] for value in crossed] == [[5 / 4]]
    assert any("hollow: against another GPU" in text.get_text() for text in axes.texts)
    steps = tuple(replace(step, commit="another" if step.gpu == "NVIDIA H200" else "one") for step in made.steps)
    both = report(steps)
    drawing = next(one for one in list_drawings(both, looks) if one.name == "against_softmax")
    (axes,) = _drawn([drawing], looks).axes
    words = " ".join(text.get_text() for text in reversed(axes.texts))
    assert "hollow: against another GPU or against another commit" in words
    same = report(tuple(replace(step, gpu="NVIDIA H200") for step in made.steps))
    drawing = next(one for one in list_drawings(same, looks) if one.name == "against_softmax")
    (axes,) = _drawn([drawing], looks).axes
    assert not any("hollow" in text.get_text() for text in axes.texts)
