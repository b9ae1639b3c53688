"""`--plan` against numbers worked out by hand for a small case, and against what a ring really sends."""

import functools
import re

import pytest
import torch
import torch.distributed as dist

import ringattn
from launch.config import Config
from launch.errors import ConfigError
from launch.plan_attention import ring_bytes
from launch.plan_report import model_of, render
from launch.plan_ulysses import ulysses_bytes
from model.decoder import Decoder
from tests.processes import run_ranks


def config(**sections):
    base = {
        "run": {"dir": "unused"},
        "data": {"seq_len": 64},
        "optim": {"steps": 10, "rows_per_step": 2},
        "model": {"layers": 1, "dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 16},
    }
    return Config(**{**base, **sections})


def test_the_numbers_of_a_small_case():
    text = render(config(), 4)
    assert "4 = dp 1 x cp 4" in text
    assert "64 tokens, zigzag, 16 per rank" in text
    assert "2 rows, 128 tokens" in text
    assert "10 steps, 1,280 tokens" in text
    assert "3 forward, 3 backward (" in text
    assert "2.0 KiB (k and v of one rank" in text  # 16 tokens x 2 x 2 heads x 8 x 4 bytes
    assert "1.000 times the mean attention work" in text


def test_uneven_shards_windows_and_one_process():
    assert "101 tokens, zigzag, 24 to 26 per rank" in render(config(data={"seq_len": 101}), 4)
    windowed = config(parallel={"layout": "contiguous", "window": 8}, data={"seq_len": 64})
    assert "1 forward, 1 backward" in render(windowed, 4)
    assert "none: one process holds the whole row" in render(config(), 1)


def test_a_row_that_does_not_fit_is_told():
    sections = {"model": {"preset": "llama-3-8b"}, "engine": {"name": "fsdp", "precision": "bf16"}}
    long = render(config(data={"seq_len": 1_048_576}, **sections), 4)
    assert "judged by                         GPUs of 80.0 GiB, 125 GiB of host memory each" in long
    sum_on_device = re.search(r"sum on the device .*, (.*) with waste and libraries", long)[1]
    assert f"  warning                           does not fit: a GPU needs {sum_on_device} and has 80.0 GiB" in long
    assert "Next: memory settings predicted to fit: recompute=keep_attention, offload=all" in long
    assert "warning" not in render(config(), 4)
    assert "warning" not in render(config(data={"seq_len": 1_048_576}, memory={"auto": True}, **sections), 4)


def test_processes_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"multiple of parallel\.cp=3"):
        render(config(parallel={"cp": 3}), 4)


def sent_worker(rank, world_size):
    plan = ringattn.Plan(64, world_size)
    transport = ringattn.make_transport("auto", dist.group.WORLD)
    q, k, v = (torch.randn(1, 16, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    ringattn.ring_attention(q, k, v, plan, dist.group.WORLD, transport=transport).sum().backward()
    return transport.stats.take().bytes_sent


def test_the_bytes_are_those_that_the_transport_counts():
    payload = 16 * 2 * 2 * 8 * 4
    # Zigzag: a later rank needs half a payload, an earlier one all of it; forward, backward, gradients going home.
    there = [rank * payload + (3 - rank) * payload // 2 for rank in range(4)]
    home = [rank * payload // 2 + (3 - rank) * payload for rank in range(4)]
    expected = [2 * a + b for a, b in zip(there, home, strict=True)]
    assert run_ranks(sent_worker, 4) == expected
    assert max(expected) == 15 * 1024
    assert "at most 15.0 KiB over 1 layers" in render(config(), 4)


KINDS = {
    "mha": {"kv_heads": 4},
    "mqa": {"kv_heads": 1},
    "gqa": {},
    "mla": {"latent_dim": 12, "rope_dim": 4, "qk_norm": False},
    "tpa": {"query_rank": 3, "key_rank": 2, "value_rank": 1, "qk_norm": False},
    "sas": {"simulated_heads": 8, "simulated_dim": 12, "kernel_size": 3},
}
SHAPE = {"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "ffn_dim": 16}
SELECTIONS = ({}, {"selection": True}, {"selection": True, "selection_lag": 12})


def settings_of(kind, selection, layout="zigzag"):
    return config(model={**SHAPE, "attention": kind, **KINDS[kind], **selection}, parallel={"layout": layout})


def kinds_worker(rank, world_size, cases):
    """For each case: what this rank sends in a training step of one row."""
    found = []
    for kind, selection, layout in cases:
        model = model_of(settings_of(kind, selection, layout))
        module = Decoder(model)
        module.init_weights(0)
        plan = ringattn.Plan(64, world_size, layout=layout)
        transport = ringattn.make_transport("auto", dist.group.WORLD)
        attention = functools.partial(ringattn.ring_attention, plan=plan, group=dist.group.WORLD, transport=transport)
        tokens = torch.arange(64 // world_size)[None]
        module(tokens, tokens, plan.positions(rank), attention, 16).backward()
        found.append(transport.stats.take().bytes_sent)
    return found


def test_every_kind_sends_the_bytes_of_its_plan():
    cases = [(kind, selection, "zigzag") for kind in KINDS for selection in SELECTIONS[:2]]
    cases += [("sas", SELECTIONS[2], "zigzag"), ("gqa", SELECTIONS[1], "contiguous")]
    sent = run_ranks(kinds_worker, 2, cases)
    for number, (kind, selection, layout) in enumerate(cases):
        model = model_of(settings_of(kind, selection, layout))
        planned = ring_bytes(model, ringattn.Plan(64, 2, layout=layout), 4)
        assert max(rank[number] for rank in sent) == planned.per_row, (kind, selection, layout)


def ulysses_settings(kind, selection, layout, degree, kv_heads=2, seq_len=64):
    model = {**SHAPE, "attention": kind, "kv_heads": kv_heads, **KINDS[kind], **selection}
    return config(model=model, parallel={"layout": layout, "ulysses": degree}, data={"seq_len": seq_len})


def ulysses_worker(rank, world_size, cases):
    """As `kinds_worker`, with heads exchanged."""
    found = []
    for case in cases:
        settings = ulysses_settings(*case)
        module = Decoder(model_of(settings))
        module.init_weights(0)
        seq_len, layout = settings.data.seq_len, settings.parallel.layout
        plan = ringattn.Plan(seq_len, world_size, layout=layout)
        ulysses = ringattn.make_ulysses(dist.group.WORLD, settings.parallel.ulysses, layout=layout)
        attention = functools.partial(ringattn.ring_attention, plan=plan, group=dist.group.WORLD, ulysses=ulysses)
        tokens = torch.arange(plan.shard_len(rank))[None]
        module(tokens, tokens, plan.positions(rank), attention, 16).backward()
        found.append(ulysses.stats.take().bytes_sent)
    return found


GUIDED = {"selection": True, "selection_lag": 12, "selection_guide": True, "selection_gain": "learned"}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ulysses_sends_the_bytes_of_its_plan(world_size):
    cases = [(kind, {}, "zigzag", 2) for kind in KINDS] + [
        ("gqa", {}, layout, 2) for layout in ("striped", "contiguous")
    ]
    cases += [("gqa", SELECTIONS[1], "zigzag", 2), ("sas", GUIDED, "zigzag", 2), ("mla", GUIDED, "contiguous", 2)]
    # As many ranks in a team as there are, some with copies of heads; shards of unequal length.
    cases += [("gqa", {}, "zigzag", world_size, 1), ("gqa", {}, "zigzag", 2, 4), ("gqa", GUIDED, "zigzag", world_size)]
    uneven = ("gqa", {}, "zigzag", world_size, 2, 101)
    sent = run_ranks(ulysses_worker, world_size, [*cases, uneven])
    for number, case in enumerate([*cases, uneven]):
        settings = ulysses_settings(*case)
        plan = ringattn.Plan(settings.data.seq_len, world_size, layout=settings.parallel.layout)
        planned = ulysses_bytes(model_of(settings), plan, 4, settings.parallel.ulysses)
        assert max(rank[number] for rank in sent) == planned.per_row, case
        assert (planned.ring.per_row > 0) == (settings.parallel.ulysses < world_size), case


def test_ulysses_is_described():
    alone, crossed = (render(ulysses_settings("gqa", {}, "zigzag", degree), 4) for degree in (4, 2))
    assert "teams of 4 ranks; no ring is left" in alone
    assert "1 of 4 query and 1 of 2 key/value heads, each on 2 ranks, 64 tokens" in alone
    # 16 tokens to 3 others: a head of q and one each of k and v of 8 x 4 bytes; a head of out
    assert "4.5 KiB there (heads of q, k, v), 1.5 KiB back (out)" in alone
    # 16 tokens to 3 others and of 3 others, there and back, 4 heads of 8 x 4 bytes, 2 layers
    assert "at most 24.0 KiB over 2 layers" in alone
    assert "hops per layer" not in alone
    assert "what travels, per token" not in alone
    assert "teams of 2 ranks; 2 teams form a ring" in crossed
    assert "2 of 4 query and 1 of 2 key/value heads, 32 tokens" in crossed
    assert "1 forward, 1 backward" in crossed
    assert "at most 2.0 KiB (k and v of one rank" in crossed  # 32 tokens x 2 x 8 x 4 bytes
    assert "1.000 times the mean attention work" in crossed
    latent = render(ulysses_settings("mla", GUIDED, "zigzag", 2), 4)
    assert "FLOP forward; at home, before heads are exchanged" in latent
    assert "(heads of q, k, v, queries and keys that vote)" in latent
    assert "2 times, once per rank of a team" in latent
    # 2 layers x 16 tokens x 2 heads of 8 + 4 + 8, 4 bytes
    assert dict(rows_of(latent))["expanded keys and values"] == "5.0 KiB"


def rows_of(text):
    for line in text.splitlines():
        if line.startswith("  "):
            name, value = line.strip().split("  ", 1)
            yield name, value.strip()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mha", ("mha: 4 query and 4 key/value heads of 8", "64 elements, 256 bytes per layer", "4,112")),
        ("mqa", ("mqa: 4 query and 1 key/value heads of 8", "16 elements, 64 bytes per layer", "2,576")),
        ("gqa", ("gqa: 4 query and 2 key/value heads of 8", "32 elements, 128 bytes per layer", "3,088")),
        ("mla", ("a latent of 12 and a rotary key of 4 become 2 keys of 8 + 4", "16 elements, 64 bytes", "3,468")),
        ("tpa", ("queries, keys and values of rank 3, 2 and 1", "30 elements, 120 bytes", "3,136")),
        ("sas", ("become 8 of 12, kernel 3", "32 elements, 128 bytes per layer; 5 times as many on arrival", "4,432")),
    ],
)
def test_every_kind_is_described(kind, expected):
    text = render(settings_of(kind, {}), 4)
    rows = dict(rows_of(text))
    assert all(part in text for part in expected)
    assert rows["parameters per layer"].startswith(expected[2])
    assert ("expanded keys and values" in text) == (kind in ("mla", "tpa", "sas"))
    assert "FLOP causal" in rows["FLOPs per token"]
    assert "selection" not in text


def test_selection_is_described():
    chosen = {"selection": True, "selection_lag": 8, "selection_guide": True, "selection_gain": "learned"}
    text = render(settings_of("gqa", chosen), 4)
    assert "head 0, lag 8, gain learned, guided by shallower layers" in text
    # 16 tokens x 32 elements x 4 bytes, and the keys of half a vote on average: layer 1 counts those of layer 0
    assert (
        "2.2 KiB (k and v of one rank, as far as needed, one message, with shallower layers' votes, mean over layers)"
        in text
    )
    assert "768 B a hop (the selection head's keys)" in text  # 1 and 2 terms of 8 elements
    assert "column states of selection" in text
    assert "head 0, exact, gain 0.5" in render(settings_of("sas", {"selection": True, "selection_gain": 0.5}), 2)
    alone = render(settings_of("gqa", {"selection": True}), 1)
    assert "none: one process holds the whole row" in alone
