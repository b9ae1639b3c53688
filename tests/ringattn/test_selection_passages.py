"""A call with selection is one whole: after an error between two of its passages nothing more is sent."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn import ring
from ringattn.scoring import attention, columns
from ringattn.testing import dense_attention, error
from ringattn.transport.p2p import P2PTransport
from tests.peer_memory import copy_engine_on_files
from tests.processes import run_ranks
from tests.ringattn.test_hybrid import hybrid, out_of_memory

TOKENS = 26
SELECTION = ringattn.Selection(head=1, lag=2)
TIMEOUT_S = 1.0


def timeout():
    return timedelta(seconds=TIMEOUT_S)


CARRIERS = {
    "p2p": lambda folder: P2PTransport(dist.group.WORLD, timeout),
    "copy_engine": lambda folder: copy_engine_on_files(dist.group.WORLD, folder, timeout),
    "hybrid": lambda folder: hybrid("aab", folder, timeout),
}


def then_out_of_memory(function):
    def failing(*arguments):
        function(*arguments)
        out_of_memory()

    return failing


# Where something fails: what it is a part of, and what takes its place.
PLACES = {
    "before the prefixes": ("forward", attention, "prefixes", out_of_memory),
    "amid the prefixes": ("forward", columns, "_prefix", out_of_memory),
    "after the prefixes": ("forward", attention, "prefixes", then_out_of_memory(columns.prefixes)),
    "before the suffixes": ("backward", attention, "suffixes", out_of_memory),
    "amid the suffixes": ("backward", columns, "_suffix", out_of_memory),
    "after the suffixes": ("backward", attention, "suffixes", then_out_of_memory(columns.suffixes)),
}


def problem():
    """q, k, v, dout."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(1, TOKENS, heads, 4, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)]


def attend(plan, rank, transport):
    *leaves, dout = (ringattn.shard(x, plan, rank) for x in problem())
    leaves = [x.requires_grad_() for x in leaves]
    out = ringattn.ring_attention(*leaves, plan, dist.group.WORLD, selection=SELECTION, transport=transport)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def off(plan, rank, found):
    """The largest error against the dense oracle."""
    *leaves, dout = problem()
    leaves = [x.requires_grad_() for x in leaves]
    out = dense_attention(*leaves, selection=SELECTION)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    return max(error(x, ringattn.shard(y, plan, rank)) for x, y in zip(found, expected, strict=True))


def broken_worker(rank, world_size, carrier, place, folder):
    """Only rank 0 breaks off; then it calls again. What each rank is told, after how many seconds."""
    transport, plan = CARRIERS[carrier](folder), ringattn.Plan(TOKENS, world_size)
    assert off(plan, rank, attend(plan, rank, transport)) <= 1e-10
    if rank == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*PLACES[place][1:])
            with pytest.raises(torch.OutOfMemoryError):
                attend(plan, rank, transport)
    sent, began = transport.stats.bytes_sent, time.monotonic()
    with pytest.raises(ringattn.PeerError) as caught:
        attend(plan, rank, transport)
    told = time.monotonic() - began, str(caught.value)
    assert rank or transport.stats.bytes_sent == sent
    (Path(folder) / f"rank {rank}").touch()
    while len(list(Path(folder).glob("rank *"))) < world_size:  # nobody is told by another one's end
        time.sleep(0.02)
    return told


@pytest.mark.parametrize(
    ("size", "carrier", "place"),
    [
        *((2, "p2p", place) for place in PLACES),
        *((3, carrier, place) for carrier in CARRIERS for place in PLACES if place.startswith("amid")),
        *(pytest.param(3, "p2p", place, marks=pytest.mark.slow) for place in PLACES if not place.startswith("amid")),
    ],
)
def test_a_rank_that_broke_off_between_passages_is_refused_and_the_others_are_told(size, carrier, place, tmp_path):
    (seconds, message), *others = run_ranks(broken_worker, size, carrier, place, str(tmp_path))
    assert f"an earlier pass (selection {PLACES[place][0]}) broke off on this rank" in message
    assert seconds < 0.5
    for seconds, message in others:
        assert "a neighbour died or did not answer in time" in message
        assert seconds < 3 * TIMEOUT_S


def early_worker(rank, world_size):
    """All ranks fail before anything is sent, and try again."""
    transport, plan = P2PTransport(dist.group.WORLD), ringattn.Plan(TOKENS, world_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "plain_schedule", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            attend(plan, rank, transport)
    return off(plan, rank, attend(plan, rank, transport))


def test_an_error_before_the_first_message_breaks_nothing_off():
    assert max(run_ranks(early_worker, 2)) <= 1e-10
