"""CUDA graphs of processes on a CPU: what was launched on which memory, launched again there.

As in a real graph everything but the tensors' contents is what it was at the capture: numbers, masks, and where
things lie. Barriers, which are no operators of torch, are recorded by whoever makes them (`record`).
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ringattn.transport import graphs
from ringattn.transport.copy_engine import CopyEngineTransport

_capturing = []

# Memory is asked for once, at the capture.
_ROOMS = (torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty)


class RecordedGraph(TorchDispatchMode):
    """Stands in for `torch.cuda.CUDAGraph`."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        if operator.overloadpacket not in _ROOMS:
            self.launches.append((operator, args, kwargs or {}, found))
        elif found.is_floating_point() and _fills():
            self.launches.append((torch.Tensor.fill_, (found, float("nan")), {}, found))  # as on a GPU, every time
        return found

    def capture_begin(self, pool, capture_error_mode):
        _capturing.append(self)
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)
        _capturing.pop()

    def replay(self):
        for operator, args, kwargs, found in self.launches:
            if getattr(operator, "namespace", None) == "c10d":
                continue  # of a barrier, which is recorded as a whole
            again = operator(*args, **kwargs)
            for x, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                if isinstance(x, torch.Tensor) and x.data_ptr() != new.data_ptr():
                    x.copy_(new)


def _fills():
    return torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


def record(step):
    """Have a step that is no operator of torch repeated with the graph that is being captured."""
    if _capturing:
        _capturing[-1].launches.append((step, (), {}, None))


class RecordedEvent:
    """Stands in for `torch.cuda.Event`. What it is recorded behind has been done, but for what `late` names."""

    late = frozenset()

    def record(self, stream):
        pass

    def query(self):
        return self not in RecordedEvent.late

    def synchronize(self):
        RecordedEvent.late -= {self}


@contextmanager
def _capture(graph, pool=None, stream=None, capture_error_mode="global"):
    graph.capture_begin(pool, capture_error_mode)
    try:
        yield
    finally:
        graph.capture_end()


def use_recorded_graphs():
    """Let the copy engine of this process run passes of CPU tensors as such graphs, where it would on a GPU."""
    graphs.torch.cuda.CUDAGraph = RecordedGraph
    graphs.torch.cuda.graph = _capture
    graphs.torch.cuda.graph_pool_handle = object
    graphs.torch.cuda.is_current_stream_capturing = lambda: bool(_capturing)
    graphs.torch.cuda.synchronize = lambda *device: None
    graphs.torch.cuda.Event = RecordedEvent
    graphs.torch.cuda.Stream = graphs.torch.cuda.current_stream = lambda *device: "a stream"
    graphs.torch.cuda.stream = lambda stream: nullcontext()
    graphs.torch.cuda.mem_get_info = lambda *device: (2**40, 2**40)
    captures = CopyEngineTransport.captures

    def as_on_a_gpu(self, plan, inputs, payload):
        first = inputs[0]
        shown = SimpleNamespace(shape=first.shape, dim=first.dim, itemsize=first.itemsize, is_cuda=True)
        return captures(self, plan, (shown, *inputs[1:]), payload)

    CopyEngineTransport.captures = as_on_a_gpu
