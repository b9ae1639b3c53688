"""Joined hops, the local work in halves, groups of heads and graphs: what the library does, in the simulation."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ringattn
from ringattn import merge, softmax
from ringattn.kernels import WORTH_A_PLAN
from ringattn.mask import Block, Relation
from ringattn.packs import Pack
from ringattn.schedule import joined_schedule
from ringattn.scoring.expansion import Expansion
from ringattn.transport.copy_engine import GRAPH_BYTES
from tests.tools.simulate_cases import LAYOUTS, h100, layer, no_time, real, run
from tools.simulate import events
from tools.simulate.case import PASSES, Case
from tools.simulate.events import simulate
from tools.simulate.stops import ScheduledWork, head_groups
from tools.simulate.work import work_of


def case_of(size: int, tokens: int, heads: int = 16, kv_heads: int = 16, **plan: Any) -> Case:
    return Case(
        plan=ringattn.Plan(size * tokens, size, **plan), heads=heads, kv_heads=kv_heads, head_dim=128, dtype="bf16"
    )


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "tokens"), [(2, 64), (4, 2048), (4, 8192), (7, 4096), (8, 8192)])
def test_the_library_schedules(size: int, tokens: int, layout: str, what: str) -> None:
    case = case_of(size, tokens, layout=layout)
    plain = work_of(case.plan)
    work = ScheduledWork(plain, case, what)
    calls = np.zeros(size, dtype=int)
    pairs, needed = np.zeros(size), np.zeros(size)
    for hop in range(work.num_hops):
        now = work.hop(hop)
        calls += np.bincount(now.rank, minlength=size)
        pairs += now.pairs_by_rank()
        before = plain.hop(hop) if hop < plain.num_hops else None
        needed += 0 if before is None else before.pairs_by_rank()
        assert now.travelling.tolist() == ([0] * size if before is None else before.travelling.tolist())
    assert pairs.tolist() == needed.tolist()
    stops = [
        joined_schedule(
            case.plan,
            rank,
            token_bytes=case.payload_bytes,
            pair_flops=case.flops(what, 1.0),
            cut=what == "backward",
        )
        for rank in range(size)
    ]
    assert calls.tolist() == [sum(len(stop.blocks) for stop in line) for line in stops]
    assert work.num_hops == size + (what == "backward")  # the second half of the local work
    if size == 8 and layout == "zigzag":
        assert work.most_joined == 3


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [{}, {"causal": False}, {"window": 9000}, {"documents": (0, 9000, 50_000, 65_536)}])
def test_joined_hops_compute_and_move_the_same(mask: dict[str, Any], layout: str, what: str) -> None:
    case = case_of(8, 8192, layout=layout, **mask)
    machine = h100("copy-engine")
    apart = replace(machine, transport=replace(machine.transport, peers=False))
    found, before = run(case, machine, what), run(case, apart, what)
    assert found.pairs.tolist() == before.pairs.tolist()
    assert found.received.tolist() == before.received.tolist()
    spent = found.busy + found.exposed + found.host + found.uneven + 2 * machine.transport.barrier
    assert spent.tolist() == pytest.approx([found.seconds] * 8)


@pytest.mark.parametrize("tokens", [2048, 3072, 4096, 8192])
def test_gradients_of_joined_hops_go_back_once_they_are_there(tokens: int) -> None:
    """Every rank pulls and pushes for each hop, the pushes after the block of their stop."""
    case, machine = case_of(8, tokens), h100("copy-engine")
    done = simulate(work_of(case.plan), machine, case, "backward", watched=tuple(range(8)))
    blocks = {(span.rank, span.hop): span.end for span in done.spans if span.what == "block"}
    pushes = [span for span in done.spans if span.what == "gradients"]
    assert sorted((span.rank, span.hop) for span in pushes) == [(rank, hop) for rank in range(8) for hop in range(1, 8)]
    assert len(blocks) < 8 * 8

    def computed(rank: int, hop: int) -> float:
        return next(blocks[rank, last] for last in range(hop, 8) if (rank, last) in blocks)

    assert all(span.start >= computed(span.rank, span.hop) for span in pushes)
    first = max(span.end for span in pushes if span.hop <= 3)
    assert min(span.start for span in pushes if span.hop > 3) >= first  # slots are used again
    assert min(span.start for span in pushes if span.hop > 3) >= max(computed(rank, 4) for rank in range(8))
    if tokens == 8192:  # nothing is waited for but barriers, at hops 4 and 7 and at the end
        assert done.exposed.max() == pytest.approx(3 * machine.transport.barrier, rel=0.01)


@pytest.mark.parametrize("sizes", [(2048, 16, 16), (8192, 32, 8), (8193, 16, 16), (32768, 32, 8), (131072, 24, 6)])
def test_groups_of_heads_are_the_library_s(sizes: tuple[int, int, int]) -> None:
    tokens, heads, kv_heads = sizes
    case = case_of(2, tokens, heads, kv_heads)
    assert events._PARTS == merge._MAX_PARTS
    # Shapes without memory.
    ring = SimpleNamespace(plan=case.plan, transport="any")
    attention = SimpleNamespace(ring=ring, expansion=SimpleNamespace(plain=True))
    q = SimpleNamespace(shape=(1, tokens, heads, 128), element_size=lambda: 2)
    payload = (SimpleNamespace(shape=(1, tokens, kv_heads, 128)),) * 2
    groups = list(softmax.SoftmaxAttention._head_groups(attention, q, payload))  # type: ignore[arg-type]
    assert head_groups(case) == len(groups)


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize(
    ("tokens", "documents", "groups"),
    [
        (2048, (0, 1280, 3328, 5376, 8192), 1),
        (8192, (0, 5000, 5050, 5100, 13_056, 32_768), 1),
        (32_768, (0, 16_000, 52_224, 131_072), 4),  # some are worth a plan
    ],
)
def test_flash_has_the_blocks_that_the_library_gives_it(
    tokens: int, documents: tuple[int, ...], groups: int, layout: str, what: str
) -> None:
    case = case_of(4, tokens, layout=layout, documents=documents)
    plan, backward = case.plan, what == "backward"
    assert head_groups(case) == groups
    part = replace(case, heads=16 // groups, kv_heads=16 // groups, groups=groups)
    work, machine = ScheduledWork(work_of(plan), part, what), h100("copy-engine")
    found = np.zeros(4)
    for hop in range(work.num_hops):
        now = work.hop(hop)
        on_flash = machine.kernels._on_flash(what, part, now)
        found += np.bincount(now.rank[on_flash], now.pairs[on_flash], minlength=4)
    # Shapes without memory.
    x: Any = SimpleNamespace(shape=(1, tokens, 16 // groups, 128), dtype="bf16")
    packing: Any = SimpleNamespace(name="flash")
    flops, expected = part.flops(what, 1.0), np.zeros(4)
    for rank in range(4):
        ring: Any = SimpleNamespace(plan=plan, rank=rank)
        library = softmax.SoftmaxAttention(ring, Expansion(None, plan, torch.device("cpu")), "auto", 1.0)
        for stop in joined_schedule(plan, rank, token_bytes=part.payload_bytes, pair_flops=flops, cut=backward):
            for one in library._blocks(stop, packing, x, x, 16, backward=backward):
                if isinstance(one, Pack) or library._planned(one, x, x, 16, backward=backward) < WORTH_A_PLAN:
                    expected[rank] += pairs_of(one) / stop.share[1]
    assert found.tolist() == expected.tolist()
    assert found.any() or (groups, layout, what) == (4, "contiguous", "backward")


def pairs_of(one: Block | Pack) -> int:
    starts = (
        (one.q_starts, one.k_starts)
        if isinstance(one, Pack)
        else ((one.q_start, one.q_stop), (one.k_start, one.k_stop))
    )
    causal = one.relation is Relation.CAUSAL
    return sum(n * (n + 1) // 2 if causal else n * m for n, m in zip(*map(np.diff, starts), strict=True))


def test_groups_of_heads_take_turns() -> None:
    """Four groups of four heads at 32,768 tokens: as long as four rings of one of them."""
    case, machine = case_of(4, 32768), h100("copy-engine, captured")
    one = replace(case, heads=4, kv_heads=4)
    assert (head_groups(case), head_groups(one)) == (4, 1)
    for what in PASSES:
        whole, part = run(case, machine, what), run(one, machine, what)
        assert whole.seconds == pytest.approx(4 * part.seconds)
        assert whole.pairs.tolist() == (4 * part.pairs).tolist()
        assert whole.received.tolist() == (4 * part.received).tolist()
        assert sum(hop.compute_mean for hop in whole.hops) == pytest.approx(4 * sum(h.compute_mean for h in part.hops))


def test_short_shards_are_graphs() -> None:
    link = h100("copy-engine").transport
    assert GRAPH_BYTES == 2**26
    assert link.captures(case_of(4, 8192))
    assert not link.captures(case_of(4, 8193))
    assert link.captures(case_of(4, 8192, 32, 8))
    assert not link.captures(case_of(1, 2048))
    assert link.captures(case_of(4, 2048, documents=(0, 5000, 8192)))
    for name in ("copy-engine, captured", "copy-engine, no graphs", "nccl"):
        assert not h100(name).transport.captures(case_of(4, 2048))


@pytest.mark.parametrize("what", PASSES)
def test_three_modes_of_the_copy_engine(what: str) -> None:
    short, long = real(4, tokens=2048), real(4, tokens=32768)
    library, captured, eager = (h100(f"copy-engine{mode}") for mode in ("", ", captured", ", no graphs"))
    done = {name: run(short, machine, what) for name, machine in (("own", library), ("all", captured), ("no", eager))}
    link = library.transport
    # Inputs that stay here and results are read and written: q and out; dout, q, out and dq, dk, dv.
    copied = 2 * 2048 * 16 * 128 * 2 * {"forward": 2, "backward": 6}[what] / library.memory
    assert done["own"].seconds == pytest.approx(done["all"].seconds + link.graph + copied)
    assert done["no"].seconds > 3 * done["own"].seconds
    hops = 4 + (what == "backward")  # and the second local part
    assert done["no"].seconds == pytest.approx(link.call + hops * link.hop[what])
    assert done["all"].host.tolist() == [0.0] * 4
    assert run(long, library, what).seconds == run(long, eager, what).seconds == run(long, captured, what).seconds


def test_the_own_payload_is_put_where_peers_read_it() -> None:
    """Two ranks of 4 tokens, 4 bytes each."""
    case, machine = layer(8, 2, causal=False), replace(no_time(peers=True), memory=1.0)
    apart = replace(machine, transport=replace(machine.transport, peers=False))
    assert run(case, machine).seconds == pytest.approx(run(case, apart).seconds + 2 * 16)
