"""Whom the report compares with whom, what it puts first, and how it names rows of other settings."""

import csv
import io
import re
from dataclasses import replace

import pytest

from tests.tools.report_records import cpu_row, gpu_row, report
from tools.bench.step_rows import StepRow
from tools.report.axes import Looks
from tools.report.conventions import conventions
from tools.report.derive import Row, derive_rows
from tools.report.kinds import in_words, kind_settings
from tools.report.longest import Limits, longest_contexts
from tools.report.plots import list_drawings
from tools.report.render import render_markdown
from tools.report.rows_csv import rows_csv
from tools.report.sketches import sketches
from tools.report.summary import key_figures, summary_sentences
from tools.report.yardsticks import priced

H200 = {"gpu": "NVIDIA H200"}
FAR = 1 << 20


def _row(kind: str, cp: int, tokens: int, seconds: float, *more: str, **change: object) -> StepRow:
    """Without the machine's memory, whose longest contexts would take seconds to plan."""
    settings = " ".join((*kind_settings(kind, "qwen3-0.6b"), *more, "memory.tile=8192"))
    return gpu_row(kind, cp, tokens, seconds, **{"settings": settings, "host_total": None, **change})


# The whole model and four layers of it; softmax's four layers ran on another GPU.
MIXED = (
    _row("lagged", 4, FAR, 52.8, "model.layers=4"),
    _row("sas", 4, FAR, 60.3, "model.layers=4", mfu_causal=0.6),
    _row("softmax", 4, FAR, 30.5, "model.layers=4", **H200),
    _row("softmax", 4, FAR, 208.0),
    _row("softmax", 4, 32768, 0.4),
    _row("softmax", 4, 32768, 1.0, variant="rival", settings="alltoall loss=fused layers=recomputed"),
)


def _found(steps: tuple[StepRow, ...]) -> dict[tuple[str, int, int], Row]:
    return {(row.kind, row.cp, row.tokens): row for row in derive_rows(steps)}


def test_softmax_of_the_same_settings_is_the_yardstick() -> None:
    rows = _found(MIXED)
    assert rows["lagged 128, 4 layers", 4, FAR].against_softmax == pytest.approx(52.8 / 30.5)
    assert rows["SAS r=2, 4 layers", 4, FAR].against_softmax == pytest.approx(60.3 / 30.5)
    assert rows["softmax, 4 layers", 4, FAR].against_softmax is None, "it is a yardstick itself"
    alone = _found(tuple(step for step in MIXED if step.gpu != "NVIDIA H200"))
    assert alone["lagged 128, 4 layers", 4, FAR].against_softmax is None, "the whole model's is none"


def test_the_rival_is_compared_with_the_whole_model() -> None:
    rival = {"variant": "rival", "settings": "alltoall loss=fused layers=recomputed"}
    steps = (
        _row("softmax", 4, 32768, 1.0, **rival),
        _row("softmax", 4, 32768, 0.05, "model.layers=4"),
        _row("softmax", 2, 32768, 0.8),
        _row("softmax", 4, 65536, 0.9),
    )
    assert _found(steps)["rival", 4, 32768].against_softmax is None
    steps = (*steps, _row("softmax", 4, 32768, 0.4))
    assert _found(steps)["rival", 4, 32768].against_softmax == pytest.approx(2.5)
    assert any("2.50 times ours at 32,768 tokens" in one for one in summary_sentences(report(steps)))


def test_costs_and_losses_are_those_of_the_same_settings() -> None:
    layers = "engine.precision=fp32 model.layers=1 memory=auto"
    steps = (
        cpu_row(1, 1024, 0.5),
        cpu_row(1, 4096, 4.0),
        cpu_row(4, 4096, 1.25, settings=layers, losses=(5.0, 4.0)),
    )
    ring = _found(steps)["softmax, 1 layer", 4, 4096]
    assert (ring.cost_same_tokens, ring.cost_same_length, ring.loss_difference) == (None, None, None)
    own = (
        cpu_row(1, 1024, 0.25, settings="model.layers=1 engine.precision=fp32", losses=(4.0, 3.0)),
        cpu_row(1, 4096, 1.0, settings=layers, losses=(4.0, 3.0)),
    )
    rows = _found((*steps, *own))
    ring, narrow = rows["softmax, 1 layer", 4, 4096], rows["softmax, 1 layer", 1, 1024]
    assert ring.cost_same_length == pytest.approx(1 - 1.0 / 1.25)
    assert ring.loss_difference == pytest.approx(0.25)
    assert ring.tflops_per_unit_causal is not None
    assert narrow.tflops_per_unit_causal is not None
    # the order of the settings is no setting
    assert ring.cost_same_tokens == pytest.approx(1 - ring.tflops_per_unit_causal / narrow.tflops_per_unit_causal)


def test_another_gpu_is_said_wherever_two_rows_are_compared() -> None:
    made = report(MIXED)
    across = {row.kind: dict(row.across) for row in made.rows if row.across}
    other = {"against_softmax": "NVIDIA H200"}
    assert across == {"lagged 128, 4 layers": other, "SAS r=2, 4 layers": other}
    sentence = next(one for one in summary_sentences(made) if one.startswith("Step time against softmax"))
    assert "lagged 128, 4 layers 1.73 times (at 1,048,576 tokens, cp 4, H100 80GB HBM3 against H200)" in sentence
    text = render_markdown(made, [])
    assert "| 1.73x # |" in text
    assert "| 2.50x |" in text, "the rival's row and ours are of one GPU"
    assert re.search(r"\| softmax, 4 layers \|.*\| nothing recomputed or moved \| H200 \|", text)
    assert "- **#**: the two compared rows ran on different GPUs (NVIDIA H100 80GB HBM3 and NVIDIA H200)" in text
    line = next(one for one in csv.DictReader(io.StringIO(rows_csv(made.rows))) if one["kind"].startswith("lagged"))
    assert (line["across"], line["conditions"]) == ("against_softmax: NVIDIA H200", "model.layers=4")
    # losses, but no costs, which would be those of the GPU as well
    ring = (_row("softmax", 1, 8192, 0.2, losses=(6.0,), **H200), _row("softmax", 4, 8192, 0.1, losses=(6.6,)))
    made = report(ring)
    assert (made.rows[1].cost_same_length, set(made.rows[1].across)) == (None, {"loss_difference"})
    assert "| 1.0e-01 # |" in render_markdown(made, [])
    assert "some on another GPU than theirs" in " ".join(summary_sentences(made))


def test_costs_of_cp_are_told_between_equal_gpus_alone() -> None:
    """Also where a faster row is of another GPU, on which cp 1 was not measured."""
    steps = (
        _row("softmax", 1, 8192, 0.2, machine="A, 16 cores, 126 GiB, Linux"),
        _row("softmax", 4, 8192, 0.1, machine="A, 64 cores, 504 GiB, Linux"),
        _row("softmax", 4, 8192, 0.125),
        _row("softmax", 4, 8192, 0.08, **H200),
        _row("softmax", 4, 32768, 0.7),
        _row("softmax", 4, 32768, 0.5, **H200),
    )
    made = report(steps)
    found = {(row.cp, row.tokens, row.step_seconds): row for row in made.rows}
    costs = {key: row.cost_same_length for key, row in found.items() if row.cost_same_length is not None}
    assert costs == {(4, 8192, 0.1): pytest.approx(0.5), (4, 8192, 0.125): pytest.approx(0.6)}
    assert found[4, 32768, 0.5].cost_same_tokens is None
    assert [key for key, row in found.items() if row.best] == [(1, 8192, 0.2), (4, 8192, 0.08), (4, 32768, 0.5)]
    assert priced(made.rows, "cost_same_length") == [found[4, 8192, 0.1]]
    assert priced(made.rows, "cost_same_tokens") == [found[4, 32768, 0.7]]
    percent = f"{found[4, 32768, 0.7].cost_same_tokens:.1%}"
    sentences = " ".join(summary_sentences(made))
    assert f"{percent} against cp 1 with as many tokens per rank (at 32,768 tokens on H100 80GB HBM3)" in sentences
    assert "50.0% against cp 1 as long a row (at 8,192 tokens on H100 80GB HBM3)" in sentences
    (figure,) = [figure for figure in key_figures(made) if figure.label.startswith("cost of cp")]
    assert figure.value == "50.0%", "the largest"
    assert figure.label == (
        "cost of cp 4 against cp 1 at the same length: 8,192 tokens, softmax, H100 80GB HBM3. The largest; the others: "
        f"{percent} at the same tokens per rank, 32,768 tokens"
    )
    drawn = {one.name: one.text for one in list_drawings(made, Looks.of(made.rows))}
    assert "softmax, cp 4: 50.0% at 8,192." in drawn["cost_same_length"]
    assert f"softmax, cp 4: {percent} at 32,768." in drawn["cost_same_tokens"]
    told = dict(conventions(made))["Compared rows"]
    assert "costs of cp are told between equal GPUs alone" in told
    assert "a line may be of several GPUs" in told
    assert "Machines differ beside the GPU" in told
    plain = dict(conventions(report(tuple(replace(step, machine="A") for step in steps if step.gpu != H200["gpu"]))))
    assert plain["Compared rows"].endswith("most likely of the same machine and code.")


def test_another_version_of_the_code_is_said_wherever_two_rows_are_compared() -> None:
    steps = (
        _row("softmax", 4, FAR, 2.0, commit="aaa"),
        _row("softmax", 4, 8192, 0.5, commit=None),
        _row("softmax", 1, 65536, 4.0, commit="aaa"),
        _row("softmax", 4, 65536, 2.0, commit="bbb+"),
        _row("lagged", 4, FAR, 3.0, commit="aaa"),
        _row("lagged", 4, 8192, 1.0, commit="aaa"),
        _row("sas", 4, FAR, 5.0, commit="bbb+"),
    )
    made = report(steps)
    found = {(row.attention, row.tokens): dict(row.other_code) for row in made.rows if row.other_code}
    softmax = {"cost_same_length": "aaa"}
    assert found == {("SAS r=2", FAR): {"against_softmax": "aaa"}, ("softmax", 65536): softmax}, (
        "of the others one is the same, one not recorded"
    )
    text = render_markdown(made, [])
    assert [text.count(one) for one in ("| 2.50x ~ |", "| 50.0% ~ |", "| 1.50x |", "| 2.00x |")] == [1, 1, 1, 1]
    assert "- **~**: the two compared rows were measured with different versions of the code (commits)" in text
    sentences = " ".join(summary_sentences(made))
    assert "SAS r=2 2.50 times (at 1,048,576 tokens, cp 4, by different commits)" in sentences
    assert "lagged 128 1.50 times (at 1,048,576 tokens, cp 4)," in sentences
    assert "as long a row (at 65,536 tokens, by different commits)" in sentences
    assert "| Commit | aaa; bbb+; not recorded for 1 of 7 rows |" in text
    same = report(tuple(replace(step, commit="aaa") for step in steps))
    assert "~" not in dict(conventions(same))
    assert "different commits" not in " ".join(summary_sentences(same))
    assert "| Commit | aaa |" in render_markdown(same, [])


def test_other_settings_of_memory_are_said_where_a_cost_is_told() -> None:
    again = "recompute=keep_attention"
    steps = (
        _row("softmax", 1, 8192, 0.4, memory="nothing recomputed or moved"),
        _row("softmax", 1, 32768, 4.0, memory=again),
        _row("softmax", 4, 32768, 2.0, memory="nothing recomputed or moved"),
        _row("lagged", 4, 32768, 3.0, memory=again),
    )
    made = report(steps)
    assert [dict(row.other_memory) for row in made.rows] == [{}, {}, {"cost_same_length": again}, {}]
    text = render_markdown(made, [])
    assert text.count("| 50.0% ^ |") == 1
    assert "- **^**: a cost of cp where the row of cp 1 has other settings of memory" in text
    assert f"50.0% against cp 1 as long a row (at 32,768 tokens, cp 1 with {again})" in text
    (sketch,) = [one for one in sketches(made, Looks.of(made.rows)) if one.name == "cost_same_length"]
    hollow = {words: [row.cp for row in made.rows if holds(row)] for words, holds in sketch.hollow}
    assert hollow["against other settings of memory"] == [4]
    assert "^" not in dict(conventions(report(tuple(replace(step, memory=again) for step in steps))))


def test_one_gpu_needs_no_mark() -> None:
    made = report(tuple(replace(step, gpu="NVIDIA H200") for step in MIXED))
    assert not any(row.across for row in made.rows)
    assert "| GPU |" not in render_markdown(made, [])
    assert "#" not in dict(conventions(made))
    assert "against H200" not in " ".join(summary_sentences(made))


def test_of_two_gpus_the_rows_own_is_the_yardstick() -> None:
    steps = (_row("softmax", 4, FAR, 1.0, **H200), _row("softmax", 4, FAR, 2.0), _row("sas", 4, FAR, 3.0))
    rows = derive_rows(steps)
    assert [(row.against_softmax, dict(row.across)) for row in rows if row.attention != "softmax"] == [(1.5, {})]
    assert [(row.gpu, row.best) for row in rows[:2]] == [("NVIDIA H200", True), ("NVIDIA H100 80GB HBM3", False)]


@pytest.mark.parametrize(("commit", "against"), [("bbb+", 2.0), ("ccc", 1.0), (None, 1.0)])
def test_of_two_runs_that_of_the_rows_own_commit_is_the_yardstick(commit: str | None, against: float) -> None:
    faster = _row("softmax", 4, 8192, 1.0, commit="aaa")
    slower = _row("softmax", 4, 8192, 2.0, "memory.recompute=true", commit="bbb+")
    lagged = _row("lagged", 4, 8192, 4.0, commit=commit)
    found = [row for row in report((faster, slower, lagged)).rows if row.attention == "lagged 128"]
    assert [row.against_softmax for row in found] == [4.0 / against]


def test_a_row_that_waits_for_its_host_is_no_yardstick_of_costs() -> None:
    """8,192 tokens on one GPU take 0.264 s whatever is in them, so that cutting a longer row would seem to pay."""
    made = report((_row("softmax", 1, 8192, 0.264), _row("softmax", 4, 32768, 0.386)))
    assert made.rows[1].cost_same_tokens < -0.5
    assert not any("cost of cp" in figure.label for figure in key_figures(made))
    sentences = " ".join(summary_sentences(made))
    assert "Cost of cp" not in sentences
    percent = f"{made.rows[1].cost_same_tokens:.1%}"
    told = f"would be {percent} for softmax cp 4 at 32,768 against cp 1 with as many tokens per rank: something else "
    assert told in sentences
    markdown = render_markdown(made, [])
    assert told in markdown
    assert markdown.count(percent) == 1, "in the sentence, and no cost in the table"


def test_a_yardstick_is_judged_for_all_kinds_alike() -> None:
    """The row of cp 1 that waits for its host in softmax does so in other kinds, whose costs are of either sign."""
    waiting = (_row("softmax", 1, 8192, 0.264, **H200), _row("softmax", 4, 32768, 0.386, **H200))
    others = (
        _row("lagged", 1, 8192, 0.221, **H200),
        _row("lagged", 4, 8192, 0.303, **H200),
        _row("lagged", 4, 32768, 0.543, **H200),
    )
    alone, made = report(others), report((*waiting, *others))
    assert [figure.value for figure in key_figures(alone) if figure.label.startswith("cost of cp 4")], (
        "what else it said"
    )
    assert not any("cost of cp" in figure.label for figure in key_figures(made))
    sentences = " ".join(summary_sentences(made))
    assert "all 3 against cp 1 at 8,192 tokens on H200. They would be -" in sentences
    assert "Cost of cp" not in sentences
    assert "Cost, same" not in render_markdown(made, [])
    assert [row.no_yardstick for row in made.rows] == [
        *((), ("cost_same_tokens",)),
        *((), ("cost_same_length",), ("cost_same_tokens",)),
    ]
    # at another length, and on another GPU, it is another row
    far = (_row("lagged", 1, 65536, 1.0, **H200), _row("lagged", 4, 65536, 0.3, **H200))
    h100 = (_row("sas", 1, 8192, 0.2), _row("sas", 4, 32768, 1.0))
    told = " ".join(summary_sentences(report((*waiting, *others, *far, *h100))))
    assert "Cost of cp 4, lagged 128: 16.7% against cp 1 as long a row (at 65,536 tokens on H200)." in told
    assert not any(row.no_yardstick for row in report((*waiting, *h100)).rows if row.attention != "softmax")


@pytest.mark.parametrize(("seconds", "left_out"), [(0.5, 0), (0.46, 0), (0.45, 1)])
def test_what_is_left_out_of_the_costs_is_told(seconds: float, left_out: int) -> None:
    """As long a row over four GPUs costs 0%, -8.7% or -11.1%."""
    made = report((_row("softmax", 1, 8192, 4 * 0.48), _row("softmax", 4, 8192, seconds * 0.96)))
    sentences = " ".join(summary_sentences(made))
    assert sentences.count("Left out of the costs of cp") == left_out
    assert sentences.count("Cost of cp 4") == 1 - left_out


def test_headlines_are_of_the_preset_as_it_is() -> None:
    far = (*MIXED, _row("softmax", 4, 2 * FAR, 120.0, "model.layers=4"))
    figures = {figure.value: figure.label for figure in key_figures(report(far))}
    assert figures["1M"].startswith("tokens: longest row trained (softmax, cp 4,")
    assert figures["208 s"] == "a step over 1,048,576 tokens (softmax, cp 4, H100 80GB HBM3)", "rows are of two GPUs"
    alone = [figure.label for figure in key_figures(report(tuple(step for step in far if "H100" in step.gpu)))]
    assert "a step over 1,048,576 tokens (softmax, cp 4)" in alone
    assert "40.0%" in figures, "not the 60% of four layers"
    assert not any("layers" in label for label in figures.values())
    reduced = tuple(step for step in MIXED if "layers=4" in step.settings)
    labels = [figure.label for figure in key_figures(report(reduced))]
    assert labels[0].startswith("tokens: longest row trained (softmax, 4 layers, cp 4,"), "there is no other, so say it"


def test_headlines_tell_rows_of_many_documents_from_one() -> None:
    """Their attention is short: a long row of many takes as long as a much shorter one of one."""
    kept = _row("softmax", 4, 2 * FAR, 269.0, documents="kept")
    figures = {figure.value: figure.label for figure in key_figures(report((_row("softmax", 4, FAR, 208.0), kept)))}
    words = "of many documents: attention is short"
    assert figures["2M"].startswith("tokens: longest row trained (softmax, documents kept, cp 4, ")
    assert words in figures["2M"]
    assert figures["208 s"] == "a step over 1,048,576 tokens (softmax, cp 4)"
    both = (replace(kept, tokens=FAR), _row("softmax", 4, FAR, 400.0))
    figures = {figure.value: figure.label for figure in key_figures(report(both))}
    assert "documents" not in figures["1M"] + figures["400 s"], "of two rows as long that of one document"
    (time,) = [figure for figure in key_figures(report((kept,))) if figure.label.startswith("a step over")]
    assert (time.value, words in time.label) == ("269 s", True), "there is no other, so say it"


def test_losses_of_shorter_warm_ups_are_not_compared() -> None:
    """The first loss is the warm-up's, above 262,144 tokens of another row."""
    alone = _row("softmax", 1, FAR, 4.0, losses=(6.0, 5.0))
    ring = _row("softmax", 4, FAR, 1.0, losses=(6.6, 5.0))
    short = {"warmup": "32768 tokens"}
    for first, second, wanted in (
        (alone, ring, pytest.approx(0.1)),
        (replace(alone, **short), replace(ring, **short), None),
        (alone, replace(ring, **short), None),
        (replace(alone, **short), ring, None),
    ):
        made = report((first, second))
        assert made.rows[1].loss_difference == wanted
        assert ("First losses agree" in " ".join(summary_sentences(made))) == (wanted is not None)


def test_the_planned_headline_is_of_the_preset_as_it_is() -> None:
    made = report(MIXED)
    assert [one.changed for one in made.longest] == [False, True, True, True]
    longest = tuple(replace(one, planned=9 * FAR if one.changed else 3 * FAR) for one in made.longest)
    assert key_figures(replace(made, longest=longest))[-1].value == "3M"
    assert key_figures(replace(made, longest=longest[1:]))[-1].value == "9M"


def test_cost_of_cp_may_be_of_a_changed_model_and_says_so() -> None:
    reduced = (
        _row("softmax", 1, 8192, 0.2, "model.layers=4"),
        _row("softmax", 4, 32768, 0.5, "model.layers=4"),
        _row("softmax", 4, 8192, 0.1, "model.layers=4"),
    )
    whole = (_row("softmax", 4, 65536, 1.0), _row("softmax", 2, 8192, 0.4))

    def told(*steps: StepRow) -> tuple[str, str]:
        made = report(steps)
        figure = next(figure.label for figure in key_figures(made) if figure.label.startswith("cost of cp"))
        return figure, next(one for one in summary_sentences(made) if one.startswith("Cost of cp"))

    figure, sentence = told(*reduced, *whole)
    assert figure == (
        "cost of cp 4 against cp 1 at the same length: 8,192 tokens, softmax, 4 layers. The largest; the others: "
        "31.8% at the same tokens per rank, 32,768 tokens"
    )
    assert sentence.startswith("Cost of cp 4, softmax, 4 layers: ")
    # even a lesser comparison of the preset as it is comes first
    figure, sentence = told(*reduced, *whole, _row("softmax", 1, 8192, 0.5))
    assert figure == "cost of cp 2 against cp 1 at the same length: 8,192 tokens, softmax"
    assert sentence.startswith("Cost of cp 2, softmax: ")


def test_a_disturbed_softmax_is_no_yardstick_of_a_sentence() -> None:
    softmax = cpu_row(1, 1024, 1.0, other_cores=1.5)
    sas = cpu_row(1, 1024, 3.0, settings=" ".join((*kind_settings("sas", "test"), "engine.precision=fp32")))
    assert "against softmax" not in " ".join(summary_sentences(report((softmax, sas))))
    assert "3.00 times" in " ".join(summary_sentences(report((replace(softmax, other_cores=0.0), sas))))


def test_comparisons_with_a_disturbed_row_are_marked() -> None:
    """In the table and in the CSV; but not a loss, which is what it is however long the step took."""
    alone = _row("softmax", 1, 8192, 0.2, losses=(6.0,), step_seconds=(0.2, 0.3))
    ring = _row("softmax", 4, 8192, 0.1, losses=(6.6,))
    made = report((alone, ring, _row("sas", 1, 8192, 0.5), _row("sas", 4, 8192, 0.25)))
    text = render_markdown(made, [])
    assert "| 8,192 * |" in text
    assert text.count("| 50.0% * | - | 1.0e-01 |") == 1
    assert text.count("| 2.50x * |") == 1, "against the disturbed row"
    assert text.count("| 2.50x |") == 1, "cp 4 against cp 4"
    unsound = [line["unsound"] for line in csv.DictReader(io.StringIO(rows_csv(made.rows)))]
    assert unsound == ["", "cost_same_length", "against_softmax", ""]
    assert "Behind a comparison the mark says that the row compared with is such a point" in text


def test_other_settings_have_names_and_an_order() -> None:
    assert [in_words(f"model.layers={n}") for n in (1, 4)] == ["1 layer", "4 layers"]
    assert in_words("model.hidden=512") == "model.hidden=512"
    more = [_row("softmax", 4, FAR, 9.0, one) for one in ("model.hidden=512", "data.max_documents=20")]
    steps = (*MIXED, *more)
    reduced = ["softmax, 4 layers", "lagged 128, 4 layers", "SAS r=2, 4 layers"]
    names = ["softmax", "softmax, data.max_documents=20", *reduced, "softmax, model.hidden=512"]
    assert list(dict.fromkeys(row.kind for row in derive_rows(steps))) == [*names, "rival"]
    assert [one.kind for one in longest_contexts(steps, Limits())] == names
    every = report(tuple(step for step in MIXED if "layers=4" in step.settings))
    assert {row.kind for row in every.rows} == set(reduced), "also where no row is of the preset as it is"
    assert "model.layers" not in render_markdown(every, []).split("| Commands")[0].split("| Command |")[0]
