"""Which process am I: rank, device, process groups and the dp x cp mesh.

The only place that reads what launchers put into the environment (torchrun, the deepspeed launcher, srun). Without any
of it the process is a world of one, with the same groups as a larger world, so that nothing downstream has a special
case. Everything that can be refused is refused before the first process group is made.

Three kinds of groups, each with its use: `world_group` (gloo on CPU, NCCL on CUDA) carries gradients, `cp_group` the
ring, `cpu_group` (always gloo) small host things: objects, agreements, barriers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from launch.errors import ConfigError, PeerLost
from ringattn.groups import without_multicast

if TYPE_CHECKING:
    from launch.config import Config

TORCH_LATER_S = 30.0  # after `parallel.hop_timeout_s` torch ends what waits on a GPU; see `launch.stall`
_LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM_NAMES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the launcher said. `address` is "host:port" of the rendezvous, None for a process on its own."""

    rank: int
    world_size: int
    local_rank: int
    address: str | None


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Read torchrun's, deepspeed's or srun's variables from `environment`; none of them means a world of one.

    Raises:
        ConfigError: only a part of them is set, a number is no number, or the rank is outside the world.
    """
    names = _LAUNCHER_NAMES
    # srun sets its own names for every step, also for a step of one task, and no address.
    if not any(name in environment for name in names) and int(environment.get(_SLURM_NAMES[1], "1")) > 1:
        names = _SLURM_NAMES
    present = [name for name in names if name in environment]
    if not present:
        return Launch(rank=0, world_size=1, local_rank=0, address=None)
    wanted = [*names, "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in wanted if name not in environment]
    if missing:
        raise ConfigError(
            f"environment: {', '.join(present)} set but {', '.join(missing)} missing: the launcher's variables must be "
            "set all together or not at all. Start with torchrun, the deepspeed launcher or "
            "`python -m launch train --nproc N`; under srun export MASTER_ADDR and MASTER_PORT before srun."
        )
    try:
        rank, world_size, local_rank, _ = (int(environment[name]) for name in [*names, "MASTER_PORT"])
    except ValueError as error:
        shown = ", ".join(f"{name}={environment[name]!r}" for name in wanted)
        raise ConfigError(f"environment: expected whole numbers, got {shown}. Correct or unset them.") from error
    if not 0 <= rank < world_size or local_rank < 0:
        raise ConfigError(
            f"environment: {names[0]}={rank} {names[1]}={world_size} {names[2]}={local_rank}: expected 0 <= rank < "
            "world size. Correct or unset them."
        )
    address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    return Launch(rank=rank, world_size=world_size, local_rank=local_rank, address=address)


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """Device of this process for `run.device` ("auto", "cpu" or "cuda").

    Raises:
        ConfigError: CUDA was asked for and is not there, or there are more local processes than GPUs.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ConfigError("run.device=cuda: no CUDA device is visible to this process. Use run.device=cpu or auto.")
    # Slurm can show each task its own GPU only; then every local rank finds it as number 0.
    if count == 1 and local_rank > 0 and "SLURM_LOCALID" in os.environ:
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise ConfigError(
            f"run.device={wanted}: local rank {local_rank} has no GPU of its own, {count} visible. Start at most "
            f"{count} processes on this host, or use run.device=cpu."
        )
    return torch.device("cuda", local_rank)


@dataclass(kw_only=True)
class Timeouts:
    """How long a silent peer is waited for: `setup` until the first step is done, then `hop`; `now` is in force."""

    setup: timedelta
    hop: timedelta
    now: timedelta


@dataclass(frozen=True, kw_only=True)
class Topology:
    """This process in the dp x cp mesh, and the groups it talks through. Made by `Topology.start`.

    Ranks of one ring are consecutive: rank = dp_rank * cp + cp_rank. `mesh` has the dimensions ("dp", "cp"),
    `world_mesh` is the same ranks in one dimension, over which parameters are sharded.
    """

    rank: int
    world_size: int
    local_rank: int
    dp: int
    cp: int
    dp_rank: int
    cp_rank: int
    device: torch.device
    mesh: DeviceMesh
    world_mesh: DeviceMesh
    world_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    cpu_group: dist.ProcessGroup
    timeouts: Timeouts
    owns_world: bool
    _adopted: list[dist.ProcessGroup] = field(default_factory=list, repr=False)

    @staticmethod
    def start(config: Config) -> Topology:
        """Join the world the launcher describes, build the mesh, and warm every group with one collective.

        Groups start with `parallel.setup_timeout_s`; `use_hop_timeout` shortens them once the first step is done. A
        default process group that already exists is used, and left alone by `close`.

        Raises:
            ConfigError: the environment or the mesh is wrong; nothing has been started then.
            PeerLost: the other processes could not be reached within `parallel.setup_timeout_s`.
        """
        owns_world = not dist.is_initialized()
        launch = read_launch(os.environ) if owns_world else _running_launch()
        sizes = config.mesh(launch.world_size)
        device = choose_device(config.run.device, launch.local_rank)
        setup_timeout = timedelta(seconds=config.parallel.setup_timeout_s)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            if owns_world:
                _join_world(launch, device, setup_timeout)
            topology = _build(config, launch, sizes, device, owns_world)
            topology._warm()
        except (RuntimeError, dist.DistError) as error:
            raise PeerLost(
                f"rank {launch.rank} of {launch.world_size} (device {device}) could not set up its process groups with "
                f"the others at {launch.address} within parallel.setup_timeout_s={setup_timeout.total_seconds():g}: "
                f"{error}. Check that all {launch.world_size} processes started, that the address is reachable and its "
                "port free, and read the other ranks' messages."
            ) from error
        return topology

    def close(self) -> None:
        """Leave the world. Groups that existed before `start` stay."""
        if self.owns_world and dist.is_initialized():
            dist.destroy_process_group()

    def use_hop_timeout(self) -> None:
        """From now on a silent peer is an error after `parallel.hop_timeout_s`. Call once the first step is done.

        The first step is excluded because kernels are compiled and libraries loaded in it.
        """
        self._set_timeout(self.timeouts.hop)

    @contextmanager
    def patient(self) -> Iterator[None]:
        """Allow `parallel.setup_timeout_s` inside the block, for saving or evaluation, where ranks wait for one."""
        before = self.timeouts.now
        self._set_timeout(self.timeouts.setup)
        try:
            yield
        finally:
            self._set_timeout(before)

    def adopt(self, group: dist.ProcessGroup) -> None:
        """Keep a group of tensors that was made later like the own ones: warmed, and with the timeout in force.

        A collective of the group.
        """
        self._adopted.append(group)
        distributed_c10d._set_pg_timeout(self._of_tensors(self.timeouts.now), group)
        self._warm_up(group)

    def _set_timeout(self, timeout: timedelta) -> None:
        distributed_c10d._set_pg_timeout(timeout, self.cpu_group)  # no public call does it for a group that exists
        for group in (self.world_group, self.cp_group, *self._adopted):
            distributed_c10d._set_pg_timeout(self._of_tensors(timeout), group)
        self.timeouts.now = timeout

    def _of_tensors(self, timeout: timedelta) -> timedelta:
        """What groups of tensors, and the ring, wait at most: on GPUs a little longer than is asked for.

        They end by a signal or by an error of the device there; `launch.stall` comes first, and has the words, but
        where work by itself took longer than that before.
        """
        return timeout if self.device.type != "cuda" else timeout + timedelta(seconds=TORCH_LATER_S)

    @property
    def ring_timeout(self) -> timedelta:
        """What a hop of the ring waits at most, as it is in force."""
        return self._of_tensors(self.timeouts.now)

    def limit(self) -> tuple[str, float]:
        """The limit in force on a silent peer: the setting's name, and seconds."""
        name = "hop" if self.timeouts.now == self.timeouts.hop else "setup"
        return f"parallel.{name}_timeout_s", self.timeouts.now.total_seconds()

    def barrier(self) -> None:
        """Wait for every rank, on the host."""
        dist.barrier(group=self.cpu_group)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value` in rank order, on every rank. For small things: it goes through pickle and gloo."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def any_true(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; the same answer on every rank. Cheap enough for every step."""
        return self.max_of(float(flag)) > 0

    def max_of(self, value: float) -> float:
        """Largest `value` of all ranks, on every rank. Not for NaN, which gloo's maximum may lose."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def sum_of(self, value: float) -> float:
        """Sum (fp64) of all ranks' `value`, on every rank."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def _reduce(self, value: float, operation: Any) -> float:
        number = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(number, op=operation, group=self.cpu_group)
        return float(number)

    def _warm(self) -> None:
        for group in (self.world_group, self.cp_group):
            self._warm_up(group)
        self.barrier()

    def _warm_up(self, group: dist.ProcessGroup) -> None:
        # NCCL's first batched P2P of a group needs all of its ranks; after a collective the communicator is there.
        dist.all_reduce(torch.zeros(1, device=self.device), group=group)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _running_launch() -> Launch:
    local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    return Launch(rank=dist.get_rank(), world_size=dist.get_world_size(), local_rank=local_rank, address=None)


def _join_world(launch: Launch, device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Bound to its device, NCCL connects here, under the setup timeout, and not inside the first hop.
    bound = device if device.type == "cuda" else None
    without_multicast()
    ranks: dict[str, Any] = {
        "rank": launch.rank,
        "world_size": launch.world_size,
        "timeout": timeout,
        "device_id": bound,
    }
    if launch.address is None:
        dist.init_process_group(backend, store=dist.HashStore(), **ranks)
    else:
        dist.init_process_group(backend, init_method="env://", **ranks)


def _build(config: Config, launch: Launch, sizes: tuple[int, int], device: torch.device, owns_world: bool) -> Topology:
    setup_timeout = timedelta(seconds=config.parallel.setup_timeout_s)
    hop_timeout = timedelta(seconds=config.parallel.hop_timeout_s)
    dp, cp = sizes
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("dp", "cp"))
    world_mesh = init_device_mesh(device.type, (launch.world_size,), mesh_dim_names=("world",))
    topology = Topology(
        rank=launch.rank,
        world_size=launch.world_size,
        local_rank=launch.local_rank,
        dp=dp,
        cp=cp,
        dp_rank=launch.rank // cp,
        cp_rank=launch.rank % cp,
        device=device,
        mesh=mesh,
        world_mesh=world_mesh,
        world_group=world_mesh.get_group(),
        cp_group=mesh.get_group("cp"),
        cpu_group=dist.new_group(backend="gloo", timeout=setup_timeout),
        timeouts=Timeouts(setup=setup_timeout, hop=hop_timeout, now=setup_timeout),
        owns_world=owns_world,
    )
    # Groups of a mesh come with torch's default timeout, not with the world's.
    topology._set_timeout(setup_timeout)
    return topology
