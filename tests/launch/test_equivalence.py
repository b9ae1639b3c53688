"""One configuration, every way of spreading it over processes: the same losses."""

import itertools

import pytest

from launch.errors import EXIT_DONE
from launch.metrics import read_metrics
from tests.launch.runs import losses, settings, train_worker, write_corpus
from tests.processes import run_ranks

LAYOUTS = ("contiguous", "zigzag", "striped")
ENGINES = ({"name": "ddp"}, {"name": "fsdp"}, *({"name": "zero", "zero_stage": stage} for stage in range(4)))

FAST_ENGINES = (ENGINES[1], ENGINES[3], ENGINES[5])  # fsdp, zero 1 and 3; stages 0 and 2 are in the slow table


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Losses of 20 steps in one process: reference kernel, one document per row visible to itself only."""
    folder = tmp_path_factory.mktemp("alone")
    run = settings(corpus, folder, parallel__kernel="reference")
    assert run_ranks(train_worker, 1, [run]) == [[EXIT_DONE]]
    found = losses(folder)
    assert len(found) == 20
    assert found[-1] < found[0] - 0.5  # it learns, so the comparison means something
    return found


FEW = {"optim__steps": 5, "optim__rows_per_step": 2}


@pytest.fixture(scope="module")
def few_alone(corpus, tmp_path_factory):
    """Of few and small steps, for the fast tests."""
    folder = tmp_path_factory.mktemp("few")
    run = settings(corpus, folder, parallel__kernel="reference", **FEW)
    assert run_ranks(train_worker, 1, [run]) == [[EXIT_DONE]]
    found = losses(folder)
    assert found[-1] < found[0] - 0.05
    return found


def compare(corpus, tmp_path, alone, world_size, variants):
    runs = [
        settings(corpus, tmp_path / str(number), parallel__layout=layout, parallel__dp=dp, **extra)
        | {"engine": dict(engine)}
        for number, (layout, engine, dp, extra) in enumerate(variants)
    ]
    for statuses in run_ranks(train_worker, world_size, runs, timeout=300):
        assert statuses == [EXIT_DONE] * len(runs)
    for number, variant in enumerate(variants):
        found = losses(tmp_path / str(number))
        worst = max(abs(a - b) / abs(b) for a, b in zip(found, alone, strict=True))
        assert worst <= 1e-5, (world_size, variant, worst)


@pytest.mark.parametrize("cp_size", [pytest.param(size, marks=pytest.mark.slow) for size in (1, 2, 3, 4)])
def test_every_layout_gives_the_losses_of_one_process(corpus, tmp_path, alone, cp_size):
    layouts = ("zigzag",) if cp_size in (1, 4) else LAYOUTS  # all of them for all sizes in the slow table below
    compare(corpus, tmp_path, alone, cp_size, [(layout, ENGINES[0], 1, {}) for layout in layouts])


def test_every_engine_gives_the_losses_of_one_process(corpus, tmp_path, few_alone):
    compare(corpus, tmp_path, few_alone, 2, [("zigzag", engine, 1, FEW) for engine in FAST_ENGINES])


@pytest.mark.slow
def test_dp_times_cp_and_recompute(corpus, tmp_path, alone):
    variants = [
        ("zigzag", ENGINES[0], 2, {}),
        ("striped", ENGINES[1], 2, {}),
        ("zigzag", ENGINES[1], 2, {"memory__recompute": True}),
    ]
    compare(corpus, tmp_path, alone, 4, variants)


@pytest.mark.parametrize("cp_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_heads_for_tokens_give_the_losses_of_one_process(corpus, tmp_path, few_alone, cp_size):
    """Ulysses in the place of the ring, and teams of two in a ring of two."""
    compare(corpus, tmp_path, few_alone, cp_size, [("zigzag", ENGINES[0], 1, {**FEW, "parallel__ulysses": 2})])
    sent = {record["ring_bytes_sent"] for record in read_metrics(tmp_path / "0" / "metrics.jsonl")}
    # In two layers and two rows each token's half of the heads of q, k, v and out, there and back.
    assert sent == {2 * 2 * 101 * (2 * 16 + 1 * 16) * 4} if cp_size == 2 else min(sent) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "dp", "degree"), [(2, 1, 2), (4, 1, 2), (4, 1, 4), (4, 2, 2)])
def test_heads_for_tokens_in_every_layout_and_engine(corpus, tmp_path, alone, world_size, dp, degree):
    ways = [
        *((engine, False) for engine in FAST_ENGINES),
        ({"name": "ddp"}, True),
        ({"name": "fsdp"}, "keep_attention"),
    ]
    table = [*((layout, ENGINES[0], False) for layout in LAYOUTS), *(("zigzag", *way) for way in ways)]
    variants = [
        (layout, engine, dp, {"parallel__ulysses": degree, "memory__recompute": way}) for layout, engine, way in table
    ]
    compare(corpus, tmp_path, alone, world_size, variants)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_the_whole_table(corpus, tmp_path, alone, world_size):
    compare(corpus, tmp_path, alone, world_size, [(*pair, 1, {}) for pair in itertools.product(LAYOUTS, ENGINES)])


def test_the_comparison_can_fail(corpus, tmp_path, few_alone):
    """A learning rate that is off by a third of a percent is seen."""
    with pytest.raises(AssertionError, match=r"'optim__lr': 0.00301"):
        compare(corpus, tmp_path, few_alone, 2, [("zigzag", ENGINES[0], 1, {**FEW, "optim__lr": 3.01e-3})])
