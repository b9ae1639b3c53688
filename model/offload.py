"""Tensors that wait in host memory between the forward and the backward pass, copied while the GPU computes.

Layers are taken back in the reverse of their order, so what comes next is known: when a layer's tensors are asked for,
those of the layer before it start to travel. The host waits for nothing; streams wait for each other's events:

- out: the side stream waits until the computing stream has made the tensor, and copies. The tensor stays alive until
  the computing stream, one layer later, has been told to wait for that copy: from then on whatever it writes into the
  freed memory comes after it.
- back: the tensor is allocated by the computing stream, so the side stream waits for what that stream has been given
  up to then before it writes there; the computing stream waits for the copy where the tensor is asked for.

Host buffers are pinned once, and go from step to step: all copies run on one side stream in their order, so a buffer
may be written again as soon as nobody asks for its content any more. On the CPU the same happens with plain copies.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_Kind = tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]
"""Shape, strides (else copies of attention's output would be rearranged on the way), dtype, and where it belongs."""

_TOUCHING = 8  # threads


class HostStore:
    """Host memory for the tensors of one decoder, used by one thread at a time (the backward's may be another one)."""

    def __init__(self) -> None:
        self._buffers: defaultdict[_Kind, list[Tensor]] = defaultdict(list)
        self._layer = _Layer(None)
        self._leaving: list[tuple[_Layer, Tensor, torch.cuda.Event]] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.bytes = 0

    def start(self) -> None:
        """A forward pass begins."""
        self._settle(None)  # of one that broke off
        self._layer = _Layer(None)

    def next_layer(self) -> None:
        """What is put from here on is of the next layer. What left in the layer before the last one has left."""
        self._settle(self._layer)
        self._layer = _Layer(self._layer)

    def finish(self) -> None:
        """The layers are through: nothing on the device is held for copies any more."""
        self._settle(None)

    def clear(self) -> None:
        """Free the buffers that hold nothing: rows of their shapes will not come again."""
        self.bytes -= sum(buffer.nbytes for free in self._buffers.values() for buffer in free)
        self._buffers.clear()

    def put(self, tensor: Tensor) -> Held:
        """Start to copy `tensor` out; it must not be written to from here on."""
        kind = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        buffer = self._buffers[kind].pop() if self._buffers[kind] else self._new(tensor)
        if tensor.device.type == "cuda":
            stream = self._stream(tensor.device)
            stream.wait_stream(torch.cuda.current_stream(tensor.device))
            with torch.cuda.stream(stream):
                buffer.copy_(tensor, non_blocking=True)
            self._leaving.append((self._layer, tensor, stream.record_event()))
        else:
            buffer.copy_(tensor)
        return Held(self, self._layer, buffer, kind)

    def stay(self, tensor: Tensor) -> Resident:
        """A tensor that remains where it is, and whose use announces that of the layer before."""
        return Resident(self._layer, tensor)

    def _settle(self, but: _Layer | None) -> None:
        """Let the computing stream wait for copies, except those of layer `but`, and free what they read."""
        while self._leaving and self._leaving[0][0] is not but:
            _, tensor, copied = self._leaving.pop(0)
            torch.cuda.current_stream(tensor.device).wait_event(copied)

    def _new(self, tensor: Tensor) -> Tensor:
        buffer = torch.empty_like(tensor, device="cpu")
        self.bytes += buffer.nbytes
        if tensor.device.type == "cuda":
            _touch(buffer)
            _pin(buffer)
        return buffer

    def _give_back(self, kind: _Kind, buffer: Tensor) -> None:
        self._buffers[kind].append(buffer)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _bring(self, buffer: Tensor, device: torch.device) -> tuple[Tensor, torch.cuda.Event | None]:
        tensor = torch.empty_like(buffer, device=device)
        if device.type != "cuda":
            return tensor.copy_(buffer), None
        stream = self._stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            tensor.copy_(buffer, non_blocking=True)
        return tensor, stream.record_event()


class _Layer:
    """What one layer put away; keeps nothing alive."""

    def __init__(self, before: _Layer | None) -> None:
        self.before = before
        self.held: list[weakref.ref[Held]] = []
        self._brought = False

    def bring(self) -> None:
        if self._brought:
            return
        self._brought = True
        for reference in self.held:
            held = reference()
            if held is not None:
                held.bring()


class Held:
    """A tensor in host memory. Its buffer is free again when this is."""

    def __init__(self, store: HostStore, layer: _Layer, buffer: Tensor, kind: _Kind) -> None:
        self._store, self._layer, self._buffer, self._kind = store, layer, buffer, kind
        self._coming: tuple[Tensor, torch.cuda.Event | None] | None = None
        layer.held.append(weakref.ref(self))

    def __del__(self) -> None:
        if self._coming is not None:  # it was announced, and the backward broke off
            self._arrived()
        self._store._give_back(self._kind, self._buffer)

    def bring(self) -> None:
        """Start to copy it back, unless that has been done."""
        if self._coming is None:
            self._coming = self._store._bring(self._buffer, self._kind[-1])

    def get(self) -> Tensor:
        """The tensor on its device. A graph that is walked again may ask again; then nothing is announced."""
        self._layer.bring()
        self.bring()
        tensor = self._arrived()
        if self._layer.before is not None:
            self._layer.before.bring()
        return tensor

    def _arrived(self) -> Tensor:
        assert self._coming is not None
        (tensor, copied), self._coming = self._coming, None
        if copied is not None:
            torch.cuda.current_stream(tensor.device).wait_event(copied)
        return tensor


class Resident:
    """A tensor that has not moved; see `HostStore.stay`."""

    def __init__(self, layer: _Layer, tensor: Tensor) -> None:
        self._layer, self._tensor = layer, tensor

    def get(self) -> Tensor:
        """The tensor."""
        if self._layer.before is not None:
            self._layer.before.bring()
        return self._tensor


def hooks(put: Callable[[Tensor], Held | Resident]) -> torch.autograd.graph.saved_tensors_hooks:
    """Autograd's saved tensors by way of `put`, in this context; empty ones as they are."""

    def pack(tensor: Tensor) -> Tensor | Held | Resident:
        return put(tensor) if tensor.numel() else tensor

    def unpack(kept: Tensor | Held | Resident) -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.get()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _touch(buffer: Tensor) -> None:
    """Write to all of it, by several threads.

    The kernel gives memory at the first touch, on virtual machines at less than 1 GB/s to a thread. Pinning memory that
    is not there yet would touch it in one thread, inside the driver.
    """
    size, part = buffer.nbytes, -(-buffer.nbytes // _TOUCHING)
    with ThreadPoolExecutor(_TOUCHING, thread_name_prefix="offload") as pool:
        starts = range(0, size, part or 1)
        list(pool.map(lambda start: ctypes.memset(buffer.data_ptr() + start, 0, min(part, size - start)), starts))


def _pin(buffer: Tensor) -> None:
    """Page-lock memory that is there. `pin_memory=True` would round its size up to a power of two."""
    if not buffer.nbytes:
        return
    runtime = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if status != 0:
        raise RuntimeError(
            f"memory.offload: {buffer.nbytes / 2**30:.2f} GiB of host memory could not be pinned (error {status}); "
            "is there enough of it, and does `ulimit -l` allow it? Else set memory.offload to none"
        )
    weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr()).atexit = False
