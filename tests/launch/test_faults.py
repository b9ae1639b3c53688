"""What breaks a run, done to real processes: kills in a hop, signals, NaN, full disks, damaged checkpoints.

Faults are planted by replacing methods inside the worker processes; the product has no switch for them. The numbers in
the names are the rows of the fault matrix in docs/failures.md.
"""

import contextlib
import io
import os
import random
import re
import resource
import shutil
import signal
import time

import pytest
import torch

from launch.errors import (
    EXIT_BUG,
    EXIT_CHECKPOINT,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DONE,
    EXIT_PEER,
    EXIT_PREEMPTED,
    EXIT_WRITE,
)
from launch.runlock import RunLock
from launch.status import read_status
from tests.launch.runs import STEPS, faulty_worker, losses, short_run, train_worker, weights, write_corpus
from tests.processes import run_ranks


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def clean(corpus, tmp_path_factory):
    """An uninterrupted run of two processes: its folder."""
    folder = tmp_path_factory.mktemp("clean")
    assert run_ranks(train_worker, 2, [short_run(corpus, folder)]) == [[EXIT_DONE]] * 2
    return folder


def assert_same_bits(run_dir, clean):
    ours, theirs = weights(run_dir, STEPS), weights(clean, STEPS)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert losses(run_dir) == losses(clean)


def kill_in_hop(rank, victim, step, where):
    """SIGKILL `victim` in the ring's exchange called `where`, at the given step."""
    from launch.steps import StepRunner
    from ringattn.transport.p2p import P2PTransport

    seen = {"step": 0}
    train, post = StepRunner.train, P2PTransport.post

    def counting_train(self, *arguments, **options):
        seen["step"] += 1
        return train(self, *arguments, **options)

    def deadly_post(self, send, send_to, receive, receive_from, label, plan):
        if seen["step"] == step and label.startswith(where):
            seen["at"] = time.monotonic()
            if rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
        return post(self, send, send_to, receive, receive_from, label, plan)

    StepRunner.train, P2PTransport.post = counting_train, deadly_post
    return seen


@pytest.mark.parametrize("where", [pytest.param("forward hop 1", marks=pytest.mark.slow), "backward hop 1"])
def test_row_1_kill_in_a_hop_then_the_same_command_gives_the_same_bits(corpus, tmp_path, clean, where):
    run = short_run(corpus, tmp_path)
    step = random.Random(where).randint(4, STEPS)  # after the first checkpoint
    outcomes = run_ranks(faulty_worker, 2, run, kill_in_hop, 1, step, where, check=False)
    assert outcomes[1].exitcode == -signal.SIGKILL
    status, noted = outcomes[0].value
    assert status == EXIT_PEER
    assert noted["ended"] - noted["at"] < 2.0
    told = read_status(tmp_path)
    assert told.exit_status == EXIT_PEER
    assert f"rank 0 of 2 lost a peer in step {step}" in told.message
    assert re.search(r"ring rank 0, layer [12], (forward|backward) hop 1 of 1", told.message)
    assert run_ranks(train_worker, 2, [run]) == [[EXIT_DONE]] * 2
    assert_same_bits(tmp_path, clean)


def signal_at_step(rank, victim, step, number):
    from launch.steps import StepRunner

    train, seen = StepRunner.train, {"step": 0}

    def signalled_train(self, *arguments, **options):
        seen["step"] += 1
        if seen["step"] == step and rank == victim:
            os.kill(os.getpid(), number)
        return train(self, *arguments, **options)

    StepRunner.train = signalled_train


def test_row_26_sigterm_to_one_rank_finishes_the_step_saves_and_resumes_to_the_same_bits(corpus, tmp_path, clean):
    run = short_run(corpus, tmp_path, checkpoint__every_steps=0)
    outcomes = run_ranks(faulty_worker, 2, run, signal_at_step, 1, 5, signal.SIGTERM)
    assert [status for status, _ in outcomes] == [EXIT_PREEMPTED] * 2
    told = read_status(tmp_path)
    assert (told.outcome, told.exit_status, told.step) == ("preempted", EXIT_PREEMPTED, 5)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]
    assert run_ranks(train_worker, 2, [run]) == [[EXIT_DONE]] * 2
    assert_same_bits(tmp_path, clean)


def preempted_run(corpus, folder):
    run = short_run(corpus, folder)
    outcomes = run_ranks(faulty_worker, 2, run, signal_at_step, 0, 5, signal.SIGTERM)
    assert [status for status, _ in outcomes] == [EXIT_PREEMPTED] * 2
    return run


@pytest.fixture(scope="module")
def stopped_once(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    preempted_run(corpus, folder)
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """The folder of a run that was stopped after step 5, a copy for each test."""
    return shutil.copytree(stopped_once, tmp_path / "stopped")


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (3, {"parallel__layout": "contiguous"}),
        pytest.param(4, {"parallel__dp": 2, "engine__name": "fsdp", "parallel__ulysses": 2}, marks=pytest.mark.slow),
        pytest.param(1, {"engine__name": "zero", "engine__zero_stage": 2}, marks=pytest.mark.slow),
        pytest.param(4, {"engine__name": "zero", "engine__zero_stage": 3}, marks=pytest.mark.slow),
    ],
)
def test_rows_12_and_13_resume_under_another_cp_dp_layout_engine_and_degree(
    corpus, stopped, clean, world_size, changes
):
    run = short_run(corpus, stopped, **changes)
    assert run_ranks(train_worker, world_size, [run]) == [[EXIT_DONE]] * world_size
    for found, expected in zip(losses(stopped), losses(clean), strict=True):
        assert abs(found - expected) <= 1e-5 * abs(expected)


def test_row_12_a_world_that_does_not_fit_is_refused_before_the_first_collective(corpus, tmp_path, capfd):
    run = short_run(corpus, tmp_path, parallel__cp=2, parallel__dp=2)
    assert run_ranks(train_worker, 3, [run]) == [[EXIT_CONFIG]] * 3


def broken_row(rank, victim):
    from launch.data.corpus import TokenCorpus
    from launch.errors import DataError

    row = TokenCorpus.row

    def failing(self, index, chunks=None):
        if rank == victim and index >= 8:
            raise DataError("shard 3, record 17 cannot be read")
        return row(self, index, chunks)

    TokenCorpus.row = failing


def test_a_row_that_one_rank_cannot_read_is_an_error_on_all(corpus, tmp_path):
    outcomes = run_ranks(faulty_worker, 3, short_run(corpus, tmp_path), broken_row, 2)
    assert [status for status, _ in outcomes] == [EXIT_DATA] * 3
    assert "rank 2: shard 3, record 17 cannot be read" in read_status(tmp_path).message


def another_order(rank, victim):
    from launch.data.corpus import TokenCorpus

    start = TokenCorpus.__init__

    def shuffled_otherwise(self, config, *, seed, **rest):
        start(self, config, seed=seed + (rank == victim), **rest)

    TokenCorpus.__init__ = shuffled_otherwise


def test_ranks_of_a_ring_that_read_other_rows_notice_it_though_each_reads_its_own_part(corpus, tmp_path):
    outcomes = run_ranks(faulty_worker, 2, short_run(corpus, tmp_path), another_order, 1)
    assert [status for status, _ in outcomes] == [EXIT_DATA] * 2
    assert "the ranks of ring 0 read different rows for the step at row 0" in read_status(tmp_path).message


def broken_forward(rank, victim):
    from launch.steps import StepRunner

    forward = StepRunner._forward

    def failing(self, row, labels, attention):
        if rank == victim and torch.is_grad_enabled():
            raise ZeroDivisionError("planted")
        return forward(self, row, labels, attention)

    StepRunner._forward = failing


def test_a_bug_on_one_rank_reaches_the_status_of_the_run(corpus, tmp_path):
    outcomes = run_ranks(faulty_worker, 2, short_run(corpus, tmp_path), broken_forward, 1, check=False)
    assert [outcome.value[0] for outcome in outcomes] == [EXIT_BUG] * 2  # the leader has it from rank 1
    told = read_status(tmp_path)
    assert told.exit_status == EXIT_BUG
    assert told.message == "rank 1: planted"


def sleep_at_step(rank, victim, step, seconds):
    from launch.steps import StepRunner

    train, seen = StepRunner.train, {"step": 0}

    def sleeping_train(self, *arguments, **options):
        seen["step"] += 1
        seen["at"] = time.monotonic()
        if seen["step"] == step and rank == victim:
            time.sleep(seconds)
        return train(self, *arguments, **options)

    StepRunner.train = sleeping_train
    return seen


def test_row_2_a_silent_rank_is_reported_at_the_hop_timeout(corpus, tmp_path):
    run = short_run(corpus, tmp_path, parallel__hop_timeout_s=1.0)
    status, noted = run_ranks(faulty_worker, 2, run, sleep_at_step, 1, 4, 5.0, check=False)[0].value
    assert status == EXIT_PEER
    assert 0.9 < noted["ended"] - noted["at"] < 3.0
    assert "in step 4" in read_status(tmp_path).message


@pytest.mark.slow
def test_a_kill_before_the_first_checkpoint_leaves_no_records_twice(corpus, tmp_path, clean):
    run = short_run(corpus, tmp_path)
    outcomes = run_ranks(faulty_worker, 2, run, kill_in_hop, 1, 2, "forward hop 1", check=False)
    assert outcomes[0].value[0] == EXIT_PEER
    assert run_ranks(train_worker, 2, [run]) == [[EXIT_DONE]] * 2
    assert_same_bits(tmp_path, clean)


def full_disk(rank, victim):
    if rank == victim:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_row_22_a_full_disk_keeps_the_old_checkpoint_and_ends_after_the_allowed_failures(corpus, tmp_path):
    changes = {"engine__name": "fsdp", "checkpoint__every_steps": 2, "checkpoint__max_failed_saves": 1}
    first = short_run(corpus, tmp_path, **changes)
    outcomes = run_ranks(faulty_worker, 2, first, signal_at_step, 0, 2, signal.SIGTERM)
    assert [status for status, _ in outcomes] == [EXIT_PREEMPTED] * 2
    outcomes = run_ranks(faulty_worker, 2, first, full_disk, 1)
    assert [status for status, _ in outcomes] == [EXIT_WRITE] * 2
    told = read_status(tmp_path)
    assert told.exit_status == EXIT_WRITE
    assert str(tmp_path) in told.message
    assert told.step == 6  # the save at step 4 failed and was allowed to, the one at 6 was not
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002"]
    assert run_ranks(train_worker, 2, [first]) == [[EXIT_DONE]] * 2


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_rows_7_and_9_a_damaged_checkpoint_is_refused_and_the_one_before_used(corpus, stopped, clean, capfd):
    run = short_run(corpus, stopped)
    folders = sorted((stopped / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000003", "step-000005"]
    flip_a_bit(next(folders[1].glob("*.distcp")))
    assert run_ranks(train_worker, 2, [run]) == [[EXIT_DONE]] * 2
    assert_same_bits(stopped, clean)
    for folder in (stopped / "checkpoints").glob("step-*"):
        if folder != folders[1]:  # that one is damaged already
            flip_a_bit(next(folder.glob("*.distcp")))
    assert run_ranks(train_worker, 2, [run]) == [[EXIT_CHECKPOINT]] * 2
    assert read_status(stopped).exit_status == EXIT_CHECKPOINT


@pytest.mark.slow
def test_row_11_changed_data_is_refused_unless_accepted(corpus, tmp_path):
    own = write_corpus(tmp_path)
    run = preempted_run(own, tmp_path / "run")
    own.write_text(own.read_text() + '{"text": "one more document"}\n')
    assert run_ranks(train_worker, 2, [run]) == [[EXIT_DATA]] * 2
    message = read_status(tmp_path / "run").message
    assert "fingerprint" in message
    assert "data.accept_changed" in message
    run["data"]["accept_changed"] = True
    assert run_ranks(train_worker, 2, [run]) == [[EXIT_DONE]] * 2


def test_another_model_is_refused_with_a_table(corpus, stopped):
    run = short_run(corpus, stopped, model__ffn_dim=64)
    assert run_ranks(train_worker, 2, [run]) == [[EXIT_CHECKPOINT]] * 2
    assert "ffn_dim: checkpoint 48, now 64" in read_status(stopped).message


def test_row_25_a_second_run_in_the_folder_is_refused_by_name_of_the_holder(corpus, tmp_path, capfd):
    with RunLock(tmp_path):
        assert run_ranks(train_worker, 2, [short_run(corpus, tmp_path)]) == [[EXIT_WRITE]] * 2
    assert read_status(tmp_path) is None  # the status is the holder's


def talking_worker(rank, world_size, nested):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = train_worker(rank, world_size, [nested])
    return status, said.getvalue()


def test_row_33_a_finished_run_says_so_and_touches_nothing(corpus, clean):
    def listing():
        return {
            str(path): path.stat().st_mtime_ns
            for path in clean.rglob("*")
            if path.is_file() and path.name not in ("run.lock", "status.json")
        }

    before = listing()
    (status, said), other = run_ranks(talking_worker, 2, short_run(corpus, clean))
    assert status == [EXIT_DONE]
    assert said.startswith("already complete")
    assert other == ([EXIT_DONE], "")
    assert listing() == before
    told = read_status(clean)
    assert (told.outcome, told.step) == ("complete", STEPS)


def test_row_15_rows_shorter_than_the_ring_are_refused_by_the_configuration(corpus, tmp_path):
    run = short_run(corpus, tmp_path, data__seq_len=3)
    assert run_ranks(train_worker, 4, [run]) == [[EXIT_CONFIG]] * 4
