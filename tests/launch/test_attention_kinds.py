"""Training with every kind of attention, and with selection: over rings and engines the losses of one process."""

from __future__ import annotations

from typing import Any

import pytest

from launch.errors import EXIT_DONE
from tests.launch.runs import losses, settings, train_worker, write_corpus
from tests.processes import run_ranks

KINDS: dict[str, dict[str, Any]] = {
    "mha": {"kv_heads": 4},
    "mqa": {"kv_heads": 1},
    "gqa": {},
    "mla": {"latent_dim": 12, "rope_dim": 4, "qk_norm": False},
    "tpa": {"query_rank": 3, "key_rank": 2, "value_rank": 2, "qk_norm": False},
    "sas": {"simulated_heads": 8, "simulated_dim": 12, "kernel_size": 3},
}
GUIDED = {
    "selection": True,
    "selection_gain": "learned",
    "selection_gain_start": 0.2,
    "selection_guide": True,
    "selection_head": 1,
}
ENGINES = ({"name": "ddp"}, {"name": "fsdp"}, {"name": "zero", "zero_stage": 3})
FAST = {"mla": "zero", "sas guided": "fsdp"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run(corpus, folder, name, engine, **changes):
    kind, _, guided = name.partition(" ")
    nested = settings(corpus, folder, optim__steps=6, optim__warmup_steps=0, **changes)
    nested["model"] |= {"attention": kind, **KINDS[kind], **(GUIDED if guided else {})}
    return nested | {"engine": {**nested["engine"], **engine}}


def compare(corpus, folder, names_and_engines, world_size, **changes):
    names = sorted({name for name, _ in names_and_engines})
    alone = [run(corpus, folder / "alone" / name, name, ENGINES[0]) for name in names]
    assert run_ranks(train_worker, 1, alone, timeout=300) == [[EXIT_DONE] * len(alone)]
    runs = [
        run(corpus, folder / str(number), name, engine, memory__recompute=number % 2 == 1, **changes)
        for number, (name, engine) in enumerate(names_and_engines)
    ]
    assert run_ranks(train_worker, world_size, runs, timeout=300) == [[EXIT_DONE] * len(runs)] * world_size
    for number, (name, engine) in enumerate(names_and_engines):
        expected, found = losses(folder / "alone" / name), losses(folder / str(number))
        assert expected[-1] < expected[0] - 0.2, name  # it learns, so the comparison means something
        worst = max(abs(a - b) / b for a, b in zip(found, expected, strict=True))
        assert worst <= 2e-5, (name, engine, worst)


@pytest.mark.slow
def test_training_over_a_ring_equals_one_process(corpus, tmp_path):
    engines = {engine["name"]: engine for engine in ENGINES}
    compare(corpus, tmp_path, [(name, engines[engine]) for name, engine in FAST.items()], 2)


@pytest.mark.slow
def test_heads_for_tokens_with_expansion_and_selection(corpus, tmp_path):
    compare(corpus, tmp_path, [("mla guided", ENGINES[1])], 2, parallel__ulysses=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_heads_for_tokens_of_every_kind_crossed_with_a_ring(corpus, tmp_path, kind):
    names = [(f"{kind}{guided}", engine) for guided in ("", " guided") for engine in (ENGINES[1], ENGINES[2])]
    compare(corpus, tmp_path, names, 4, parallel__ulysses=2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, ids=["ddp", "fsdp", "zero3"])
def test_every_kind_in_every_engine(corpus, tmp_path, engine):
    names = [f"{kind}{guided}" for kind in KINDS for guided in ("", " guided")]
    compare(corpus, tmp_path, [(name, engine) for name in names], 3)
