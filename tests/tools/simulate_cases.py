"""Toy machines for the simulated ring, whose times can be checked by eye, a real one, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

import ringattn
from tools.bench.problem import Point
from tools.bench.rows import row_of, timed, with_percentages, write_files
from tools.simulate.case import PASSES, Case
from tools.simulate.events import Pass, simulate
from tools.simulate.machine import Kernels, Machine, MachineFile, Transport
from tools.simulate.work import work_of
from tools.simulate_ring import app

LAYOUTS = ("contiguous", "zigzag", "striped")


def plain(**changes: Any) -> Transport:
    """A transport that costs nothing but bytes: one byte takes a second."""
    fields: dict[str, Any] = {
        "name": "toy",
        "variants": "",
        "intra": ((1.0, 1.0),),
        "latency": 0.0,
        "sm_share": 0.0,
        "ahead": 0.0,
        "slots": 0,
        "barrier": 0.0,
        "peers": False,
        "graphs": "never",
        "graph": 0.0,
        "call": 0.0,
        "hop": {"forward": 0.0, "backward": 0.0},
    }
    return Transport(**{**fields, **changes})


def toy(rate: float = 1.0, per_host: int = 1_000_000, inter: float = 1.0, **changes: Any) -> Machine:
    """A machine of `rate` FLOP/s, whatever the block."""
    return Machine(
        source="toy",
        kernels=Kernels(
            heads=1, sizes=np.array([1.0]), rates={what: np.full((3, 1), rate, dtype=float) for what in PASSES}
        ),
        transport=plain(**changes),
        per_host=per_host,
        inter=inter,
        ideal={"forward": 0.0, "backward": 0.0},
        memory=0.0,
        dense=1.0,
        peak=1.0,
    )


def layer(*plan: Any, **more: Any) -> Case:
    """One head of width 1 in bf16: 4 FLOPs per pair forward and 10 backward, 4 bytes per token of the payload."""
    return Case(plan=ringattn.Plan(*plan, **more), heads=1, kv_heads=1, head_dim=1, dtype="bf16")


def run(case: Case, machine: Machine, what: str = "forward") -> Pass:
    return simulate(work_of(case.plan), machine, case, what)


def no_time(link: float = np.inf, **changes: Any) -> Machine:
    return toy(intra=((1.0, link),), inter=link, **changes)


def h100(transport: str, per_host: int = 8) -> Machine:
    file = MachineFile()
    return Machine(
        source=file.source,
        kernels=file.kernels,
        transport=file.transport(transport),
        per_host=per_host,
        inter=50e9,
        ideal=file.ideal,
        memory=file.memory,
        dense=file.dense,
        peak=file.peak,
    )


def real(num_ranks: int, layout: str = "zigzag", tokens: int = 8192, **mask: Any) -> Case:
    plan = ringattn.Plan(num_ranks * tokens, num_ranks, layout=layout, **mask)
    return Case(plan=plan, heads=16, kv_heads=16, head_dim=128, dtype="bf16")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def measured(folder: Path, **changes: Any) -> None:
    """Results as tools.bench_attention writes them."""
    point = Point(
        **{
            "tokens_per_rank": 8192,
            "heads": 16,
            "kv_heads": 16,
            "head_dim": 128,
            "causal": True,
            "layout": "zigzag",
            "dtype": "bf16",
            "num_ranks": 2,
            **changes,
        }
    )
    rows = [
        timed(row_of("ideal", point, "ok"), point, 1.0, 4.0),
        timed(row_of("ours p2p", point, "ok"), point, 2.0, 5.0),
        timed(row_of("ours copy_engine", point, "ok"), point, 1.5, 4.5),
        timed(row_of("all-to-all", point, "ok"), point, 1.2, 4.1),
        row_of("ours broken", point, "failed", note="planted"),
    ]
    write_files(with_percentages(rows), {}, folder)
