"""The self-check at the start of a run: every kind of attention passes it, and a run that is wrong ends at once."""

import re
from pathlib import Path

import pytest
import torch

from launch.carrier import make_carrier
from launch.config import Config
from launch.errors import EXIT_DONE, EXIT_NUMERICS
from launch.ranks import Ranks
from launch.selfcheck import check_attention
from launch.status import read_status
from launch.topology import Topology
from model.config import preset
from tests.launch.runs import losses, settings, train_worker, write_corpus
from tests.launch.test_attention_kinds import GUIDED, KINDS
from tests.processes import run_ranks

MODELS = {
    "gqa": {},
    "gqa guided": {**GUIDED, "selection_memory_eps": 0.1},
    "gqa window": {},
    **{kind: {"attention": kind, **KINDS[kind]} for kind in ("mla", "tpa", "sas")},
    "sas guided": {"attention": "sas", **KINDS["sas"], **GUIDED},
    "gqa guided ulysses": GUIDED,
    "tpa ulysses": {"attention": "tpa", **KINDS["tpa"]},
}


def kinds_worker(rank, world_size):
    told = {}
    for name, model in MODELS.items():
        nested = settings(Path("corpus.jsonl"), Path("run"), engine__precision="bf16" if name == "mla" else "fp32")
        nested["model"] |= model
        if "ulysses" in name:
            nested["parallel"]["ulysses"] = 2
        if name == "gqa window":
            nested["parallel"] |= {"window": 8, "sinks": 2, "layout": "striped"}
        config = Config(**nested)
        topology = Topology.start(config)
        ranks = Ranks(rank=topology.rank, world_size=topology.world_size, group=topology.cpu_group)
        torch.manual_seed(3)
        before = torch.get_rng_state()
        shape = preset("test", **{"vocab_size": 257, **config.model.overrides()})
        told[name] = check_attention(config, topology, shape, make_carrier(config, topology), ranks)
        assert torch.equal(torch.get_rng_state(), before)
    return told


def test_every_kind_of_attention_passes():
    for line in run_ranks(kinds_worker, 2)[0].values():
        found = re.fullmatch(
            r"self-check: attention is exact on 2 ranks, \d+ tokens, largest errors out \S+, dq \S+, dk \S+, dv \S+; "
            r"(\S+) s",
            line,
        )
        assert found, line
        assert float(found[1]) < 5.0


def broken_worker(rank, world_size, runs):
    """Rank 1's kernel forgets the causal mask."""
    from ringattn.kernels import KERNELS

    kernel = KERNELS["cpu"]
    forward = type(kernel).forward

    def forgetful(self, q, k, v, *, causal, mask, scale):
        return forward(self, q, k, v, causal=causal and rank != 1, mask=mask, scale=scale)

    type(kernel).forward = forgetful
    return train_worker(rank, world_size, runs)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_wrong_kernel_on_one_rank_ends_the_run_before_the_first_step(corpus, tmp_path):
    checked, unchecked = (
        settings(corpus, tmp_path / str(check), optim__steps=1, parallel__self_check=check, parallel__cp=2)
        for check in (True, False)
    )
    for nested in (checked, unchecked):
        nested["optim"]["warmup_steps"] = 0
    statuses = run_ranks(broken_worker, 4, [checked, unchecked])
    assert statuses == [[EXIT_NUMERICS, EXIT_DONE]] * 4  # of both rings, although one of them is right
    message = read_status(tmp_path / "True").message
    assert "out on rank 1, expected within" in message
    assert "queries of rank 1 get from keys of rank 1 (hop 0)" in message
    assert "with kernel='reference' it is right" in message
    assert "parallel.self_check=false" in message
    assert not (tmp_path / "True" / "metrics.jsonl").exists()
    assert len(losses(tmp_path / "False")) == 1
