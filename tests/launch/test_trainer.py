"""What a user gets from a run besides losses: metrics, evaluations, bf16, asynchronous checkpoints, real text."""

import json

import pytest
import torch

from launch.errors import EXIT_DONE
from launch.metrics import read_metrics
from tests.launch.runs import SEQ_LEN, losses, settings, train_worker, weights, write_corpus
from tests.processes import run_ranks

KEYS = {
    "loss_nats_per_token",
    "gradient_norm",
    "learning_rate",
    "tokens_per_second",
    "tokens_per_second_per_process",
    "step_seconds",
    "exposed_communication_seconds",
    "exposed_communication_fraction",
    "data_wait_seconds",
    "peak_memory_bytes",
    "host_memory_bytes",
    "ring_bytes_sent",
    "mfu_causal",
    "mfu_full",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_metrics_and_evaluations(corpus, tmp_path):
    run = settings(
        corpus,
        tmp_path,
        optim__steps=4,
        evaluate__every_steps=2,
        metrics__peak_tflops=0.1,
        metrics__tensorboard=True,
        parallel__layout="contiguous",
    )
    assert run_ranks(train_worker, 2, [run]) == [[EXIT_DONE]] * 2
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record.keys() >= KEYS
        assert record["tokens_per_second"] == pytest.approx(4 * SEQ_LEN / record["step_seconds"])
        assert record["tokens_per_second_per_process"] == pytest.approx(record["tokens_per_second"] / 2)
        assert 0 < record["exposed_communication_seconds"] < record["step_seconds"]
        assert 0 < record["mfu_causal"] < record["mfu_full"] < 1
        assert record["ring_bytes_sent"] > 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    evaluations = {line["step"]: line["bits_per_byte"] for line in lines if line.get("event") == "evaluation"}
    assert list(evaluations) == [0, 2, 4]  # before, in between, after
    assert evaluations[4] < evaluations[0]
    assert list((tmp_path / "tensorboard").iterdir())


def asked_worker(rank, world_size, run):
    import launch.trainer

    ask, asked = launch.trainer.device_facts, []
    launch.trainer.device_facts = lambda topology: asked.append(ask(topology)) or asked[-1]
    return train_worker(rank, world_size, [run]), len(asked)


def test_the_machines_are_asked_once_what_they_have(corpus, tmp_path):
    run = settings(corpus, tmp_path, optim__steps=1, optim__warmup_steps=0)
    assert run_ranks(asked_worker, 2, run) == [([EXIT_DONE], 1)] * 2


def test_held_out_bits_per_byte_do_not_depend_on_dp_or_cp(corpus, tmp_path):
    found = []
    for number, (world_size, dp) in enumerate([(1, 1), (2, 2), (4, 2)]):
        folder = tmp_path / str(number)
        run = settings(corpus, folder, optim__steps=1, optim__warmup_steps=0, parallel__dp=dp, data__held_out_rows=3)
        assert run_ranks(train_worker, world_size, [run]) == [[EXIT_DONE]] * world_size
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found.append([line["bits_per_byte"] for line in lines if line.get("event") == "evaluation"])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_bf16_stays_near_fp32(corpus, tmp_path, engine):
    runs = [
        settings(
            corpus,
            tmp_path / precision,
            engine__name=engine,
            engine__precision=precision,
            optim__steps=6,
            optim__rows_per_step=2,
        )
        for precision in ("fp32", "bf16")
    ]
    assert run_ranks(train_worker, 2, runs) == [[EXIT_DONE] * 2] * 2
    exact, rounded = (losses(tmp_path / precision) for precision in ("fp32", "bf16"))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=1e-2)


@pytest.mark.slow
def test_asynchronous_checkpoints_hold_the_same_bits(corpus, tmp_path):
    runs = [
        settings(
            corpus,
            tmp_path / str(asynchronous),
            optim__steps=6,
            checkpoint__every_steps=2,
            checkpoint__keep=9,
            checkpoint__save_last=True,
            checkpoint__asynchronous=asynchronous,
        )
        for asynchronous in (False, True)
    ]
    assert run_ranks(train_worker, 2, runs) == [[EXIT_DONE] * 2] * 2
    for step in (2, 4, 6):
        ours, theirs = (weights(tmp_path / str(asynchronous), step) for asynchronous in (True, False))
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.slow
def test_windows_and_full_rows_train(corpus, tmp_path):
    runs = [
        settings(corpus, tmp_path / "window", optim__steps=3, parallel__window=16, parallel__sinks=2),
        settings(corpus, tmp_path / "across", optim__steps=3, data__cross_document_attention=True),
        settings(corpus, tmp_path / "plain", optim__steps=3),
    ]
    assert run_ranks(train_worker, 3, runs) == [[EXIT_DONE] * 3] * 3
    window, across, plain = (losses(tmp_path / name) for name in ("window", "across", "plain"))
    assert window != plain != across  # each option reaches the attention
    alone = [
        settings(corpus, tmp_path / "window1", optim__steps=3, parallel__window=16, parallel__sinks=2),
        settings(corpus, tmp_path / "across1", optim__steps=3, data__cross_document_attention=True),
    ]
    assert run_ranks(train_worker, 1, alone) == [[EXIT_DONE] * 2]
    assert losses(tmp_path / "window1") == pytest.approx(window, rel=1e-5)
    assert losses(tmp_path / "across1") == pytest.approx(across, rel=1e-5)
