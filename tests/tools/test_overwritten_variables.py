"""The toy of overwritten variables: rows recomputed by hand, rings equal to one process, and a tiny run of the tool."""

import csv
import json
import re
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import ringattn
from tools.overwritten.ranks import train_over_ranks
from tools.overwritten.results import Experiment, render_markdown
from tools.overwritten.rows import Toy
from tools.overwritten.training import Evaluation, Settings, lag_of, model_config, train
from tools.overwritten_variables import app

TOY = Toy(variables=3, values=5)
TINY = Settings(seq_len=32, lengths=(32, 64), batch=4, steps=4, evaluations=2, answers=16)


def rows(toy, seq_len, count=16, seed=0):
    return toy.rows(count, seq_len, torch.Generator().manual_seed(seed))


def read(token, toy):
    """("write", variable, value), ("ask", variable) or None, from the documented order of the vocabulary."""
    kinds = [None] * (1 + toy.values)
    kinds += [("ask", variable) for variable in range(toy.variables)]
    kinds += [("write", variable, value) for variable in range(toy.variables) for value in range(toy.values)]
    assert len(kinds) == toy.vocab_size
    return kinds[token]


def wrong_labels(tokens, labels, toy):
    """Positions whose label is not what a reader of the row from left to right would answer."""
    found = []
    for row, row_labels in zip(tokens.tolist(), labels.tolist(), strict=True):
        memory = {}
        for place, (token, label) in enumerate(zip(row, row_labels, strict=True)):
            match read(token, toy):
                case ("write", variable, value):
                    memory[variable] = value
                    answer = -100
                case ("ask", variable):
                    answer = 1 + memory[variable]
                case None:
                    answer = -100
            if label != answer:
                found.append(place)
    return found


@pytest.mark.parametrize(("toy", "seq_len"), [(TOY, 32), (TOY, 64), (Toy(), 256), (Toy(density=1.0), 64)])
def test_labels_are_the_last_values(toy, seq_len):
    tokens, labels = rows(toy, seq_len)
    assert wrong_labels(tokens, labels, toy) == []
    assert (labels != -100).sum(dim=1).tolist() == [seq_len // 8] * 16


def test_the_check_of_labels_can_fail():
    tokens, labels = rows(TOY, 32)
    firsts = tokens.clone()
    firsts[:, :16] = tokens[:, :16].flip(1)  # now the first write is the last one
    assert wrong_labels(firsts, labels, TOY)


def test_values_are_overwritten_often_and_stale_ones_would_be_wrong():
    tokens, labels = rows(Toy(), 64)
    writes = tokens > 1 + 16 + 4 - 1
    assert writes.sum(dim=1).tolist() == [16] * 16
    assert not writes[:, 32:].any()
    assert (tokens[:, 32:48] == 0).all()
    assert len(set(labels.flatten().tolist())) == 17, "all values are asked for"


def test_the_same_generator_gives_the_same_rows_and_another_gives_others():
    assert all(torch.equal(a, b) for a, b in zip(rows(TOY, 32), rows(TOY, 32), strict=True))
    assert not torch.equal(rows(TOY, 32)[0], rows(TOY, 32, seed=1)[0])


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("cp", [2, 4])
def test_a_query_and_the_write_that_answers_it_are_on_different_ranks(cp, layout):
    tokens, _ = rows(TOY, 64)
    plan = ringattn.Plan(64, cp, layout=layout)
    rank_of = {int(place): rank for rank in range(cp) for place in plan.positions(rank)}
    for row in tokens.tolist():
        last = {}
        for place, token in enumerate(row):
            match read(token, TOY):
                case ("write", variable, _):
                    last[variable] = place
                case ("ask", variable):
                    assert rank_of[last[variable]] != rank_of[place]


@pytest.mark.parametrize(
    ("toy", "seq_len", "words"),
    [
        ({}, 20, "multiple of 8"),
        ({"variables": 9}, 64, "too few for 9 variables"),
        ({"values": 1}, 64, "at least 2 values"),
        ({"density": 1.5}, 64, "density above 0"),
    ],
)
def test_rows_that_cannot_be(toy, seq_len, words):
    with pytest.raises(ValueError, match=words):
        rows(Toy(**toy), seq_len)


def test_variants():
    assert [lag_of(name) for name in ("standard", "exact", "lag1", "lag16")] == [None, 1, 1, 16]
    for wrong in ("lag0", "lag", "exact ", "Standard"):
        with pytest.raises(ValueError, match="standard, exact or lagN"):
            lag_of(wrong)
    fixed = model_config(replace(TINY, gain=0.5, fixed_gain=True), "lag16").selection
    assert (fixed.lag, fixed.gain) == (16, 0.5)


def test_all_variants_start_from_the_same_weights_and_see_the_same_rows():
    """Gains start at 0: before the first update all variants are plain attention."""
    once = replace(TINY, steps=1, evaluations=1)
    losses = {next(iter(train(once, variant, 0))).loss for variant in ("standard", "exact", "lag16")}
    assert len(losses) == 1
    assert next(iter(train(once, "standard", 1))).loss not in losses


@pytest.mark.slow
def test_it_learns():
    settings = replace(TINY, toy=Toy(variables=2, values=4), seq_len=16, lengths=(16,), steps=100, batch=32, lr=5e-3)
    *_, last = train(settings, "exact", 0)
    assert last.accuracy[16] > 0.6, "guessing gives 25%"


@pytest.mark.parametrize("layout", [pytest.param("contiguous", marks=pytest.mark.slow), "zigzag"])
def test_a_ring_trains_as_one_process(layout):
    toy = Toy(variables=2, values=2)  # after a few steps about half of the answers are right
    settings = replace(TINY, toy=toy, lengths=(32,), steps=12, gain=0.3, lr=0.02, answers=64, layout=layout)
    alone = list(train(settings, "exact", 0))
    ring = list(train_over_ranks(replace(settings, cp=2), "exact", 0, threads=1))
    assert [e.step for e in ring] == [6, 12]
    assert alone[-1].accuracy[32] > 0.3
    for a, b in zip(alone, ring, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert b.gains == pytest.approx(a.gains, rel=1e-4)
        assert b.accuracy == pytest.approx(a.accuracy, abs=0.05)  # a tie of two logits may fall the other way


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_a_tiny_run_writes_everything(tmp_path):
    options = ["--steps", 2, "--evaluations", 2, "--batch", 2, "--seeds", "0,1", "--lengths", "32,64", "--answers", 8]
    result = run("--out", tmp_path / "toy", "--variants", "standard,exact,lag8", *options)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "step" in line]
    assert len(lines) == 3 * 2 * 2
    assert re.fullmatch(
        r"lag8, seed 1, step 2/2: loss \d\.\d{3}; right [\d.]+% at 32, [\d.]+% at 64 \(trained\); gain \S+ \S+; \d+ s",
        lines[-1],
    )
    table = list(csv.DictReader((tmp_path / "toy/results.csv").open()))
    assert [(line["variant"], line["seed"], line["step"], line["length"]) for line in table[:2]] == [
        ("standard", "0", "1", "32"),
        ("standard", "0", "1", "64"),
    ]
    saved = json.loads((tmp_path / "toy/results.json").read_text())
    assert len(table) == 2 * len(saved["evaluations"]) == 24
    assert float(table[-1]["accuracy"]) == saved["evaluations"][-1]["accuracy"]["64"]
    assert (tmp_path / "toy/accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "| lag8 | 2 |" in (tmp_path / "toy/results.md").read_text()

    again = run("--out", tmp_path / "toy", *options)
    assert again.exit_code == 64, "measured results are not overwritten"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--variants", "exakt"], "standard, exact or lagN"),
        (["--lengths", "64,100"], "multiple of 8"),
        (["--lengths", "16"], "too few for 4 variables"),
        (["--seeds", "a"], "--seeds"),
        (["--zero-key"], "qk_norm"),
        (["--cp", "5"], "expected 8 or more per rank"),
    ],
)
def test_a_wrong_command_is_refused_before_anything_runs(arguments, words, tmp_path, capfd):
    result = run("--out", tmp_path / "toy", *arguments)
    assert result.exit_code == 64
    assert words in result.output + capfd.readouterr().err
    assert not (tmp_path / "toy").exists()


def test_the_tables_say_what_was_measured():
    settings = replace(TINY, seq_len=64, lengths=(64, 128))

    def evaluation(variant, seed, step, *shares):
        accuracy = dict(zip(settings.lengths, shares, strict=True))
        gains = () if variant == "standard" else (0.5, 0.25)
        return Evaluation(
            variant=variant, seed=seed, step=step, loss=1.0, accuracy=accuracy, gains=gains, seconds=9.0 + seed
        )

    text = render_markdown(
        Experiment(
            settings=settings,
            variants=("standard", "exact"),
            seeds=(0, 1),
            evaluations=(
                evaluation("standard", 0, 2, 0.1, 0.1),
                evaluation("standard", 0, 4, 0.5, 0.2),
                evaluation("standard", 1, 4, 1.0, 0.4),
                evaluation("exact", 0, 2, 0.25, 0.1),
            ),
            command="python -m tools.overwritten_variables --out x",
            machine="a machine",
            date="2026-01-02",
        )
    )
    assert "| standard | 2 | 75.0% (50.0% to 100.0%) | 30.0% (20.0% to 40.0%) | - |" in text
    assert "| exact | 0 | - | - |  |" in text, "an unfinished run is not in the final table"
    assert "| 2 | 10.0% | 25.0% |\n| 4 | 75.0% (50.0% to 100.0%) | - |" in text
    # 4 of 16 writes are of a variable: one of the four is right, the others by luck one time in 16
    assert "Guessing is right 6.2% of the time" in text
    assert "about 30%" in text
    assert "9 to 10 s per run" in text
