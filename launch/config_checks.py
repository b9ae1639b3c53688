"""What two settings mean together: conflicts (errors), settings without effect (warnings), and the dp x cp mesh.

A check names every key it looked at, so that a key already reported on its own is not reported twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from launch.config_memory import memory_problems
from launch.config_model_checks import GPU_KERNELS, idle_selection, model_problems, selection_problems
from launch.config_problem import Problem
from launch.config_ulysses import ulysses_problems
from launch.errors import ConfigError

if TYPE_CHECKING:
    from launch.config import Config


def cross_problems(config: Config) -> list[Problem]:
    """All the combinations that cannot be honoured, in the order of the sections."""
    checks = (
        model_problems,
        _vocabulary_problems,
        _data_problems,
        selection_problems,
        _kernel_problems,
        _repeatable_problems,
        _mesh_problems,
        memory_problems,
        _optim_problems,
    )
    return [problem for check in checks for problem in check(config)]


def min_seq_len(layout: str, cp: int) -> int:
    """Shortest row (tokens) with which no rank of a ring of `cp` is left empty: zigzag gives each rank two chunks."""
    return 2 * cp if layout == "zigzag" and cp > 1 else cp


def _vocabulary_problems(config: Config) -> Iterator[Problem]:
    needed = {"bytes": 257, "bpe": config.data.bpe_vocab}.get(config.data.tokenizer, 1)
    given = config.model.vocab_size
    if given is not None and given < needed:
        yield Problem(
            keys=("model.vocab_size", "data.tokenizer", "data.bpe_vocab"),
            message=f"expected at least the {needed} tokens of the {config.data.tokenizer} tokenizer, got {given}; "
            "leave it null to take the tokenizer's",
        )


def _data_problems(config: Config) -> Iterator[Problem]:
    data = config.data
    if data.source in ("json", "parquet", "text") and not data.paths:
        yield Problem(
            keys=("data.paths", "data.source"),
            message=f"source {data.source} needs at least one file, folder or glob, got none; "
            f"set for example paths: [corpus/*.{ {'json': 'jsonl', 'text': 'txt'}.get(data.source, data.source) }]",
        )
    if data.source == "hub" and data.name is None:
        yield Problem(
            keys=("data.name", "data.source"),
            message="source hub needs the name of a dataset, got null; set for example name: wikitext",
        )
    held_out = data.held_out_fraction > 0 and data.held_out_rows > 0
    if config.evaluate.every_steps and not held_out:
        yield Problem(
            keys=("evaluate.every_steps", "data.held_out_fraction", "data.held_out_rows"),
            message=f"evaluating every {config.evaluate.every_steps} steps needs held-out data, got "
            f"data.held_out_fraction={data.held_out_fraction} and data.held_out_rows={data.held_out_rows}; "
            "make both positive, or set evaluate.every_steps=0",
        )


def _repeatable_problems(config: Config) -> Iterator[Problem]:
    if config.run.deterministic is True and config.engine.compile is True:
        yield Problem(
            keys=("run.deterministic", "engine.compile"),
            message="expected nothing compiled, got engine.compile=true: the order of compiled sums depends on the "
            "length that came first, so that a resumed run would have other bits; leave engine.compile at auto",
        )


def _kernel_problems(config: Config) -> Iterator[Problem]:
    kernel, device, precision = config.parallel.kernel, config.run.device, config.engine.precision
    wanted = {**dict.fromkeys(GPU_KERNELS, "cuda"), "triton": "cuda", "cpu": "cpu"}.get(kernel)
    if wanted and device not in ("auto", wanted):
        yield Problem(
            keys=("parallel.kernel", "run.device"),
            message=f"kernel {kernel} runs on {wanted} only, got run.device={device}; set kernel: auto, "
            f"or run.device: {wanted}",
        )
    if kernel in GPU_KERNELS and precision != "bf16":
        yield Problem(
            keys=("parallel.kernel", "engine.precision"),
            message=f"kernel {kernel} computes in bf16 only, got engine.precision={precision}; set kernel: auto, "
            "or engine.precision: bf16",
        )


def _mesh_problems(config: Config) -> Iterator[Problem]:
    """What is wrong whatever the number of processes: judged as far as cp and dp are numbers."""
    cp, dp = config.parallel.cp, config.parallel.dp
    if isinstance(cp, int):
        yield from _sequence_problems(config, cp)
        yield from ulysses_problems(config, cp)
    if isinstance(dp, int):
        yield from _batch_problems(config, dp)


def _sequence_problems(config: Config, cp: int) -> Iterator[Problem]:
    layout, seq_len = config.parallel.layout, config.data.seq_len
    needed = min_seq_len(layout, cp)
    if seq_len < needed:
        longest_ring = seq_len // 2 if layout == "zigzag" else seq_len
        yield Problem(
            keys=("data.seq_len", "parallel.cp", "parallel.layout"),
            message=f"layout {layout} over cp={cp} ranks needs at least {needed} tokens per row so that no rank is "
            f"empty, got {seq_len}; raise seq_len or set parallel.cp to at most {max(1, longest_ring)}",
        )


def _batch_problems(config: Config, dp: int) -> Iterator[Problem]:
    rows = config.optim.rows_per_step
    if rows % dp:
        nearest = max(dp, rows // dp * dp)
        yield Problem(
            keys=("optim.rows_per_step", "parallel.dp"),
            message=f"must be a multiple of dp={dp}, since every ring takes as many rows as the others, got {rows}; "
            f"set it to {nearest if nearest == rows // dp * dp + dp else f'{nearest} or {rows // dp * dp + dp}'}",
        )


def _optim_problems(config: Config) -> Iterator[Problem]:
    optim = config.optim
    if optim.warmup_steps > optim.steps:
        yield Problem(
            keys=("optim.warmup_steps", "optim.steps"),
            message=f"expected at most optim.steps={optim.steps}, got {optim.warmup_steps}: "
            "the learning rate would never reach its peak",
        )


def resolve_mesh(config: Config, num_processes: int) -> tuple[int, int]:
    """(dp, cp) for this many processes; see `Config.mesh`."""
    cp, dp = config.parallel.cp, config.parallel.dp
    if dp == "auto":
        dp = num_processes // cp if isinstance(cp, int) else 1
    if cp == "auto":
        cp = num_processes // dp
    if dp * cp != num_processes or not dp or not cp:
        raise ConfigError(_misfit(config, num_processes))
    problems = [*_sequence_problems(config, cp), *ulysses_problems(config, cp), *_batch_problems(config, dp)]
    if problems:
        lines = [f"{problem.keys[0]}: {problem.message}" for problem in problems]
        raise ConfigError("\n".join([f"with {num_processes} processes (dp={dp}, cp={cp}):", *lines]))
    return dp, cp


def _misfit(config: Config, num_processes: int) -> str:
    cp, dp = config.parallel.cp, config.parallel.dp
    head = f"the number of processes does not fit the mesh: got {num_processes} processes"
    if isinstance(cp, int) and isinstance(dp, int):
        return (
            f"{head}, expected parallel.dp * parallel.cp = {dp} * {cp} = {dp * cp}; "
            f"start {dp * cp} processes, or set one of the two to auto"
        )
    name, size = ("cp", cp) if isinstance(cp, int) else ("dp", dp)
    below = num_processes // int(size) * int(size)
    fitting = f"{below} or {below + int(size)}" if below else f"{size}"
    return (
        f"{head}, expected a multiple of parallel.{name}={size}; start {fitting} processes, or change parallel.{name}"
    )


def without_effect(config: Config) -> list[Problem]:
    """Settings that somebody wrote down but that change nothing, each with the reason."""
    given = {f"{name}.{key}" for name in type(config).model_fields for key in getattr(config, name).model_fields_set}
    return [problem for problem in _idle_settings(config) if problem.keys[0] in given]


def _idle_settings(config: Config) -> Iterator[Problem]:
    model, data, parallel, optim = config.model, config.data, config.parallel, config.optim

    def idle(condition: object, key: str, reason: str, *others: str) -> Iterator[Problem]:
        if condition:
            yield Problem(keys=(key, *others), message=f"no effect because {reason}")

    engine = config.engine.name
    yield from idle(engine != "zero", "engine.zero_stage", f"engine.name is {engine}, not zero", "engine.name")
    unscaled = model.rope_scaling == "none"
    yield from idle(unscaled, "model.rope_factor", "model.rope_scaling is none", "model.rope_scaling")
    yield from idle(
        not unscaled and model.rope_factor == 1, "model.rope_scaling", "model.rope_factor is 1", "model.rope_factor"
    )
    yield from idle(
        model.rope_scaling != "yarn" and model.rope_original_len,
        "model.rope_original_len",
        f"model.rope_scaling is {model.rope_scaling}; only yarn uses it",
    )
    for condition, key, reason in idle_selection(config):
        yield from idle(condition, key, reason)
    for key in ("name", "subset", "split", "streaming"):
        value = getattr(data, key)
        if value not in (None, False):
            yield from idle(data.source != "hub", f"data.{key}", f"data.source is {data.source}, not hub")
    from_files = data.source in ("json", "parquet", "text")
    yield from idle(not from_files and data.paths, "data.paths", f"data.source is {data.source}")
    yield from idle(
        data.source in ("python", "text"), "data.field", f"data.source is {data.source}, which has no columns"
    )
    yield from idle(data.tokenizer != "bpe", "data.bpe_vocab", f"data.tokenizer is {data.tokenizer}, not bpe")
    yield from idle(not data.held_out_fraction, "data.held_out_rows", "data.held_out_fraction is 0")
    yield from idle(not data.held_out_rows, "data.held_out_fraction", "data.held_out_rows is 0")
    yield from idle(
        parallel.window is None and parallel.sinks,
        "parallel.sinks",
        "parallel.window is null: all keys are seen anyway",
    )
    yield from idle(
        parallel.window is not None and parallel.window >= data.seq_len,
        "parallel.window",
        f"it is not shorter than data.seq_len={data.seq_len}",
    )
    yield from idle(
        parallel.transport != "auto" and parallel.ulysses == parallel.cp and parallel.ulysses not in (1, "auto"),
        "parallel.transport",
        f"parallel.ulysses is parallel.cp={parallel.cp}: no ring is left",
        "parallel.ulysses",
        "parallel.cp",
    )
    yield from idle(optim.schedule == "constant", "optim.min_lr_ratio", "optim.schedule is constant")


def _listed(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers)
