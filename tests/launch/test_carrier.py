"""What carries attention is made as the configuration says, and follows the run's timeouts."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

import ringattn
from launch.carrier import make_carrier
from launch.config import Config
from launch.data.packing import Row
from launch.steps import StepRunner
from launch.topology import Topology
from ringattn import PeerError
from tests.model.dense import tiny
from tests.processes import run_ranks


def started(*, one_document: bool = False, **parallel: Any) -> tuple[Config, Topology]:
    config = Config.model_validate(
        {
            "run": {"dir": "unused", "device": "cpu"},
            "model": {"heads": 8, "kv_heads": 4},
            "data": {"seq_len": 64, "cross_document_attention": one_document},
            "optim": {"steps": 1, "rows_per_step": 12},
            "parallel": {"setup_timeout_s": 20.0, "transport": "p2p", **parallel},
        }
    )
    return config, Topology.start(config)


def plans_of_two_rows(rank: int, world_size: int) -> list[tuple[bool, bool]]:
    """Whether a run's first row has the run's plan, and whether its second has the plan of the first."""
    found = []
    nothing: Any = None  # a row's plan needs neither engine nor a carrier
    for one_document in (True, False):
        config, topology = started(one_document=one_document)
        runner = StepRunner(config, topology, nothing, nothing, None, tiny())
        rows = [SimpleNamespace(documents=torch.tensor([0, 64]), num_valid=63) for _ in range(2)]
        first, second = (runner._attention(cast(Row, row))._plan for row in rows)
        found.append((first is runner._plan, second is first))
    return found


def test_rows_that_count_as_one_document_have_one_plan_which_is_agreed_on_once() -> None:
    assert run_ranks(plans_of_two_rows, 1) == [[(True, True), (False, False)]]


def describe(rank: int, world_size: int, cases: list[dict[str, Any]]) -> list[Any]:
    found: list[Any] = []
    for parallel in cases:
        config, topology = started(**parallel)
        carrier = make_carrier(config, topology)
        assert carrier is not None
        ring = None if carrier.ulysses is None else carrier.ulysses.ring_group
        inner = None if carrier.ulysses is None else carrier.ulysses.transport
        assert inner is None or inner.stats is carrier.stats
        assert topology._adopted == ([] if ring is None else [ring])
        plan = ringattn.Plan(64, topology.cp, layout=config.parallel.layout)
        q, k, v = (torch.ones(1, plan.shard_len(topology.cp_rank), heads, 8) for heads in (8, 4, 4))
        ringattn.ring_attention(q, k, v, plan, topology.cp_group, **carrier.options)
        found.append(
            (
                carrier.description,
                None if ring is None else dist.get_process_group_ranks(ring),
                carrier.stats.take().bytes_sent > 0,
            )
        )
    return found


def planned(rank: int, world_size: int) -> list[int]:
    """Hosts of the plans of a run, and of an inner ring, whose transports found two."""
    found = []
    for degree in (1, 2):
        config, topology = started(ulysses=degree)
        carrier = make_carrier(config, topology)
        assert carrier is not None
        used = carrier.transport if carrier.ulysses is None else carrier.ulysses.transport
        assert used is not None
        used.hosts = 2
        nothing: Any = None  # a plan needs neither engine nor data
        plan = StepRunner(config, topology, nothing, nothing, carrier, config.model)._plan
        found += [plan.hosts] if carrier.ulysses is None else [plan.hosts, carrier.ulysses.inner_plan(plan).hosts]
    return found


def test_plans_go_by_the_hosts_that_the_transport_found() -> None:
    assert run_ranks(planned, 4) == [[2, 1, 2]] * 4


def test_the_carrier_is_what_the_configuration_says() -> None:
    cases = [
        {"ulysses": 1},
        {"ulysses": 2},
        {"ulysses": 2, "layout": "striped"},
        {"ulysses": 4},
        {"ulysses": 2, "cp": 2},
    ]
    found = run_ranks(describe, 4, cases)
    crossed = "heads for tokens: ulysses of degree 2, then a ring of 2: p2p over gloo"
    alone = "all ranks of the ring, so no ring is left"
    for rank, told in enumerate(found):
        words = [each[0] for each in told]
        assert words == [
            "ring: p2p over gloo",
            crossed,
            crossed,
            f"heads for tokens: ulysses of degree 4, {alone}",
            f"heads for tokens: ulysses of degree 2, {alone}",
        ]
        rings = [each[1] for each in told]
        assert rings == [None, [rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1], None, None]
        assert all(each[2] for each in told)


def silent(rank: int, world_size: int, degree: int) -> tuple[str, float] | None:
    """Rank 0 does not come to the second exchange of heads or, where there is a ring, to its second hop."""
    config, topology = started(ulysses=degree, hop_timeout_s=0.3)
    carrier = make_carrier(config, topology)
    assert carrier is not None
    assert carrier.ulysses is not None
    plan = ringattn.Plan(64, world_size)
    q, k, v = (torch.ones(1, 16, heads, 8) for heads in (8, 4, 4))
    ringattn.ring_attention(q, k, v, plan, topology.cp_group, **carrier.options)
    topology.use_hop_timeout()
    if rank == 0 and degree == world_size:
        time.sleep(2)
        return None
    if rank == 0:
        carrier.ulysses.transport.post = lambda *arguments: time.sleep(2)  # type: ignore[union-attr, method-assign]
    began = time.monotonic()
    with pytest.raises(PeerError if rank else AttributeError) as caught:
        ringattn.ring_attention(q, k, v, plan, topology.cp_group, **carrier.options)
    return str(caught.value), time.monotonic() - began


@pytest.mark.parametrize(("degree", "words"), [(2, "ring rank 1, forward hop 1"), (4, "ulysses member")])
def test_a_silent_peer_is_noticed_after_the_hop_timeout(degree: int, words: str) -> None:
    outcomes = run_ranks(silent, 4, degree, timeout=15.0, check=False)
    message, seconds = outcomes[2].value  # of the ring of rank 0
    assert words in message
    assert seconds < 1.8
