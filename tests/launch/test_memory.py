"""Memory settings through whole runs: the losses of a run that keeps everything; keep_attention sends fewer bytes."""

import pytest

import ringattn
from launch.errors import EXIT_DONE
from launch.metrics import read_metrics
from tests.launch.runs import losses, settings, train_worker, write_corpus
from tests.processes import run_ranks

FEW = {"optim__steps": 3, "optim__rows_per_step": 2, "optim__warmup_steps": 0}


def compare(tmp_path, engines):
    corpus = write_corpus(tmp_path)
    ways = [({"name": "ddp"}, False), *((engine, way) for engine in engines for way in (True, "keep_attention"))]
    runs = [
        settings(corpus, tmp_path / str(number), **FEW) | {"engine": engine, "memory": {"recompute": way}}
        for number, (engine, way) in enumerate(ways)
    ]
    assert run_ranks(train_worker, 2, runs, timeout=300) == [[EXIT_DONE] * len(runs)] * 2
    whole = losses(tmp_path / "0")
    sent = []
    for number in range(len(runs)):
        assert losses(tmp_path / str(number)) == pytest.approx(whole, rel=1e-6)
        records = read_metrics(tmp_path / str(number) / "metrics.jsonl")
        sent.append([record["ring_bytes_sent"] for record in records if "ring_bytes_sent" in record])
    assert sent[0] == sent[2] != sent[1]  # whole, keep_attention, all again
    assert sent[1::2] == [sent[1]] * len(engines)
    assert sent[2::2] == [sent[2]] * len(engines)


@pytest.mark.slow
def test_every_engine(tmp_path):
    compare(tmp_path, [{"name": "ddp"}, {"name": "fsdp"}, {"name": "zero", "zero_stage": 3}])


WAYS = [
    {"tile": 13},
    {"recompute": True, "offload": "inputs", "tile": 64},
    {"recompute": "keep_attention", "keep_layers": 1, "offload": "all", "tile": 7},
]


# Tile, tokens, layout, recompute: the ranks of two have different numbers of tiles.
UNEVEN = [(5, 101, "zigzag", True), (1, 101, "striped", False), (9, 109, "contiguous", False)]


def compare_ways(tmp_path, world_size, runs, tolerance):
    """`runs`: settings beside the usual ones, the first is what the others are to be equal to."""
    corpus = write_corpus(tmp_path)
    nested = []
    for number, sections in enumerate(runs):
        run = settings(corpus, tmp_path / str(number), **FEW)
        nested.append({**run, **{name: {**run.get(name, {}), **keys} for name, keys in sections.items()}})
    assert run_ranks(train_worker, world_size, nested, timeout=300) == [[EXIT_DONE] * len(runs)] * world_size
    for number in range(1, len(runs)):
        assert losses(tmp_path / str(number)) == pytest.approx(losses(tmp_path / "0"), rel=tolerance), runs[number]


def test_tiles_offload_and_host_optimizer(tmp_path):
    memory = {**WAYS[2], "optimizer": "host"}
    compare_ways(tmp_path, 2, [{}, {"engine": {"name": "fsdp"}, "memory": memory}], 1e-6)


def compare_uneven(tmp_path, world_size, engine, case):
    tile, seq_len, layout, recompute = case
    plan = ringattn.Plan(seq_len, 2, layout=layout)
    assert len({-(-plan.shard_len(rank) // tile) for rank in range(2)}) == 2, "equally many tiles would show nothing"
    # short limits: ranks that run different collectives wait for each other until then
    common = {"data": {"seq_len": seq_len}, "parallel": {"layout": layout, "setup_timeout_s": 15, "hop_timeout_s": 15}}
    tiled = {**common, "engine": engine, "memory": {"tile": tile, "recompute": recompute}}
    compare_ways(tmp_path, world_size, [common, tiled], 1e-6)


def test_ranks_with_different_numbers_of_tiles(tmp_path):
    compare_uneven(tmp_path, 2, {"name": "zero", "zero_stage": 3}, UNEVEN[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", UNEVEN, ids=str)
@pytest.mark.parametrize("engine", [{"name": "fsdp"}, {"name": "zero", "zero_stage": 3}], ids=str)
@pytest.mark.parametrize("world_size", [2, 3])
def test_different_numbers_of_tiles_in_every_layout(tmp_path, world_size, engine, case):
    compare_uneven(tmp_path, world_size, engine, case)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_engine_and_way(tmp_path, world_size):
    engines = [{"name": "ddp"}, {"name": "fsdp"}, *({"name": "zero", "zero_stage": stage} for stage in (1, 2, 3))]
    runs = [{"engine": engine, "memory": way} for engine in engines for way in WAYS]
    compare_ways(tmp_path, world_size, [{}, *runs], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"name": "ddp"}, {"name": "fsdp"}, {"name": "zero", "zero_stage": 3}], ids=str)
def test_in_bf16(tmp_path, engine):
    engine = {**engine, "precision": "bf16"}
    # sums over tiles are not rounded in between, so they differ a little from those of one product
    compare_ways(tmp_path, 2, [{"engine": engine}, *({"engine": engine, "memory": way} for way in WAYS)], 2e-3)
