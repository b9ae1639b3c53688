"""`--plan` against numbers worked out by hand for a small case, and against what a ring really sends."""

import pytest
import torch
import torch.distributed as dist

import ringattn
from launch.config import Config
from launch.errors import ConfigError
from launch.plan_report import render
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
    assert "3 forward, 3 backward and one home" in text
    assert "2.0 KiB (k and v of one rank" in text  # 16 tokens x 2 x 2 heads x 8 x 4 bytes
    assert "1.000 times the mean attention work" in text


def test_uneven_shards_windows_and_one_process():
    assert "101 tokens, zigzag, 24 to 26 per rank" in render(config(data={"seq_len": 101}), 4)
    windowed = config(parallel={"layout": "contiguous", "window": 8}, data={"seq_len": 64})
    assert "1 forward, 1 backward" in render(windowed, 4)
    assert "none: one process holds the whole row" in render(config(), 1)


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
    expected = 2 * 3 * payload + 4 * payload
    assert run_ranks(sent_worker, 4) == [expected] * 4
    assert expected == 20 * 1024
    assert "20.0 KiB over 1 layers" in render(config(), 4)
