"""What passes that run as CUDA graphs hold between steps, where they are taken, and what the host takes where not."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from launch.config import MemoryConfig
from launch.memory_items import graph_bytes, graph_items, peer_bytes
from launch.memory_plan import case_of, estimate_memory
from launch.step_time import step_time
from model.config import preset
from ringattn.teams import ring_of
from tests.launch.test_memory_plan import LAGGED, RATES, SAS, config, kind_case


@pytest.mark.parametrize(
    ("changes", "regions", "graphs"),
    [
        ({}, True, True),
        ({"per_node": 2}, True, False),  # hybrid
        ({"per_node": 3}, False, False),  # nodes have not equally many, so it is NCCL
        ({"per_node": 1}, False, False),
        ({"ulysses": 2}, True, True),
        ({"ulysses": 4}, False, False),  # no ring is left
        # Every ring of 2 has one GPU of each node; in a striped plan both are of one.
        ({"ulysses": 2, "per_node": 2}, False, False),
        ({"ulysses": 2, "per_node": 2, "layout": "striped"}, True, True),
    ],
)
def test_regions_and_graphs_are_those_of_rings_inside_a_node(
    changes: dict[str, Any], regions: bool, graphs: bool
) -> None:
    layout = changes.get("layout", "zigzag")
    sizes = {name: size for name, size in changes.items() if name != "layout"}
    case = kind_case(32_768, 4, LAGGED)
    case = replace(case, plan=replace(case.plan, layout=layout), **sizes)
    assert (peer_bytes(case) > 0, graph_bytes(case) > 0) == (regions, graphs)
    # Of every ring, how many ranks each of its nodes has.
    rings = [ring_of(layout, 4, case.ulysses, rank) for rank in range(4)]
    nodes = [sorted(Counter(rank // case.per_node for rank in ring).values()) for ring in rings]
    assert all(len(counts) == 1 < counts[0] for counts in nodes) == graphs
    assert all(len(set(counts)) == 1 < counts[0] for counts in nodes) == regions


def test_only_layers_that_are_alike_share_graphs() -> None:
    """And so only they run from graphs."""
    for model in (LAGGED, {**SAS, **LAGGED}):
        assert graph_bytes(kind_case(8_192, 4, model)) > 0
        assert graph_bytes(kind_case(8_192, 4, {**model, "selection_guide": True})) == 0


def test_modules_with_hooks_and_rings_without_peer_memory_have_no_graphs() -> None:
    """ZeRO-3 hooks every module, also those that expand; sends and receives have neither graphs nor regions."""
    for stage, expanding in ((2, True), (3, False)):
        zero = {"engine": "zero", "zero_stage": stage}
        assert (graph_bytes(replace(kind_case(8_192, 4, SAS), **zero)) > 0) == expanding
        assert graph_bytes(replace(kind_case(8_192, 4, {}), **zero)) > 0
    for model in ({}, SAS, LAGGED):
        case = kind_case(8_192, 4, model)
        assert min(graph_bytes(case), peer_bytes(case)) > 0
        assert graph_bytes(replace(case, transport="p2p")) == peer_bytes(replace(case, transport="p2p")) == 0
    of_run = config(8_192, model={"preset": "qwen3-0.6b"}, parallel={"transport": "p2p"})
    assert case_of(of_run, preset("qwen3-0.6b"), 4, on_gpu=True).transport == "p2p"


def test_wide_outputs_count_as_they_do_backward() -> None:
    """81,920 tokens over 4, 16 heads whose values are 128 wide: out is 80 MiB, queries of 96 features 60."""
    mla = {"attention": "mla", "heads": 16, "kv_heads": 4, "head_dim": 64, "qk_norm": False}
    mla |= {"latent_dim": 128, "rope_dim": 32, "value_dim": 128}
    for model in (mla, {**mla, **LAGGED}):
        assert graph_bytes(kind_case(65_536, 4, model)) > 0
        assert graph_bytes(kind_case(81_920, 4, model)) == 0


def test_graphs_hold_what_is_made_of_a_payload() -> None:
    """2,048 tokens a rank: 32 heads of 128 in bf16 are 16 MiB, keys and values of so many heads 32."""
    case, mib = kind_case(8_192, 4, SAS), 2**20
    queries, payload = 16 * mib, 2 * 8 * 128 * 2 * 2_048
    held, made = (item.device for item in graph_items(case))
    assert held == pytest.approx(6 * queries + 3 * payload, rel=0.01)  # q, q, dout, dq, out twice; and parameters
    assert made == 2 * 32 * mib  # keys and values, and their gradients
    selecting = kind_case(8_192, 4, {**SAS, **LAGGED})
    assert [item.device for item in graph_items(selecting)] == [held + 2 * queries, 1.5 * made]  # some of it in fp32
    # Nothing is expanded in the ring: graphs of plain attention.
    assert [item.name for item in graph_items(replace(case, ulysses=2))] == ["tensors of CUDA graphs"]
    for tokens, graphs in ((32_768, True), (32_772, False)):  # keys of 64 MiB, and of more
        found = estimate_memory(kind_case(tokens, 4, SAS), MemoryConfig())
        (last,) = (phase for phase in found.phases if phase.name == "backward of the last attention")
        for items, expected in ((found.always, graphs), (last.items, not graphs)):  # one of them
            assert ("expanded keys and values" in {item.name for item in items}) == expected


@pytest.mark.parametrize("kind", [{}, SAS, LAGGED])
def test_without_selection_graphs_are_the_row_s_where_there_are_documents(kind: dict[str, Any]) -> None:
    case = kind_case(16_384, 4, kind)
    one, several = (graph_bytes(replace(case, documents=kept)) for kept in (False, True))
    # 4,096 tokens: q, out, dout and dq are 16 heads of 128 in 16 bits, what the payload gets is as much, lse 16 fp32.
    plain = 7 * 4_096 * 16 * 128 * 2 + 2 * 4_096 * 16 * 4
    if kind == {}:
        assert one == plain
        assert several > 2 * plain
    elif kind == LAGGED:
        assert one == several == graph_bytes(case)
    else:
        assert several > 2 * one > 0
        found = estimate_memory(replace(case, documents=True), MemoryConfig())
        (last,) = (phase for phase in found.phases if phase.name == "backward of the last attention")
        for items in (found.always, last.items):  # of graphs, and of calls that are launched
            assert "expanded keys and values" in {item.name for item in items}
    most = 32_768 if kind == SAS else 65_536  # keys of 64 MiB, queries of as much
    longest, longer = (graph_bytes(replace(kind_case(n, 4, kind), documents=True)) for n in (most, most + 8))
    assert longest > 0 == longer


def test_where_heads_are_exchanged_the_ring_expands_nothing() -> None:
    ring = kind_case(8_192, 4, SAS)
    step = RATES.step()
    for ulysses, expected, near in ((1, "expanding", 5e-3), (2, "plain", 0.02), (4, "plain", 0.02)):
        found = step_time(replace(ring, ulysses=ulysses), MemoryConfig(), RATES)
        assert found.seconds == pytest.approx(ring.model.layers * step.host_layer[expected], rel=near)
    # Without graphs: guided, and between hosts.
    guided = kind_case(8_192, 4, {**LAGGED, "selection_guide": True})
    for case in (guided, kind_case(8_192, 4, {**SAS, **LAGGED, "selection_guide": True}), replace(ring, per_node=2)):
        assert step_time(case, MemoryConfig(), RATES).seconds == pytest.approx(
            28 * step.host_layer["launched"], rel=5e-3
        )


@pytest.mark.parametrize(
    ("model", "near", "seconds"),
    [
        ({}, 4, 0.204),
        (SAS, 2, 0.968),  # measured before such passes were graphs, which over two hosts they are not
    ],
)
def test_short_rows_wait_for_the_host(model: dict[str, Any], near: int, seconds: float) -> None:
    """docs/records/steps-4-h200.jsonl: 8,192 tokens on four GPUs. The device computes for less than 0.15 s of it."""
    short, long = (
        step_time(replace(kind_case(n, 4, model), per_node=near), MemoryConfig(), RATES) for n in (8_192, 131_072)
    )
    assert short.seconds == pytest.approx(seconds, rel=0.15)
    assert short.seconds - short.host < 0.15
    assert long.host < 0.01 * long.seconds
