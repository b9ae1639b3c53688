"""DeepSpeed ZeRO, stages 0 to 3, over the whole world. The only file that imports deepspeed.

DeepSpeed is given the plain world group and knows nothing of rings: its own sequence-parallel switches change
gradients. Averaging is undone in `Engine.backward`, clipping is ours, and micro-batches are steered by
`set_gradient_accumulation_boundary` with gradient_accumulation_steps = 1, so that DeepSpeed scales nothing.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from launch.engine.base import Engine, build_adamw, state_names
from launch.engine.zero_shards import Bf16Shards, FlatShards, ParameterShards, Shards, WholeShards
from launch.errors import ConfigError
from model.initial import Part

if TYPE_CHECKING:
    from launch.config import Config
    from launch.topology import Topology

# Elements of the buffers in which gradients are reduced and weights gathered; DeepSpeed's 5e8 would be 2 GB each.
_BUCKET_ELEMENTS = 50_000_000
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroEngine(Engine):
    """Stage 1 shards AdamW state, 2 the gradient too, 3 also the weights; 0 nothing.

    bf16: weights and activations in bf16, fp32 weights for AdamW, gradients summed over micro-batches in fp32; stage
    0 has no such mode and uses torch.autocast, as DDP does.

    In stage 3 a part of the module gets storage and is cut at once, before the next one does, so that no rank ever has
    to hold it whole.

    Raises:
        ConfigError: deepspeed is not installed.
    """

    def __init__(self, module: nn.Module, topology: Topology, config: Config) -> None:
        super().__init__(module, topology, config)
        deepspeed = _import_deepspeed(topology.device)
        self._global_shapes = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
        self._cpu_mesh = DeviceMesh.from_group(topology.cpu_group, "cpu")
        # DeepSpeed reads it in later steps too; close() puts it back.
        self._local_rank_before = os.environ.get("LOCAL_RANK")
        os.environ["LOCAL_RANK"] = str(topology.device.index or 0)
        settings = _deepspeed_config(config, module, topology.world_size)
        if _low_precision_weights(config):
            module.bfloat16()
        if config.engine.zero_stage == 3:
            self._cut(deepspeed, module)
            # A layer's weights are gathered as one: an expansion inside the ring's backward uses some of them between
            # hops, and a fetch of its own there could wait for ranks that are at another hop.
            for layer in getattr(module, "layers", ()):
                deepspeed.utils.set_z3_leaf_module(layer, True)
        else:
            module.to_empty(device=topology.device)
        self._parameters = {name: p for name, p in module.named_parameters() if name in self._global_shapes}
        self._deepspeed, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_adamw(module, config, self._global_shapes),
            config=settings,
        )
        self._shards = _shards(self._deepspeed, self._parameters)
        self._shards.fill()

    def write_weights(self, write: Callable[[Mapping[str, Part]], None]) -> None:
        """See `Engine.write_weights`. Written are the fp32 weights, from which DeepSpeed makes rounded ones."""
        found = {name: self._shards.own(parameter) for name, parameter in self._parameters.items()}
        write({name: part for name, part in found.items() if part is not None})
        self._shards.refresh()

    def forward(self, **inputs: Any) -> Tensor:
        """See `Engine.forward`."""
        return self._deepspeed(**inputs)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss)

    def _named_gradients(self) -> Iterable[tuple[str, Tensor]]:
        return self._shards.gradients()

    def _gradients_are_sharded(self) -> bool:
        return self.config.engine.zero_stage > 0

    def _update(self, lr: float) -> None:
        for group in self._shards.adamw.param_groups:
            group["lr"] = lr
        self._deepspeed.set_gradient_accumulation_boundary(True)
        self._deepspeed.step()

    def _discard(self) -> None:
        self._shards.drop()

    def _shapes(self) -> Mapping[str, torch.Size]:
        return self._global_shapes

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """See `Engine.state`. Collective; copies on the CPU, of which each rank holds its rows only."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for key, moment in zip(state_names(name), (None, *_MOMENTS), strict=True):
                whole = self._shards.read(parameter, moment).view(self._global_shapes[name])
                state[key] = self._own_rows(whole)
        first = self._shards.adamw.state[self._shards.masters()[0]]
        state["optim.step"] = torch.tensor(int(first["step"]), dtype=torch.int64)
        return state

    @torch.no_grad()
    def _load(self, state: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            for key, moment in zip(state_names(name), (None, *_MOMENTS), strict=True):
                self._shards.write(parameter, moment, self._gather(state[key]))
        for master in self._shards.masters():
            self._shards.adamw.state[master]["step"].fill_(float(state["optim.step"]))
        self._shards.refresh()

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the module and free its buffers."""
        self._deepspeed.destroy()
        _restore("LOCAL_RANK", self._local_rank_before)

    def _cut(self, deepspeed: Any, module: nn.Module) -> None:
        """Let DeepSpeed cut the parameters of one module after the other, each given storage just before."""
        for part in reversed(list(module.modules())):  # what is inside first: DeepSpeed looks inside too
            part.to_empty(device=self.topology.device, recurse=False)
            if any(True for _ in part.parameters(recurse=False)):
                deepspeed.zero.Init(module=part)

    def _own_rows(self, whole: Tensor) -> DTensor:
        """This rank's rows of a tensor that all ranks have, copied to the CPU."""
        rows = -(-whole.shape[0] // self.topology.world_size)
        mine = whole[rows * self.topology.rank : rows * (self.topology.rank + 1)]
        mine = mine.detach().to("cpu", torch.float32, copy=True).contiguous()
        return DTensor.from_local(
            mine, self._cpu_mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
        )

    def _gather(self, tensor: Tensor) -> Tensor:
        """The whole of a tensor that `_own_rows` made, flat, on this rank's device. Collective."""
        assert isinstance(tensor, DTensor), "load() takes what state() made"
        rows = -(-tensor.shape[0] // self.topology.world_size)
        mine = tensor.to_local()
        padded = mine.new_zeros((rows, *tensor.shape[1:]), device=self.topology.device)
        padded[: mine.shape[0]] = mine
        whole = padded.new_empty((rows * self.topology.world_size, *tensor.shape[1:]))
        dist.all_gather_into_tensor(whole, padded, group=self.topology.world_group)
        return whole[: tensor.shape[0]].flatten()


def _shards(engine: Any, parameters: dict[str, nn.Parameter]) -> Shards:
    kinds: dict[str, type[Shards]] = {
        "AdamW": WholeShards,
        "DeepSpeedZeroOptimizer": FlatShards,
        "BF16_Optimizer": Bf16Shards,
        "DeepSpeedZeroOptimizer_Stage3": ParameterShards,
    }
    kind = type(engine.optimizer).__name__
    if kind not in kinds:
        raise ConfigError(
            f"engine.name=zero: this DeepSpeed chose the optimizer {kind}, expected one of {', '.join(kinds)}. "
            "Install deepspeed>=0.16,<0.20, or use engine.name=fsdp."
        )
    return kinds[kind](engine.optimizer, parameters)


def _low_precision_weights(config: Config) -> bool:
    return config.engine.precision == "bf16" and config.engine.zero_stage > 0


def _deepspeed_config(config: Config, module: nn.Module, world_size: int) -> dict[str, Any]:
    numel = sum(parameter.numel() for parameter in module.parameters())
    # even: DeepSpeed gathers fp16 from addresses of whole 4 bytes, and refuses odd buckets in any precision
    bucket = 2 * -(-min(_BUCKET_ELEMENTS, numel) // 2)
    low_precision = config.engine.precision == "bf16"
    weights = _low_precision_weights(config)
    return {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Its default is 1.0; ours is applied in Engine.update, the same for every engine.
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "bf16": {"enabled": weights},
        "torch_autocast": {"enabled": low_precision and not weights, "dtype": "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
    }


def _import_deepspeed(device: torch.device) -> Any:
    """deepspeed, set to `device` and silenced.

    DeepSpeed asks the environment which accelerator to use, once, while it is imported; with a GPU in the machine that
    would not be the CPU the run may have asked for.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = device.type
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise ConfigError(
            f"engine.name=zero needs DeepSpeed, which cannot be imported ({error}). Install it with "
            "`pip install 'deepspeed>=0.16,<0.20'`, or use engine.name=fsdp."
        ) from error
    finally:
        _restore("DS_ACCELERATOR", before)
    if get_accelerator().device_name() != device.type:
        raise ConfigError(
            f"engine.name=zero: this process already uses DeepSpeed on {get_accelerator().device_name()}, run.device "
            f"wants {device.type}. Start another process."
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Collectives it calls by names that torch 2.13 deprecates and torch 2.11 has no other for.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # It would compile a C++ shared-memory all-reduce at the first use wherever it finds a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
