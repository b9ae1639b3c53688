"""`parallel.ulysses: auto`: the degree that was measured to be fastest for a run's shape, and why, in one line.

The measured lines are in `h100.yaml`. A line also holds for fewer and narrower heads, whose kernels and messages are
shorter. Where nothing was measured, the ring alone stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.config import Config, DataConfig
from launch.config_ulysses import heads_problem
from launch.rates import RatesFile, UlyssesLine, UlyssesRates
from model.config import ModelConfig
from model.kinds import AttentionShape, attention_shape

if TYPE_CHECKING:
    from launch.data.ingest import IngestReport
    from launch.ranks import Ranks
    from launch.topology import Topology


@dataclass(frozen=True, kw_only=True)
class RingFacts:
    """What a run's rings are made of, and what they read; the same on all ranks.

    Attributes:
        gpus: Names of their GPUs, each once; none where they compute on CPUs.
        hosts: That a ring spans, at most.
        documents: Of a row, on average; None where that is not known.
        assumed: This is not the machine of the run.
    """

    gpus: tuple[str, ...]
    hosts: int
    documents: float | None
    assumed: bool = False


@dataclass(frozen=True, kw_only=True)
class UlyssesChoice:
    """A degree, and the reason in words."""

    degree: int
    reason: str

    def line(self) -> str:
        """For the log and `--plan`."""
        return f"{self.degree} (auto): {self.reason}"


def ring_facts(topology: Topology, data: DataConfig, report: IngestReport) -> RingFacts:
    """Of a run that has read its data. Collective."""
    import torch

    from ringattn.transport.peer_memory import host_name

    device = topology.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    everyone = topology.gather_objects((host_name(), name))
    rings = [everyone[first : first + topology.cp] for first in range(0, len(everyone), topology.cp)]
    known = report.cut_documents is not None and report.training_tokens > 0  # a stream's are not
    return RingFacts(
        gpus=tuple(sorted({name for _, name in everyone if name is not None})),
        hosts=max(len({host for host, _ in ring}) for ring in rings),
        # one more than the documents that begin there: a row's first one has begun before
        documents=1 + data.seq_len * report.training_documents / report.training_tokens if known else None,
    )


def ulysses_of_run(
    config: Config, topology: Topology, ranks: Ranks, model: ModelConfig, report: IngestReport
) -> UlyssesChoice | None:
    """The choice of a run that has read its data; None if the degree is configured. Collective."""
    if config.parallel.ulysses != "auto":
        return None
    facts = ring_facts(topology, config.data, report)
    return ranks.agree("choosing parallel.ulysses", lambda: choose_ulysses(config, model, topology.cp, facts))


def planned_facts(config: Config, cp: int) -> RingFacts:
    """For `--plan`, which reads no data: of this machine's GPUs, or where it has none of those that were measured."""
    import torch

    if config.run.device == "cpu":
        return RingFacts(gpus=(), hosts=1, documents=None)
    if not torch.cuda.is_available():
        return RingFacts(gpus=RatesFile().ulysses().gpus[:1], hosts=1, documents=None, assumed=True)
    hosts = -(-cp // torch.cuda.device_count())
    return RingFacts(gpus=(torch.cuda.get_device_name(),), hosts=hosts, documents=None)


def choose_ulysses(
    config: Config, model: ModelConfig, cp: int, facts: RingFacts, rates: RatesFile | None = None
) -> UlyssesChoice:
    """The degree for rings of `cp` ranks; 1 is the ring alone.

    Raises:
        ValueError: the file of rates is wrong.
    """
    rates = rates or RatesFile()
    table, tokens, shape = rates.ulysses(), -(-config.data.seq_len // cp), attention_shape(model)
    if cp == 1:
        return UlyssesChoice(degree=1, reason="one process holds the whole row")
    where = f"if this runs on {' or '.join(table.gpus)} GPUs of one host: " if facts.assumed else ""
    problem = next(_unmeasured(config, model, shape, facts, table, rates.dtypes), None)
    if problem is not None:
        return UlyssesChoice(degree=1, reason=f"nothing was measured {problem}")
    lines = [line for line in table.lines if line.ranks == cp and _covers(line, shape)]
    if not lines:
        heads = f"{shape.heads}/{shape.key_heads} heads of {shape.score_dim}"
        return UlyssesChoice(degree=1, reason=f"{where}nothing was measured for {cp} ranks and {heads}")
    count = 1 if config.data.cross_document_attention else facts.documents
    found = _decide(lines, tokens, count)
    refusals = [_refusal(line, shape, cp) for line in lines]
    refused = next((text for text in refusals if text is not None), None)
    if refused is not None and (found.degree > 1 or count is None):
        found = _decide([line for line, text in zip(lines, refusals, strict=True) if text is None], tokens, count)
        found = found if found.degree > 1 else UlyssesChoice(degree=1, reason=refused)
    return UlyssesChoice(degree=found.degree, reason=where + found.reason)


def with_ulysses(config: Config, choice: UlyssesChoice) -> Config:
    """`config` with the degree in place of `auto`, checked again."""
    parallel = config.parallel.model_copy(update={"ulysses": choice.degree})
    return Config(**{**dict(config), "parallel": parallel})


def _unmeasured(
    config: Config,
    model: ModelConfig,
    shape: AttentionShape,
    facts: RingFacts,
    table: UlyssesRates,
    dtypes: Sequence[str],
) -> Iterator[str]:
    """Where a run differs from what was measured."""
    parallel, precision = config.parallel, config.engine.precision
    if not facts.gpus:
        yield "on CPUs"
    if not all(any(known in name for known in table.gpus) for name in facts.gpus):
        yield f"on {', '.join(facts.gpus)}, only on {' and '.join(table.gpus)}"
    if facts.hosts > 1:
        yield f"in rings over {facts.hosts} hosts"
    if precision not in dtypes:
        yield f"in {precision}"
    if shape.payload_flops:
        yield f"with attention {model.attention}, whose expanded heads would travel"
    if model.selection is not None:
        yield "with selection, whose votes every rank of a team would compute"
    if parallel.layout != "zigzag":
        yield f"in layout {parallel.layout}"
    if parallel.window is not None:
        yield "with a window"
    if parallel.kernel not in ("auto", "cudnn"):
        yield f"with kernel {parallel.kernel}"
    if parallel.transport not in ("auto", "copy_engine"):
        yield f"against transport {parallel.transport}"


def _covers(line: UlyssesLine, shape: AttentionShape) -> bool:
    """Whether the line's heads make as much work and as many bytes, or more."""
    most = max(degree for _, degree in line.fastest)
    sent, measured = max(shape.key_heads, most), max(line.kv_heads, most)  # fewer than members are copied
    return (
        shape.heads * shape.score_dim <= line.heads * line.head_dim
        and sent * shape.score_dim <= measured * line.head_dim
    )


def _refusal(line: UlyssesLine, shape: AttentionShape, cp: int) -> str | None:
    """Why these heads cannot be exchanged in the line's degrees."""
    found = (heads_problem(shape.heads, shape.key_heads, cp, degree) for _, degree in line.fastest)
    return next((text for text in found if text is not None), None)


def _decide(lines: Sequence[UlyssesLine], tokens: int, count: float | None) -> UlyssesChoice:
    return _unknown(lines, tokens) if count is None else _known(lines, tokens, max(1, round(count)))


def _known(lines: Sequence[UlyssesLine], tokens: int, count: int) -> UlyssesChoice:
    """With `count` documents in a row: what the lines with next fewer and next more of them have in common."""
    counts = {line.documents for line in lines}
    fewer, more = [n for n in counts if n <= count], [n for n in counts if n >= count]
    rows = f"rows of {'one document' if count == 1 else f'about {count} documents'}"
    if not fewer or not more:
        return UlyssesChoice(degree=1, reason=f"nothing was measured with {rows}")
    found = [
        _at(min((line for line in lines if line.documents == n), key=_width), tokens) for n in {max(fewer), min(more)}
    ]
    degrees = {degree for degree, _ in found}
    what = f"{tokens:,} tokens per rank in {rows}"
    if len(degrees) > 1 or degrees == {1}:
        return UlyssesChoice(degree=1, reason=f"no exchange of heads was measured to be 10% faster at {what}")
    until = min(until for _, until in found)
    reason = f"{what}: exchanging heads was measured to be fastest up to {until:,}"
    return UlyssesChoice(degree=degrees.pop(), reason=reason)


def _unknown(lines: Sequence[UlyssesLine], tokens: int) -> UlyssesChoice:
    """With any number of documents."""
    counts = sorted({line.documents for line in lines if line.documents > 1})
    better = [(count, found.degree) for count in counts if (found := _known(lines, tokens, count)).degree > 1]
    if not better:
        told = f"no exchange of heads was measured to be 10% faster at {tokens:,} tokens per rank"
        return UlyssesChoice(degree=1, reason=told)
    most, degree = better[-1]
    unknown = "which is not known before the data is read, or of a stream"
    told = f"{tokens:,} tokens per rank; {degree} instead if rows hold 2 to {most} documents, {unknown}"
    return UlyssesChoice(degree=1, reason=told)


def _at(line: UlyssesLine, tokens: int) -> tuple[int, int]:
    """(degree, up to how many tokens per rank); beyond all that was measured the ring."""
    return next(((degree, until) for until, degree in line.fastest if tokens <= until), (1, tokens))


def _width(line: UlyssesLine) -> int:
    """Of queries, keys and values: of several lines that hold for a shape the nearest counts."""
    return (line.heads + 2 * line.kv_heads) * line.head_dim
