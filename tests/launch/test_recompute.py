"""memory.recompute=keep_attention through whole runs: the losses of a run that keeps everything, in fewer bytes."""

import pytest

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
