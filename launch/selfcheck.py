"""The self-check at the start of a run: its attention, as the model will call it, against the float64 definition."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ringattn
from launch.carrier import Carrier
from launch.config import Config
from launch.errors import NumericsError, everywhere
from launch.ranks import Ranks
from launch.topology import Topology
from model.attention_kinds import build_attention
from model.config import ModelConfig
from model.kinds import attention_shape
from model.rope import rotation


def check_attention(
    config: Config, topology: Topology, model: ModelConfig, carrier: Carrier | None, ranks: Ranks
) -> str:
    """Run `ringattn.self_check` with this run's parts, every ring its own.

    Returns:
        One line for the log.

    Raises:
        NumericsError: On all ranks of the run, if any ring is wrong.
    """
    call = _recorded_call(model)
    parallel = config.parallel
    problem, report = None, None
    try:
        report = ringattn.self_check(
            heads=call.q.shape[2],
            kv_heads=attention_shape(model).key_heads,
            head_dim=call.q.shape[3],
            value_dim=attention_shape(model).value_dim,
            payload=(tuple(call.k.shape[2:]), tuple(call.v.shape[2:])),
            group=topology.cp_group if topology.cp > 1 else None,
            layout=parallel.layout,
            window=parallel.window,
            sinks=parallel.sinks,
            documents=not config.data.cross_document_attention,
            dtype=torch.bfloat16 if config.engine.precision == "bf16" else torch.float32,
            device=topology.device,
            kernel=parallel.kernel,
            guided=model.selection is not None and model.selection.guide,
            **({} if carrier is None else carrier.options),
            **call.scoring(),
        )
    except ringattn.SelfCheckError as error:
        problem = str(error)
    problems = [text for text in ranks.all_gather(problem) if text is not None]
    if problems:
        told = "\n".join(dict.fromkeys(problems))  # the ranks of a ring say the same
        raise everywhere(
            NumericsError(
                f"{told}\n  The keys are parallel.kernel, parallel.transport and parallel.ulysses; nothing was "
                "trained. parallel.self_check=false trains all the same"
            )
        )
    assert report is not None
    errors = ", ".join(f"{name} {report.errors[name]:.1e}" for name in ("out", "dq", "dk", "dv"))
    where = f"{report.cp_size} rank{'s' if report.cp_size > 1 else ''}, {report.seq_len} tokens"
    compiled = f", {report.compiling:.2f} of them for compiling kernels" if report.compiling else ""
    return f"self-check: attention is exact on {where}, largest errors {errors}; {report.seconds:.2f} s{compiled}"


@dataclass(frozen=True, kw_only=True)
class _Call:
    """How a layer calls its attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]

    def scoring(self) -> dict[str, Any]:
        options = dict(self.options)
        expand = options.pop("expand", None)
        return {**options, "expand": None if expand is None else lambda: copy.deepcopy(expand)}


def _recorded_call(model: ModelConfig) -> _Call:
    """Shapes, scale, selection and expansion, from a layer of the model itself: nothing here can fall behind it."""
    calls = []

    def record(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(_Call(q=q, k=k, v=v, options=options))
        return q.new_zeros(*q.shape[:3], attention_shape(model).value_dim)

    with torch.random.fork_rng(devices=[]), torch.no_grad():  # the run's random numbers stay what they are
        attention = build_attention(model, 0)
        positions = torch.arange(2)
        attention(torch.zeros(1, 2, model.dim), rotation(model, positions, torch.float32), record)
    return calls[0]
