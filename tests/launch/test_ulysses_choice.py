"""`parallel.ulysses: auto`: what was measured decides, else the ring stays, and refused heads never go."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from launch import train, ulysses_choice
from launch.config import Config
from launch.errors import EXIT_DONE
from launch.plan_report import render
from launch.rates import H100, RatesFile
from launch.ulysses_choice import RingFacts, UlyssesChoice, choose_ulysses, ring_facts, with_ulysses
from model.config import ModelConfig, SelectionConfig, preset
from ringattn.teams import heads_problem
from tests.launch.runs import losses, settings, write_corpus
from tests.processes import run_ranks

GPUS = RingFacts(gpus=("NVIDIA H100 80GB HBM3",), hosts=1, documents=3.0)
EQUAL, GROUPED = {"heads": 16, "kv_heads": 16}, {"heads": 32, "kv_heads": 8}


def config(seq_len: int = 16_384, **sections: Any) -> Config:
    base = {"run": {"dir": "unused"}, "data": {"seq_len": seq_len}, "optim": {"steps": 1}}
    base["parallel"] = {"ulysses": "auto", **sections.pop("parallel", {})}
    base["engine"] = {"precision": "bf16", **sections.pop("engine", {})}
    base["data"] |= sections.pop("data", {})
    return Config(**base, **sections)


def shape(heads: int = 16, kv_heads: int = 16, head_dim: int = 128, **changes: Any) -> ModelConfig:
    return preset("test", heads=heads, kv_heads=kv_heads, head_dim=head_dim, **changes)


def pick(
    settings: Config | None = None,
    model: ModelConfig | None = None,
    cp: int = 4,
    facts: RingFacts = GPUS,
    **changes: Any,
) -> UlyssesChoice:
    rates = changes.pop("rates", None)
    return choose_ulysses(settings or config(), model or shape(), cp, replace(facts, **changes), rates)


def rates_of(tmp_path: Path, *lines: dict[str, Any], **changes: Any) -> RatesFile:
    """The shipped file with other lines."""
    found = yaml.safe_load(H100.read_text())
    found["ulysses"] = {"gpus": ["H100", "H200"], "lines": list(lines), **changes}
    path = tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump(found))
    return RatesFile(path)


def line(fastest: dict[int, int], **changes: Any) -> dict[str, Any]:
    common = {"ranks": 4, "heads": 16, "kv_heads": 16, "head_dim": 128, "documents": 2}
    return {**common, "fastest": fastest, **changes}


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> RatesFile:
    """As if an exchange of heads had been faster in rows of 2 and of 4 documents."""
    lines = [
        line({7400: 4, 32768: 1}),
        line({6600: 4, 32768: 1}, **GROUPED),
        line({8192: 4}, documents=4),
        line({7300: 4, 8192: 1}, documents=4, **GROUPED),
    ]
    return rates_of(tmp_path_factory.mktemp("rates"), *lines)


@pytest.mark.parametrize(
    ("tokens", "heads", "documents", "degree"),
    [  # tokens per rank; measured with 2 and 4 documents
        (2048, EQUAL, 3.0, 4),
        (7400, EQUAL, 3.0, 4),
        (7401, EQUAL, 3.0, 1),
        (8192, EQUAL, 4.4, 4),
        (8193, EQUAL, 4.4, 1),
        (32_768, EQUAL, 3.0, 1),
        (65_536, EQUAL, 3.0, 1),  # longer than anything measured
        (6600, GROUPED, 3.4, 4),
        (6601, GROUPED, 3.4, 1),
        (7300, GROUPED, 4.4, 4),
        (7301, GROUPED, 4.4, 1),
        (4096, EQUAL, 1.4, 1),  # most rows are one document
        (4096, EQUAL, 1.6, 4),
        (4096, EQUAL, 4.6, 1),  # five documents: nobody measured it
        (7000, {"heads": 16, "kv_heads": 8}, 3.0, 4),  # 16/16 is nearer than 32/8, and holds longer
        (7000, {"heads": 24, "kv_heads": 8}, 3.0, 1),  # wider than 16/16, so as 32/8
        (4096, {"heads": 24, "kv_heads": 8}, 3.0, 4),
        (4096, {"heads": 16, "kv_heads": 16, "head_dim": 64}, 3.0, 4),
        (4096, {"heads": 40, "kv_heads": 8}, 3.0, 1),  # more heads than were measured
        (4096, {"heads": 32, "kv_heads": 16}, 3.0, 1),  # more key/value heads with them
        (4096, {"heads": 8, "kv_heads": 2}, 3.0, 4),  # copies of key/value heads travel
    ],
)
def test_what_was_measured_decides(
    tokens: int, heads: dict[str, int], documents: float, degree: int, rates: RatesFile
) -> None:
    found = pick(config(4 * tokens), shape(**heads), documents=documents, rates=rates)
    assert found.degree == degree, found.reason
    assert found.line().startswith(f"{degree} (auto): ")
    if degree == 4:
        assert f"{tokens:,} tokens per rank in rows of about {round(documents)} documents: exch" in found.reason


@pytest.mark.parametrize("documents", [1.0, 3.0, 4.0, None])
@pytest.mark.parametrize("tokens", [100, 2048, 8192])
@pytest.mark.parametrize("heads", [EQUAL, GROUPED])
def test_on_the_gpus_that_were_measured_the_ring_stays(
    tokens: int, heads: dict[str, int], documents: float | None
) -> None:
    found = pick(config(4 * tokens), shape(**heads), documents=documents)
    assert found.degree == 1
    assert f"no exchange of heads was measured to be 10% faster at {tokens:,} tokens per rank" in found.reason


def test_one_document_by_configuration_keeps_the_ring() -> None:
    found = pick(config(data={"cross_document_attention": True}))
    assert found.degree == 1
    assert "rows of one document" in found.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpus": ()}, "nothing was measured on CPUs"),
        ({"gpus": ("NVIDIA B200",)}, "nothing was measured on NVIDIA B200, only on H100 and H200"),
        ({"gpus": ("NVIDIA A100", "NVIDIA H100")}, "nothing was measured on NVIDIA A100, NVIDIA H100, only on H100"),
        ({"hosts": 2}, "nothing was measured in rings over 2 hosts"),
        ({"settings": config(engine={"precision": "fp32"})}, "nothing was measured in fp32"),
        ({"settings": config(parallel={"layout": "striped"})}, "nothing was measured in layout striped"),
        ({"settings": config(parallel={"window": 512})}, "nothing was measured with a window"),
        ({"settings": config(parallel={"kernel": "flash"})}, "nothing was measured with kernel flash"),
        ({"settings": config(parallel={"transport": "p2p"})}, "nothing was measured against transport p2p"),
        ({"cp": 8}, "nothing was measured for 8 ranks and 16/16 heads of 128"),
        ({"cp": 1}, "one process holds the whole row"),
        ({"model": shape(heads=6, kv_heads=2)}, "degree 4 needs query heads that divide by it"),
        ({"model": shape(heads=6, kv_heads=2), "documents": None}, "degree 4 needs query heads that divide by it"),
        ({"model": shape(attention="sas", simulated_heads=16, simulated_dim=32)}, "with attention sas, whose expanded"),
        ({"model": shape(attention="mla", latent_dim=8, rope_dim=8, qk_norm=False)}, "with attention mla"),
        ({"documents": None}, "4 instead if rows hold 2 to 4 documents, which is not known before the data is read"),
    ],
)
def test_what_nobody_measured_keeps_the_ring(changes: dict[str, Any], reason: str, rates: RatesFile) -> None:
    assert pick(rates=rates).degree == 4
    found = pick(**changes, rates=rates)
    assert found.degree == 1
    assert reason in found.reason


def test_selection_keeps_the_ring(rates: RatesFile) -> None:
    found = pick(model=shape(selection=SelectionConfig()), rates=rates)
    assert (found.degree, "with selection, whose votes" in found.reason) == (1, True)


def test_no_documents_are_promised_where_none_would_help(rates: RatesFile) -> None:
    found = pick(config(65_536), documents=None, rates=rates)
    assert found.reason == "no exchange of heads was measured to be 10% faster at 16,384 tokens per rank"


def test_counts_of_documents_between_two_lines_take_what_both_say(tmp_path: Path) -> None:
    rates = rates_of(tmp_path, line({8000: 4, 32_000: 1}), line({5000: 4, 32_000: 1}, documents=8))
    degrees = [pick(config(4 * 6000), rates=rates, documents=count).degree for count in (2.0, 3.0, 8.0, 9.0)]
    assert degrees == [4, 1, 1, 1]
    assert pick(config(4 * 4000), rates=rates, documents=5.0).degree == 4
    assert "fastest up to 5,000" in pick(config(4 * 4000), rates=rates, documents=5.0).reason


def test_the_degree_is_that_of_the_length(tmp_path: Path) -> None:
    rates = rates_of(tmp_path, line({2000: 8, 6000: 2, 9000: 1, 20_000: 4}, ranks=8))
    found = [
        pick(config(8 * tokens), cp=8, rates=rates, documents=2.0).degree for tokens in (100, 2001, 7000, 9001, 20_001)
    ]
    assert found == [8, 2, 1, 4, 1]


def test_of_two_measured_degrees_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    wide, narrow = line({10**6: 2}, heads=32), line({10**6: 4})
    found = [
        pick(model=shape(heads, kv_heads=2), rates=rates_of(tmp_path, wide, narrow), documents=2.0).degree
        for heads in (8, 6)
    ]
    assert found == [4, 2]


def test_copies_of_key_value_heads_count(tmp_path: Path) -> None:
    rates = rates_of(tmp_path, line({10**6: 4}, kv_heads=2))
    degrees = [
        pick(model=shape(*heads), rates=rates, documents=2.0).degree
        for heads in ((16, 1, 128), (16, 4, 128), (16, 8, 128), (8, 1, 256))
    ]
    assert degrees == [4, 4, 1, 1]  # four key/value heads travel for two or for one; eight, or wider ones, are more


def test_no_refused_heads_are_ever_picked(tmp_path: Path) -> None:
    wide = [line({10**6: degree}, ranks=size, heads=99, kv_heads=99) for size in (2, 4, 6, 8) for degree in (2, size)]
    rates = rates_of(tmp_path, *wide)
    picked = 0
    for heads, kv_heads, size in product((1, 4, 6, 8, 24), (1, 2, 3, 8), (2, 4, 6, 8)):
        if heads % kv_heads == 0:
            found = pick(model=shape(heads, kv_heads, 32), cp=size, rates=rates, documents=2.0)
            assert heads_problem(heads, kv_heads, size, found.degree) is None
            picked += found.degree > 1
    assert picked > 10


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"lines": [{"ranks": 4}]}, r"ulysses.lines\[0\]: expected ranks, heads, .*, fastest, got \{'ranks': 4\}"),
        ({"lines": [line({100: 4}, heads=0)]}, "expected whole numbers above 0"),
        ({"lines": [line({})]}, "fastest: {tokens per rank: degree}"),
        (
            {"lines": [line({100: 1}), line({100: 3})]},
            r"lines\[1\]: expected degrees that divide 4 ranks, got {100: 3}",
        ),
        ({"lines": 3}, "ulysses.lines: expected list, got 3"),
        ({"gpus": 3}, "ulysses.gpus: expected list, got 3"),
        ({"gpus": []}, r"ulysses.gpus: expected names of GPUs, such as \[H100\], got \[\]"),
        ({"gpus": ["H100", ""]}, r"expected names of GPUs, .*, got \['H100', ''\]"),
    ],
)
def test_a_wrong_file_of_rates_says_where(bad: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rates_of(tmp_path, **bad).ulysses()


@pytest.mark.parametrize(
    ("documents", "tokens", "cut", "expected"),
    [(50, 1000, 7, 1 + 64 * 50 / 1000), (50, 1000, None, None), (0, 0, 0, None)],
)
def test_the_documents_of_a_row_are_those_of_the_data(
    documents: int, tokens: int, cut: int | None, expected: float | None
) -> None:
    everyone = [("a", "H100"), ("a", "H100"), ("b", "H100"), ("b", "H200")]
    report = SimpleNamespace(training_documents=documents, training_tokens=tokens, cut_documents=cut)
    for cp, hosts in ((2, 1), (4, 2)):
        topology = SimpleNamespace(cp=cp, device=SimpleNamespace(type="cpu"), gather_objects=lambda value: everyone)
        found = ring_facts(topology, config(64).data, report)  # type: ignore[arg-type]
        assert found == RingFacts(gpus=("H100", "H200"), hosts=hosts, documents=expected)


def test_the_plan_says_which_degree_and_why() -> None:
    told = render(config(engine={"precision": "fp32"}, model={"heads": 8, "kv_heads": 8}), 4)
    assert "parallel.ulysses                  1 (auto): nothing was measured in fp32" in told
    assert "hops per layer" in told
    assert "(auto)" not in render(config(parallel={"ulysses": 1}), 4)


def test_a_chosen_degree_is_planned_for(monkeypatch: pytest.MonkeyPatch, rates: RatesFile) -> None:
    monkeypatch.setattr("launch.plan_report.planned_facts", lambda config, cp: GPUS)
    monkeypatch.setattr("launch.plan_report.choose_ulysses", partial(choose_ulysses, rates=rates))
    told = render(config(model={"heads": 16, "kv_heads": 16}), 4)
    assert "4 (auto): 4,096 tokens per rank in rows of about 3 documents: exchanging" in told
    assert "teams of 4 ranks; no ring is left" in told


def chosen_worker(rank: int, world_size: int, runs: list[dict[str, Any]]) -> tuple[list[int], str]:
    """Train on CPUs; in the second run as if degree 2 had been measured there."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        found = [train.run_worker(Config(**runs[0]))]
        ulysses_choice.choose_ulysses = lambda *arguments: UlyssesChoice(degree=2, reason="planted")
        found.append(train.run_worker(Config(**runs[1])))
    return found, told.getvalue()


def test_the_trainer_takes_what_is_chosen(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, documents=20)
    few = {"optim__steps": 1, "optim__rows_per_step": 1, "optim__warmup_steps": 0, "data__held_out_rows": 0}
    runs = [settings(corpus, tmp_path / name, **few, parallel__ulysses="auto") for name in ("cpu", "planted")]
    (statuses, told), (others, nothing) = run_ranks(chosen_worker, 2, runs)
    assert (statuses, others, nothing) == ([EXIT_DONE] * 2, [EXIT_DONE] * 2, "")
    assert losses(tmp_path / "planted") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-5)
    for line in (
        "parallel.ulysses: 1 (auto): nothing was measured on CPUs",
        "ring: p2p",
        "parallel.ulysses: 2 (auto): planted",
        "heads for tokens: ulysses of degree 2",
    ):
        assert told.count(line) == 1


def test_the_default_stays_one() -> None:
    plain = Config(run={"dir": "unused"}, data={"seq_len": 64}, optim={"steps": 1})  # type: ignore[arg-type]
    assert plain.parallel.ulysses == 1
    assert with_ulysses(config(), UlyssesChoice(degree=2, reason="")).parallel.ulysses == 2
