"""The model of a configuration in its engine, with its first weights."""

from __future__ import annotations

import os

import torch

from launch.config import Config
from launch.engine import Engine, build_engine
from launch.memory_choice import layer_memory
from launch.topology import Topology
from model.config import ModelConfig
from model.decoder import Decoder
from model.pointwise import PLAIN, Pointwise
from ringattn.transport.peer_memory import host_name

# More would not be faster: what is drawn has to be written somewhere, on GPUs through one link. They also need a chunk
# of host memory each, 16 MiB.
_MOST_THREADS = 32


def build_model(config: Config, model: ModelConfig, topology: Topology) -> Engine:
    """A decoder of shape `model`, run as `config.memory` (resolved) and `config.engine` say. Collective.

    Its first weights depend on `run.seed` and the shape alone, not on engine or world size. It gets storage from its
    engine, as that shards it, and each rank draws the values that it keeps: none ever holds the whole model that would
    not hold it in training.
    """
    device, name = topology.device, config.engine.name
    compiled = config.compiles(on_gpu=device.type == "cuda")
    with torch.device("meta"):
        halves = not (name == "zero" and config.engine.zero_stage == 3)  # not tried on GPUs there
        decoder = Decoder(model, layer_memory(config), Pointwise("inductor", halves=halves) if compiled else PLAIN)
    assert not list(decoder.buffers()), "first values are known for parameters only"
    engine = build_engine(name, decoder, topology=topology, config=config)
    threads = drawing_threads(topology)
    engine.write_weights(lambda parts: decoder.init_parts(parts, config.run.seed, threads))
    return engine


def drawing_threads(topology: Topology) -> int:
    """Threads of this rank that draw first weights: its share of the cores it may run on. Collective.

    torch's own number of threads says nothing here: torchrun sets it to 1. Slurm gives each task cores of its own,
    other launchers give all of them to everyone, so the ranks of this host that may run on the same cores are counted.
    """
    mine = _usable_cores()
    everyone = topology.gather_objects((host_name(), mine))
    sharing = sum(host == host_name() and not mine.isdisjoint(cores) for host, cores in everyone)
    return max(1, min(_MOST_THREADS, len(mine) // sharing))


def _usable_cores() -> frozenset[int]:
    try:
        return frozenset(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return frozenset(range(os.cpu_count() or 1))
