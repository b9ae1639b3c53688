"""Numbers that are not finite, planted in real processes: no rank is updated, nothing of it is published.

The numbers in the names are the rows of the fault matrix in docs/failures.md.
"""

import pytest
import torch

from launch.errors import EXIT_DONE, EXIT_NUMERICS
from launch.status import read_status
from tests.launch.runs import faulty_worker, short_run, train_worker, weights, write_corpus
from tests.processes import run_ranks


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def nan_on_one_rank(rank, victim, steps, where="loss"):
    from launch.steps import StepRunner

    train, forward, seen = StepRunner.train, StepRunner._forward, {"step": 0, "changed": []}

    def counting_train(self, *arguments, **options):
        seen["step"] += 1
        before = {name: tensor.clone() for name, tensor in self._engine.state().items()}
        result = train(self, *arguments, **options)
        after = self._engine.state()
        same = all(torch.equal(local(before[name]), local(after[name])) for name in before)
        seen["changed"] += [] if same else [seen["step"]]
        return result

    def poisoned(self, row, labels, attention):
        loss = forward(self, row, labels, attention)
        if rank == victim and seen["step"] in steps and torch.is_grad_enabled():
            if where == "loss":
                return loss * float("nan")
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss

    StepRunner.train, StepRunner._forward = counting_train, poisoned
    return seen


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
@pytest.mark.parametrize(
    ("where", "blame"),
    [
        pytest.param("loss", "the loss of rank 1 is not finite", marks=pytest.mark.slow),
        ("gradient", "it began in the loss of rank 1"),
    ],
)
def test_row_19_nan_on_one_rank_updates_no_rank_and_the_run_goes_on(corpus, tmp_path, engine, where, blame):
    run = short_run(corpus, tmp_path, engine__name=engine)
    outcomes = run_ranks(faulty_worker, 2, run, nan_on_one_rank, 1, {4}, where)
    for status, noted in outcomes:
        assert status == EXIT_DONE
        assert noted["changed"] == [1, 2, 3, 5, 6, 7, 8, 9]
    record = (tmp_path / "bad-step-000004.json").read_text()
    assert blame in record
    assert "[\n  6,\n  7\n ]" in record  # the rows of the fourth step, two per step


def test_row_19_too_many_in_a_row_stop_with_the_last_good_state(corpus, tmp_path):
    run = short_run(corpus, tmp_path, optim__max_bad_steps=2)
    outcomes = run_ranks(faulty_worker, 2, run, nan_on_one_rank, 0, {4, 6, 7})
    assert [status for status, _ in outcomes] == [EXIT_NUMERICS] * 2
    told = read_status(tmp_path)
    assert told.exit_status == EXIT_NUMERICS
    assert "step 7 was not applied on any rank: the loss of rank 0 is not finite" in told.message
    # Saved at 6, with the update of step 5; step 7 had nothing new to save.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000006"]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path, 6).values())


@pytest.mark.slow
def test_a_run_that_ended_with_76_at_its_last_step_is_not_complete(corpus, tmp_path):
    run = short_run(corpus, tmp_path, optim__max_bad_steps=2, checkpoint__every_steps=0, optim__steps=5)
    outcomes = run_ranks(faulty_worker, 2, run, nan_on_one_rank, 0, {4, 5})
    assert [status for status, _ in outcomes] == [EXIT_NUMERICS] * 2
    assert run_ranks(train_worker, 2, [run]) == [[EXIT_NUMERICS]] * 2
    assert "after 2 non-finite steps in a row" in read_status(tmp_path).message


def nan_in_the_weights(rank, step):
    from launch.steps import StepRunner

    train, seen = StepRunner.train, {"step": 0}

    def poisoning_train(self, *arguments, **options):
        result = train(self, *arguments, **options)
        seen["step"] += 1
        if seen["step"] == step:
            next(iter(self._engine.state().values())).view(-1)[0] = float("nan")
        return result

    StepRunner.train = poisoning_train


@pytest.mark.slow
def test_row_21_weights_with_nan_are_never_published(corpus, tmp_path):
    run = short_run(corpus, tmp_path, checkpoint__keep=1, optim__max_bad_steps=9)
    outcomes = run_ranks(faulty_worker, 2, run, nan_in_the_weights, 5)
    assert [status for status, _ in outcomes] == [EXIT_NUMERICS] * 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
