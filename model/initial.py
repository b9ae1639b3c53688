"""First values of parameters, from a parameter's name and shape alone, so that no module need exist or be whole.

A parameter is drawn in chunks of `CHUNK` elements of its flat form, each with a generator of its own: chunks can be
drawn by any thread on any rank, in any order, and a rank draws only those that reach into its part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig
from model.kinds import attention_shape

CHUNK = 2**22  # elements; the values of a longer parameter depend on it
_STD = 0.02  # GPT-2
_RESIDUAL_WRITERS = ("o_proj.weight", "down_proj.weight")
_FACTORS = ("q_factors.weight", "k_factors.weight", "v_factors.weight")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Consecutive elements of a parameter in its flat form: as many as `values` has, from number `first` on.

    `values` is contiguous, of any shape, dtype and device.
    """

    values: Tensor
    first: int = 0


def write_initial_values(
    parts: Mapping[str, Part],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    seed: int,
    config: ModelConfig,
    threads: int = 1,
) -> None:
    """Write first values, drawn in fp32 on the CPU, in place.

    - matrices: normal, std 0.02; those that write to the residual stream 0.02 / sqrt(2 layers) (GPT-2, section 2.3)
    - norms: ones
    - a selector's gain: `selection.gain_start`; its gamma: 0; with `zero_key_init` the key projection of the selection
      head: zeros
    - factors ("tpa"): normal, std 1 / sqrt(dim), so that factors of normed states have deviation 1
    - expansions of "sas", weights and biases: uniform within 1 / sqrt(fan in), as torch initialises Conv1d and Linear

    Args:
        parts: What to write, by the parameter's name in `named_parameters()` of the bare decoder.
        shapes: Of all parameters by name, unsharded.
        seed: A value depends on it, on the parameter's name and on its place there, and on nothing else.
        config: The shape of the decoder.
        threads: That draw at a time, at most. Each needs up to one chunk (16 MiB) beside what is written.
    """
    # Taken here: "no gradient" is a state of this thread, and the others would be refused writing into a parameter.
    detached = {name: Part(values=part.values.detach(), first=part.first) for name, part in parts.items()}
    pieces = [piece for name, part in detached.items() for piece in _pieces(name, part, shapes[name])]
    threads = min(threads, len(pieces))
    if threads <= 1:
        for piece in pieces:
            piece.write(shapes, seed, config)
        return
    # torch lets other threads run while it draws, and draws in the thread that asks: its own threads do not matter.
    with ThreadPoolExecutor(threads, thread_name_prefix="first-weights") as pool:
        for _ in pool.map(lambda piece: piece.write(shapes, seed, config), pieces):
            pass  # an error comes out here


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """What of one chunk is wanted: `target` takes its elements from `skip` on."""

    name: str
    chunk: int
    skip: int
    target: Tensor

    def write(self, shapes: Mapping[str, tuple[int, ...]], seed: int, config: ModelConfig) -> None:
        size = min(CHUNK, math.prod(shapes[self.name]) - self.chunk * CHUNK)
        wide = self.target.dtype == torch.float32 and self.target.device.type == "cpu"
        if wide and len(self.target) == size:
            _draw(self.target, self.name, self.chunk, shapes, seed, config)
            return
        # Always the whole chunk: what a generator gives to the last elements depends on how many are asked for.
        values = torch.empty(size, dtype=torch.float32, device="cpu")
        _draw(values, self.name, self.chunk, shapes, seed, config)
        self.target.copy_(values[self.skip : self.skip + len(self.target)])


def _pieces(name: str, part: Part, shape: tuple[int, ...]) -> Iterator[_Piece]:
    flat, begin = part.values.view(-1), part.first
    end = begin + len(flat)
    assert end <= math.prod(shape), f"{name}: elements {begin} to {end} of {list(shape)}"
    place = begin
    while place < end:
        chunk, skip = divmod(place, CHUNK)
        stop = min(end, (chunk + 1) * CHUNK)
        yield _Piece(name=name, chunk=chunk, skip=skip, target=flat[place - begin : stop - begin])
        place = stop


def _draw(
    values: Tensor, name: str, chunk: int, shapes: Mapping[str, tuple[int, ...]], seed: int, config: ModelConfig
) -> None:
    """Fill `values` (flat, fp32, on the CPU) with one whole chunk."""
    shape = shapes[name]
    if name.endswith("selector.gain"):
        assert config.selection is not None
        values.fill_(config.selection.gain_start)
    elif name.endswith("selector.gamma"):
        values.zero_()
    elif ".simulated." in name:
        weight = shapes[name.removesuffix(".bias") + ".weight"] if name.endswith(".bias") else shape
        bound = 1 / math.sqrt(math.prod(weight[1:]))
        values.uniform_(-bound, bound, generator=_generator(seed, name, chunk))
    elif len(shape) == 1:
        values.fill_(1.0)
    else:
        values.normal_(0.0, _std(name, config), generator=_generator(seed, name, chunk))
    if name.endswith("attention.k_proj.weight") and config.selection is not None and config.selection.zero_key_init:
        zeros = _selection_rows(config)
        begin, end = (max(0, row * shape[1] - chunk * CHUNK) for row in (zeros.start, zeros.stop))
        values[begin:end] = 0.0


def _generator(seed: int, name: str, chunk: int) -> torch.Generator:
    # The first chunk's key is what it was before there were chunks, so that small models keep their values.
    key = f"{seed}:{name}" if chunk == 0 else f"{seed}:{name}:{chunk}"
    # hash() of a string differs between processes; a digest does not
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _std(name: str, config: ModelConfig) -> float:
    if name.endswith(_RESIDUAL_WRITERS):
        return _STD / math.sqrt(2 * config.layers)
    return config.dim**-0.5 if name.endswith(_FACTORS) else _STD


def _selection_rows(config: ModelConfig) -> slice:
    """Rows of the key projection that make the key head of the selection head."""
    assert config.selection is not None
    shape = attention_shape(config)
    key_head = config.selection.head // (shape.heads // shape.key_heads)
    return slice(key_head * config.head_dim, (key_head + 1) * config.head_dim)
