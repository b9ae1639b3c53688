"""What carries attention is logged where the library made it by name: once, by one rank, with the reason."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import ringattn
from ringattn import transport
from tests.processes import run_ranks


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((record.name, record.levelname, record.getMessage()))


def logging_worker(rank, world_size, reachable, options):
    """Two rows of one plan and a second plan, by name; then with what the caller made, as the trainer does."""
    kept, log = Lines(), logging.getLogger("ringattn")
    log.addHandler(kept)
    log.setLevel(logging.INFO)
    group, made = dist.group.WORLD, ringattn.make_transport("p2p", dist.group.WORLD)

    def stand_in(*arguments):
        made.description = "copy_engine"
        return made

    def call(plan, **options):
        tensors = [torch.randn(1, plan.shard_len(rank), 4, 8) for _ in range(3)]
        ringattn.ring_attention(*tensors, plan, group, **options)

    plan = ringattn.Plan(32, world_size)
    with pytest.MonkeyPatch.context() as patch:
        if reachable:
            patch.setattr(transport, "peer_memory_problem", lambda group: None)
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            patch.setattr(transport, "CudaPeerMemory", lambda *arguments: SimpleNamespace(reserve=lambda size: True))
            patch.setattr(transport, "CopyEngineTransport", stand_in)
        for each in (plan, plan.with_documents([0, 9, 32]), plan):
            call(each, **options)
    by_name = list(kept.lines)
    call(plan, transport=ringattn.make_transport("auto", group))
    call(plan, ulysses=ringattn.make_ulysses(group, 2))
    assert kept.lines == by_name
    return by_name


GLOO = "p2p over gloo (copy_engine cannot be had: its ranks talk over gloo, not over NCCL)"


@pytest.mark.parametrize(
    ("reachable", "options", "expected"),
    [
        (False, {}, ("ringattn.transport", f"ring of 4: {GLOO}")),
        (False, {"transport": "p2p"}, ("ringattn.transport", "ring of 4: p2p over gloo")),
        (
            True,
            {},
            ("ringattn.transport", "ring of 4: copy_engine (auto: every rank can reach every other one's memory)"),
        ),
        (
            False,
            {"ulysses": 2},
            ("ringattn.ulysses", f"heads for tokens: ulysses of degree 2, then a ring of 2: {GLOO}"),
        ),
        (
            False,
            {"ulysses": 4},
            ("ringattn.ulysses", "heads for tokens: ulysses of degree 4, all ranks of the ring, so no ring is left"),
        ),
    ],
)
def test_one_rank_logs_once_what_was_made_by_name(reachable, options, expected):
    name, line = expected
    first, *others = run_ranks(logging_worker, 4, reachable, options)
    assert first == [(name, "INFO", line)]
    assert others == [[]] * 3
