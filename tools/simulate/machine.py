"""What the hardware does: rates of kernels, links, and what the host costs. Read from a YAML file such as h100.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from ringattn.transport.copy_engine import GRAPH_BYTES
from tools.simulate.case import PASSES, Case
from tools.simulate.work import CAUSAL, FULL, HopWork

Floats = npt.NDArray[np.float64]

H100 = Path(__file__).parent / "h100.yaml"
GRAPHS = ("never", "short", "always")
_KINDS = ("full", "causal", "masked")


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernels:
    """FLOP/s of a block by its size, the square root of queries x keys, at `heads` query heads.

    Attributes:
        sizes: [n], increasing.
        rates: pass -> [3, n], rows FULL, CAUSAL, MASKED.
    """

    heads: int
    sizes: Floats
    rates: dict[str, Floats]

    def seconds(self, what: str, case: Case, work: HopWork) -> Floats:
        """[blocks]: how long each takes. Of a causal block the rows that see all columns are as a full block's."""
        size = np.sqrt(work.rows * work.columns * (case.heads / self.heads))
        whole = np.where(work.kind == CAUSAL, (work.rows - work.columns) * work.columns, 0)
        by_kind = (work.pairs - whole) / self._rate(what, size, work.kind)
        return case.flops(what, 1.0) * (by_kind + whole / self._rate(what, size, np.full_like(work.kind, FULL)))

    def rate(self, what: str, size: float, kind: int) -> float:
        return float(self._rate(what, np.array([size]), np.array([kind]))[0])

    def _rate(self, what: str, size: Floats, kind: npt.NDArray[np.int64]) -> Floats:
        where = np.log2(np.maximum(size, 1.0))
        lines = [np.interp(where, np.log2(self.sizes), line) for line in self.rates[what]]
        return np.choose(kind, lines)


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

    def captures(self, case: Case) -> bool:
        """Whether the transport runs the passes as graphs of its own, see `CopyEngineTransport`."""
        if self.graphs != "short" or case.num_ranks == 1 or case.plan.documents is not None:
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
        inter: bytes/s between hosts, per rank; the ranks of a host share what they have together.
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

    def blocks(self, what: str, case: Case, work: HopWork) -> Floats:
        """[blocks]: how long each takes."""
        return self.kernels.seconds(what, case, work) + self.grouped(what, case, work.columns)

    def grouped(self, what: str, case: Case, columns: Any) -> Any:
        """Seconds to sum gradients over the query heads of a key head: each query head's are written and read."""
        if what == "forward" or case.heads == case.kv_heads:
            return columns * 0.0
        return self.touching(columns * (4 * case.heads * case.head_dim * case.element_bytes))

    def touching(self, num_bytes: Any) -> Any:
        """Seconds to read or write so many bytes."""
        return num_bytes / self.memory if self.memory else num_bytes * 0.0


class MachineFile:
    """The checked contents of a file of rates.

    Raises:
        ValueError: one line that names the file, the field, what was expected and what was given.
    """

    def __init__(self, path: Path = H100) -> None:
        self._path = path
        try:
            found = yaml.safe_load(path.read_text())
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path}: expected a mapping, such as {H100.name}")
        self._found: dict[str, Any] = found
        self.source = str(self._get("source", str))
        self.dtypes = [str(name) for name in self._get("dtypes", list)]
        self.head_dim = int(self._get("head_dim", int))
        self.kernels = self._kernels()
        self.ideal = self._by_pass("ideal_us")
        self.memory = self._number("memory_gbps") * 1e9
        self.dense, self.peak = (self._positive(name) * 1e12 for name in ("dense_tflops", "peak_tflops"))
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
            raise ValueError(f"--transport: expected one of {', '.join(self.transports)}, got {name!r}")
        return self.transports[name]

    def transport_of(self, variant: str) -> Transport | None:
        """The one that a row of tools.bench_attention was measured with."""
        return next((entry for entry in self.transports.values() if fnmatch(variant, entry.variants)), None)

    def _kernels(self) -> Kernels:
        names = ["size", *(f"{kind}_{what}" for what in PASSES for kind in _KINDS)]
        table = [self._numbers(f"kernels.{name}") for name in names]
        if len({len(line) for line in table}) > 1:
            raise ValueError(
                f"{self._path}: kernels: expected lines of one length, got {[len(line) for line in table]}"
            )
        sizes, *lines = (np.array(line, dtype=float) for line in table)
        if not len(sizes) or np.any(np.diff(sizes) <= 0) or min(line.min() for line in (sizes, *lines)) <= 0:
            raise ValueError(f"{self._path}: kernels: expected increasing sizes and rates above 0")
        return Kernels(
            heads=int(self._positive("heads")),
            sizes=sizes,
            rates={what: 1e12 * np.stack(lines[3 * number : 3 * number + 3]) for number, what in enumerate(PASSES)},
        )

    def _transport(self, name: str) -> Transport:
        where = f"transports.{name}"
        try:
            intra = parse_link(str(self._get(f"{where}.intra", object)))
        except ValueError as error:
            raise ValueError(f"{self._path}: {where}.intra: {error}") from error
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
        )

    def _get(self, name: str, kind: type) -> Any:
        value: Any = self._found
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"{self._path}: {name}: missing")
            value = value[part]
        if not isinstance(value, kind):
            raise ValueError(f"{self._path}: {name}: expected {kind.__name__}, got {value!r}")
        return value

    def _number(self, name: str) -> float:
        return _checked(f"{self._path}: {name}", self._get(name, object))

    def _positive(self, name: str) -> float:
        value = self._number(name)
        if not value:
            raise ValueError(f"{self._path}: {name}: expected more than 0")
        return value

    def _one_of(self, name: str, known: tuple[str, ...]) -> str:
        value = str(self._get(name, str))
        if value not in known:
            raise ValueError(f"{self._path}: {name}: expected one of {', '.join(known)}, got {value!r}")
        return value

    def _share(self, name: str) -> float:
        value = self._number(name)
        if value >= 1:
            raise ValueError(f"{self._path}: {name}: expected less than 1, got {value:g}")
        return value

    def _numbers(self, name: str) -> list[float]:
        return [_checked(f"{self._path}: {name}", value) for value in self._get(name, list)]

    def _by_pass(self, name: str) -> dict[str, float]:
        return {what: self._number(f"{name}.{what}") * 1e-6 for what in PASSES}


def parse_link(text: str) -> tuple[tuple[float, float], ...]:
    """ "350" (GB/s), or "16:98,64:152" (GB/s by MiB of a message) -> (bytes, bytes/s), by size."""
    pairs = []
    for part in text.split(","):
        size, _, rate = part.rpartition(":")
        try:
            pairs.append((float(size or 1) * 2**20, float(rate) * 1e9))
        except ValueError:
            pairs.append((0.0, 0.0))
    if not all(0 < value < float("inf") for pair in pairs for value in pair) or any(
        a[0] >= b[0] for a, b in pairwise(pairs)
    ):
        raise ValueError(f"expected GB/s, such as 350, or by increasing MiB, such as 16:98,64:152, got {text!r}")
    return tuple(pairs)


def _checked(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{where}: expected a number of 0 or more, got {value!r}")
    return float(value)
