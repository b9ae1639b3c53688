"""What the hardware does: rates of kernels, links, and what the host costs. Read from a YAML file such as h100.yaml."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launch.rates import BLOCKS, H100, RatesFile, parse_link
from ringattn.kernels import WORTH_A_PLAN
from ringattn.transport.copy_engine import GRAPH_BYTES
from tools.simulate.case import PASSES, Case
from tools.simulate.work import CAUSAL, FULL, HopWork

Floats = npt.NDArray[np.float64]

GRAPHS = ("never", "short", "always")


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernels:
    """FLOP/s of a block by its size, the square root of queries x keys, at `heads` query heads.

    Attributes:
        sizes: [n], increasing.
        rates: pass -> [3, n], rows FULL, CAUSAL, MASKED.
        flash: pass -> [3], the most that flash reaches, which takes blocks of sizes that are not worth a plan.
    """

    heads: int
    sizes: Floats
    rates: dict[str, Floats]
    flash: dict[str, Floats] = field(default_factory=lambda: dict.fromkeys(PASSES, np.full(3, np.inf)))

    def seconds(self, what: str, case: Case, work: HopWork) -> Floats:
        """[blocks]: how long each takes. Of a causal block the rows that see all columns are as a full block's."""
        size = np.sqrt(work.rows * work.columns * (work.share * case.heads / self.heads))
        whole = np.where(work.kind == CAUSAL, (work.rows - work.columns) * work.columns, 0) * work.share
        flash = self._on_flash(what, case, work)
        by_kind = (work.pairs - whole) / self._rate(what, size, work.kind, flash)
        as_full = whole / self._rate(what, size, np.full_like(work.kind, FULL), flash)
        return case.flops(what, 1.0) * (by_kind + as_full)

    def _on_flash(self, what: str, case: Case, work: HopWork) -> npt.NDArray[np.bool_]:
        """[blocks]: which the library leaves to it (`ringattn.softmax`): cut by documents, and not worth a plan."""
        share = np.where(work.kind == CAUSAL, 0.5, 1.0)
        operations = case.flops(what, case.groups) * share * work.rows * work.columns
        found: npt.NDArray[np.bool_] = work.cut & (operations < WORTH_A_PLAN)
        return found

    def rate(self, what: str, size: float, kind: int) -> float:
        return float(self._rate(what, np.array([size]), np.array([kind]), np.zeros(1, dtype=bool))[0])

    def _rate(self, what: str, size: Floats, kind: npt.NDArray[np.int64], flash: npt.NDArray[np.bool_]) -> Floats:
        where = np.log2(np.maximum(size, 1.0))
        lines = [np.interp(where, np.log2(self.sizes), line) for line in self.rates[what]]
        rates = np.choose(kind, lines)
        return np.where(flash, np.minimum(rates, self.flash[what][kind]), rates)


@dataclass(frozen=True, kw_only=True)
class Transport:
    """How bytes move, and what a ring on top of it costs the host. Seconds.

    Attributes:
        variants: pattern of the names that tools.bench_attention gives it.
        intra: (bytes of a message, bytes/s) inside a host, by size.
        sm_share: part of a rank's speed that is lost while it receives a payload or gives gradients back.
        ahead: bytes of payloads under way to a rank at a time; two payloads at least.
        slots: gradients gather at their owner in so many slots until all ranks meet; 0: it adds up those of each hop.
        barrier: a meeting of all ranks, before and after each pass, and where slots are full.
        peers: payloads lie in memory that all ranks reach: each rank copies its own there first, and hops are joined.
        graphs: passes are CUDA graphs "never", for "short" shards (the transport's own) or "always" (the caller's).
        graph: start of a graph of the transport's own, beside the copies of its inputs and results.
        call: the host's work per pass beside its hops; none in a graph.
        hop: the host's work per hop with anything to do, by pass; none in a graph.
        between: the transport between hosts, where this one only serves pairs inside; None: this one.
        by_host: with `between`: the plan goes host by host (`Plan.hosts`).
    """

    name: str
    variants: str
    intra: tuple[tuple[float, float], ...]
    latency: float
    sm_share: float
    ahead: float
    slots: int
    barrier: float
    peers: bool
    graphs: str
    graph: float
    call: float
    hop: dict[str, float]
    between: Transport | None = None
    by_host: bool = False

    def changed(self, **changes: Any) -> Transport:
        """With other values; a latency is that of transfers between hosts, too."""
        between = self.between
        if between is not None and "latency" in changes:
            changes["between"] = replace(between, latency=changes["latency"])
        return replace(self, **changes)

    def captures(self, case: Case) -> bool:
        """Whether the transport runs the passes as graphs of its own, see `CopyEngineTransport`.

        With documents those of a row's layers from the third on: it launches the first, and captures in the second.
        """
        if self.graphs != "short" or case.num_ranks == 1:
            return False
        widest = max(case.heads * case.head_dim, case.payload_elements) * case.element_bytes
        return widest * case.plan.longest_shard <= GRAPH_BYTES

    def bandwidth(self, sizes: Floats) -> Floats:
        """Bytes/s of messages of these sizes inside a host."""
        at, rates = zip(*self.intra, strict=True)
        if len(rates) == 1:
            return np.full(len(sizes), rates[0])
        return np.interp(np.log2(np.maximum(sizes, 1.0)), np.log2(at), rates)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Everything that `simulate` needs besides the case.

    Attributes:
        per_host: ranks of one host, neighbours in the ring.
        inter: bytes/s between hosts, per rank: a message goes through one network card, which is the GPU's own.
        memory: bytes/s of merges and sums of gradients; 0 leaves them out.
        dense: FLOP/s of the rest of a training step.
        peak: FLOP/s that utilisation refers to.
    """

    source: str
    kernels: Kernels
    transport: Transport
    per_host: int
    inter: float
    ideal: dict[str, float]
    memory: float
    dense: float
    peak: float

    def plan_hosts(self, num_ranks: int) -> int:
        """What a plan of so many ranks says of hosts."""
        return max(1, num_ranks // self.per_host) if self.transport.by_host else 1

    def blocks(self, what: str, case: Case, work: HopWork) -> Floats:
        """[blocks]: how long each takes."""
        return self.kernels.seconds(what, case, work) + self.grouped(what, case, work.columns * work.share)

    def grouped(self, what: str, case: Case, columns: Any) -> Any:
        """Seconds to sum gradients over the query heads of a key head: each query head's are written and read."""
        if what == "forward" or case.heads == case.kv_heads:
            return columns * 0.0
        return self.touching(columns * (4 * case.heads * case.head_dim * case.element_bytes))

    def touching(self, num_bytes: Any) -> Any:
        """Seconds to read or write so many bytes."""
        return num_bytes / self.memory if self.memory else num_bytes * 0.0


class MachineFile(RatesFile):
    """The checked contents of a file of rates, with what only the simulated ring asks for.

    Raises:
        ValueError: one line that names the file, the field, what was expected and what was given.
    """

    def __init__(self, path: Path = H100) -> None:
        super().__init__(path)
        table = [self.blocks[what][kind] for what in PASSES for kind in BLOCKS]
        rates = 1e12 * np.array(table, dtype=float).reshape(len(PASSES), len(BLOCKS), -1)
        sizes = np.array(self.sizes, dtype=float)
        flash = {
            what: np.array([*(1e12 * self._positive(f"flash_tflops.{kind}_{what}") for kind in BLOCKS[:2]), np.inf])
            for what in PASSES
        }
        by_pass = dict(zip(PASSES, rates, strict=True))
        self.kernels = Kernels(heads=self.heads, sizes=sizes, rates=by_pass, flash=flash)
        self.ideal = self._by_pass("ideal_us")
        self.transports = {str(name): self._transport(str(name)) for name in self._get("transports", dict)}

    def check(self, case: Case) -> None:
        """Whether the rates are those of this case."""
        if case.dtype not in self.dtypes:
            raise ValueError(
                f"--dtype: the rates of {self._path.name} are for {', '.join(self.dtypes)}, not {case.dtype}"
            )
        if case.head_dim != self.head_dim:
            raise ValueError(
                f"--head-dim: the rates of {self._path.name} are for {self.head_dim}, not {case.head_dim}; "
                "give others with --kernel-rates"
            )

    def transport(self, name: str) -> Transport:
        if name not in self.transports:
            raise ValueError(f"--transport: expected one of {_quoted(self.transports)}, got {name!r}")
        return self.transports[name]

    def transport_of(self, variant: str) -> Transport | None:
        """The one that a row of tools.bench_attention was measured with."""
        return next((entry for entry in self.transports.values() if fnmatch(variant, entry.variants)), None)

    def _transport(self, name: str) -> Transport:
        where = f"transports.{name}"
        try:
            intra = parse_link(str(self._get(f"{where}.intra", object)))
        except ValueError as error:
            raise ValueError(f"{self._path}: {where}.intra: {error}") from error
        between = self._get(where, dict).get("between")
        whole = [other for other, entry in self._found["transports"].items() if "between" not in (entry or ())]
        if between is not None and between not in whole:
            raise ValueError(f"{self._path}: {where}.between: expected one of {_quoted(whole)}, got {between!r}")
        return Transport(
            name=name,
            variants=str(self._get(f"{where}.variants", str)),
            intra=intra,
            latency=self._number(f"{where}.latency_us") * 1e-6,
            sm_share=self._share(f"{where}.sm_share"),
            ahead=self._number(f"{where}.ahead_mib") * 2**20,
            slots=int(self._get(f"{where}.slots", int)),
            barrier=self._number(f"{where}.barrier_us") * 1e-6,
            peers=bool(self._get(f"{where}.peers", bool)),
            graphs=self._one_of(f"{where}.graphs", GRAPHS),
            graph=self._number(f"{where}.graph_us") * 1e-6,
            call=self._number(f"{where}.call_us") * 1e-6,
            hop=self._by_pass(f"{where}.hop_us"),
            between=None if between is None else self._transport(str(between)),
            by_host=between is not None and bool(self._get(f"{where}.by_host", bool)),
        )


def _quoted(names: Iterable[str]) -> str:
    """In quotes, as names hold commas."""
    return ", ".join(map(repr, names))
