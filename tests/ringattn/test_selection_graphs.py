"""Selection from graphs (tests/recorded_graphs.py), over shared files, against the dense oracle."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from ringattn.rehearsing import rehearsing
from ringattn.testing import error
from tests.processes import run_ranks
from tests.ringattn.test_graphs import recording_transport, without_new_inputs
from tests.ringattn.test_selection_ring import Case, attend, names, oracle

TOKENS = 21
# All of one shape: what tells them apart is not.
ALIKE = [
    Case(TOKENS, "zigzag"),
    Case(TOKENS, "zigzag", lag=2),
    Case(TOKENS, "zigzag", head=3),
    Case(TOKENS, "zigzag", protect_first=False),
    Case(TOKENS, "contiguous"),
]
COST = Case(TOKENS, "zigzag", cost=True, lag=4)
# Never graphs: what `expand` does may differ, and guided layers would need one each.
OTHERS = [
    Case(TOKENS, "zigzag", terms=2),
    Case(TOKENS, "zigzag", terms=2, documents=(0, 5, 6, TOKENS)),
    Case(TOKENS, "zigzag", expanded=True),
]
# One graph serves all these.
PACKED = [
    Case(TOKENS, "zigzag", documents=(0, 5, 6, TOKENS)),
    Case(TOKENS, "zigzag", documents=(0, 12, TOKENS), protect_first=True),
]


def without_terms(passes):
    run = passes.run
    passes.run = lambda key, *rest: run(((key[0][0][0], *key[0][1:]), *key[1:]), *rest)


def one_set_of_documents(passes):
    run = passes.run
    passes.run = lambda key, step, inputs, *rest: run(
        key, lambda *new: step(*new[:-2], inputs[-1], new[-1]), inputs, *rest
    )


FAULTS = {"terms": without_terms, "inputs": without_new_inputs, "documents": one_set_of_documents}


def worker(rank, world_size, folder, cases, fault):
    transport, worst = recording_transport(folder), 0.0
    if fault is not None:
        FAULTS[fault](transport._graphs)
    for step in range(4):  # the third call of a kind is the first from a graph
        for case in cases:
            one = replace(case, seed=step)
            found = attend(one, rank, world_size, dist.group.WORLD, transport)
            for name, actual, expected in zip(names(one), found, oracle(one), strict=True):
                worst = max(worst, error(actual, expected))
                assert fault or error(actual, expected) <= 1e-10, (step, one, name, error(actual, expected))
    return worst, len(transport._graphs._captured), transport.stats.take().untimed_hops


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_each_call_has_its_own_terms_and_tensors(size, tmp_path):
    for _, graphs, replayed in run_ranks(
        worker, size, str(tmp_path), [*ALIKE, COST, *OTHERS, *PACKED], None, timeout=120
    ):
        assert graphs == 2 * (len(ALIKE) + 2)  # forward and backward
        assert replayed > 0


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "cases"), [("terms", ALIKE), ("inputs", ALIKE), ("documents", PACKED)])
def test_a_graph_for_another_call_is_missed(fault, cases, tmp_path):
    assert all(worst > 1e-6 for worst, *_ in run_ranks(worker, 2, str(tmp_path), cases, fault, timeout=120))


def beside_worker(rank, world_size, folder):
    """Bytes sent by a call as it comes, in a rehearsal and while the caller captures; and calls that were counted."""
    transport, case, sent = recording_transport(folder), PACKED[0], []
    for rehearses, captured in ((False, False), (True, False), (False, True)):
        token = rehearsing.set(rehearses)
        torch.cuda.is_current_stream_capturing = lambda captured=captured: captured
        attend(case, rank, world_size, dist.group.WORLD, transport)
        rehearsing.reset(token)
        sent.append(transport.stats.take().bytes_sent)
    return sent, list(transport._graphs._calls.values())


def test_a_rehearsal_and_a_capture_by_the_caller_launch_what_other_calls_launch(tmp_path):
    """All of the row travels: with its documents' own blocks kernels would meet other sizes than were compiled."""
    for sent, calls in run_ranks(beside_worker, 2, str(tmp_path)):
        assert len(set(sent)) == 1
        assert sent[0] > 0
        assert calls == [1, 1]  # forward and backward; neither of the others leads to a graph
