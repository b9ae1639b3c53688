"""What one GPU does: rates of kernels and links, read from a YAML file (h100.yaml says what its numbers come from).

Free of torch. The simulated ring of `tools` reads the same file and asks for more of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

H100 = Path(__file__).parent / "h100.yaml"
PASSES = ("forward", "backward")
BLOCKS = ("full", "causal", "masked")
_HOST_LAYERS = ("plain", "expanding", "launched")


@dataclass(frozen=True, kw_only=True)
class StepRates:
    """What a training step needs beside the rates of blocks; FLOP/s, bytes/s, parameters/s.

    Attributes:
        narrow_heads: Rate of attention against that of the table, by head width.
        selection: Time of selective attention against plain: "exact", "lagged".
        dense: FLOP/s of all but attention, by width of the model.
        expansion: Bytes a second of the queries, keys and values that a pass expands, by pass.
        shard: Seconds a row and parameter that sharding takes, beside gathers that hide.
        link: Between GPUs.
        host_link: Between a GPU and host memory, each way.
        host_update: Parameters that one process updates on the host.
        host_layer: Seconds of the host's own work for a layer and row: "plain", "expanding" (graphs of passes that
            expand), "launched" (many launches in a ring).
    """

    narrow_heads: dict[int, float]
    selection: dict[str, float]
    dense: dict[int, float]
    expansion: dict[str, float]
    shard: float
    link: float
    host_link: float
    host_update: float
    host_layer: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class UlyssesLine:
    """What was fastest in a ring of `ranks`, of which `fastest` holds (tokens per rank, degree), increasing.

    A degree is the fastest up to its tokens; 1 is the ring.
    """

    ranks: int
    heads: int
    kv_heads: int
    head_dim: int
    documents: int
    fastest: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class UlyssesRates:
    """Where exchanging heads for tokens was measured: on GPUs with one of `gpus` in their name."""

    gpus: tuple[str, ...]
    lines: tuple[UlyssesLine, ...]


class RatesFile:
    """The checked contents of a file of rates.

    Attributes:
        heads: Query heads that sizes of blocks refer to.
        sizes: Of blocks: square roots of queries x keys.
        blocks: TFLOP/s by pass and kind of block, one per size.

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
        self._read_blocks()
        self.memory = self._number("memory_gbps") * 1e9
        self.dense, self.peak = (self._positive(name) * 1e12 for name in ("dense_tflops", "peak_tflops"))

    def block_rate(self, what: str, kind: str, size: float) -> float:
        """FLOP/s of a block of `size` in pass `what`."""
        return 1e12 * interpolated(self.sizes, self.blocks[what][kind], size)

    def step(self) -> StepRates:
        """The part about training steps."""
        link = parse_link(str(self._get("transports.copy-engine.intra", object)))
        return StepRates(
            narrow_heads=self._table("step.narrow_heads"),
            selection={name: self._positive(f"step.selection.{name}") for name in ("exact", "lagged")},
            dense={width: rate * 1e12 for width, rate in self._table("step.width_tflops").items()},
            expansion={what: self._positive(f"step.expansion_gbps.{what}") * 1e9 for what in PASSES},
            shard=self._number("step.shard_ms_per_gparam") * 1e-12,
            link=link[-1][1],
            host_link=self._positive("step.host_link_gbps") * 1e9,
            host_update=self._positive("step.host_update_gparams") * 1e9,
            host_layer={name: self._positive(f"step.host_layer_ms.{name}") / 1e3 for name in _HOST_LAYERS},
        )

    def ulysses(self) -> UlyssesRates:
        """The part about exchanging heads for tokens."""
        lines = self._get("ulysses.lines", list)
        found = tuple(self._ulysses_line(f"ulysses.lines[{number}]", line) for number, line in enumerate(lines))
        gpus = self._get("ulysses.gpus", list)
        if not gpus or not all(isinstance(name, str) and name for name in gpus):
            raise ValueError(f"{self._path}: ulysses.gpus: expected names of GPUs, such as [H100], got {gpus!r}")
        return UlyssesRates(gpus=tuple(gpus), lines=found)

    def _ulysses_line(self, name: str, line: Any) -> UlyssesLine:
        known = [field.name for field in fields(UlyssesLine)]
        if not isinstance(line, dict) or sorted(line) != sorted(known):
            raise ValueError(f"{self._path}: {name}: expected {', '.join(known)}, got {line!r}")
        sizes = {key: value for key, value in line.items() if key != "fastest"}
        fastest = line["fastest"]
        numbers = [*sizes.values(), *(fastest.items() if isinstance(fastest, dict) else ())]
        flat = [n for entry in numbers for n in (entry if isinstance(entry, tuple) else (entry,))]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in flat)
        if not isinstance(fastest, dict) or not fastest or not whole:
            raise ValueError(
                f"{self._path}: {name}: expected whole numbers above 0, and fastest: {{tokens per rank: degree}}, "
                f"got {line!r}"
            )
        if any(line["ranks"] % degree for degree in fastest.values()):
            raise ValueError(f"{self._path}: {name}: expected degrees that divide {line['ranks']} ranks, got {fastest}")
        return UlyssesLine(**sizes, fastest=tuple(sorted(fastest.items())))

    def _read_blocks(self) -> None:
        names = ["size", *(f"{kind}_{what}" for what in PASSES for kind in BLOCKS)]
        table = [self._numbers(f"kernels.{name}") for name in names]
        if len({len(line) for line in table}) > 1:
            raise ValueError(
                f"{self._path}: kernels: expected lines of one length, got {[len(line) for line in table]}"
            )
        self.sizes, *lines = table
        increasing = all(a < b for a, b in pairwise(self.sizes))
        if not self.sizes or not increasing or min(min(line) for line in table) <= 0:
            raise ValueError(f"{self._path}: kernels: expected increasing sizes and rates above 0")
        self.heads = int(self._positive("heads"))
        rows = iter(lines)
        self.blocks = {what: {kind: next(rows) for kind in BLOCKS} for what in PASSES}

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

    def _table(self, name: str) -> dict[int, float]:
        """Numbers by a size, such as {64: 0.76}; in the order of sizes."""
        found = {int(_checked(f"{self._path}: {name}", key)): value for key, value in self._get(name, dict).items()}
        return {key: _checked(f"{self._path}: {name}.{key}", found[key]) for key in sorted(found)}


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


def interpolated(at: Sequence[float], values: Sequence[float], where: float) -> float:
    """Between neighbours over the logarithm; the ends go on."""
    if where <= at[0]:
        return values[0]
    for (low, high), (first, second) in zip(pairwise(at), pairwise(values), strict=True):
        if where <= high:
            return first + (second - first) * (math.log(where / low) / math.log(high / low))
    return values[-1]


def by_size(table: Mapping[int, float], where: float) -> float:
    """`interpolated` in a table by size."""
    return interpolated(tuple(table), tuple(table.values()), where)
