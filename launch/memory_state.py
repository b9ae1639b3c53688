"""Bytes of weights, gradients and AdamW state per process, as each engine spreads them. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator

from model.config import ModelConfig
from model.flops import ParameterCount, count_parameters

GRADIENTS = "gradients"
GATHERED = "gathered weights"
# Elements of DeepSpeed's buffers for reducing and gathering, as launch/engine/zero.py sets them.
_ZERO_BUCKET_ELEMENTS = 50_000_000
# Layers of up to so many parameters are gathered and reduced in pairs by `fsdp`: on H200 the host's work for a unit is
# the slow part then.
_PAIRED = 32_000_000
_FP32 = 4


def state_items(
    model: ModelConfig,
    *,
    engine: str,
    zero_stage: int,
    num_processes: int,
    element_bytes: int,
    on_host: bool,
    kept: bool = False,
) -> tuple[tuple[str, float, float], ...]:
    """What stays from step to step, and gradients, which are there at every peak: (name, device, host).

    Args:
        on_host: fp32 weights and AdamW state are on the host; only what is computed with is on the device.
        kept: layers stay gathered from forward to backward.
    """
    count, part = count_parameters(model), 1.0 / num_processes
    total = float(count.total)
    low = element_bytes < _FP32
    if engine == "ddp":
        weights, gradients, moments = (_FP32 * total, _FP32 * total, 2 * _FP32 * total)
        # autocast keeps the rounded weights of a forward pass
        return (*_placed(weights, gradients, moments, False), ("weights in bf16", 2 * total if low else 0.0, 0.0))
    if engine == "fsdp":
        share = _FP32 * total * part
        found = _placed(share, share, 2 * share, on_host)
        in_unit = layers_in_unit(_layer_and_root(count, model)[0])
        whole = _gathered(count, model, element_bytes, head=own_head(model, engine), in_unit=in_unit, kept=kept)
        return (*found, (GATHERED, whole, 0.0))
    return _zero_items(total, count, model, zero_stage, part, low, on_host, element_bytes)


def layers_in_unit(parameters: float) -> int:
    """How many layers of so many parameters each `fsdp` gathers and reduces together."""
    return 2 if parameters <= _PAIRED else 1


def _placed(weights: float, gradients: float, moments: float, on_host: bool) -> tuple[tuple[str, float, float], ...]:
    found = (("weights in fp32", weights), (GRADIENTS, gradients), ("AdamW's moments", moments))
    return tuple((name, 0.0 if on_host else size, size if on_host else 0.0) for name, size in found)


def _gathered(
    count: ParameterCount, model: ModelConfig, element_bytes: int, *, head: float, in_unit: int = 1, kept: bool = False
) -> float:
    """Embedding and head for the whole step; of units of layers this one, the next, and the buffer it arrives in.

    Args:
        head: Parameters of a head that is gathered by itself.
        in_unit: Layers that are gathered together.
        kept: All layers are there, and one buffer.
    """
    layer, root = _layer_and_root(count, model)
    held = model.layers + in_unit if kept else min(3 * in_unit, model.layers)
    return element_bytes * (root - head + held * layer)


def own_head(model: ModelConfig, engine: str) -> float:
    """Parameters of a head that the engine gathers and reduces by itself: `fsdp`'s, if it is not the embedding."""
    return float(model.vocab_size * model.dim) if engine == "fsdp" and not model.tied_head else 0.0


def _layer_and_root(count: ParameterCount, model: ModelConfig) -> tuple[float, float]:
    """Parameters that are gathered together: a layer's, and all that are in no layer."""
    layer = count.layer + count.selection / model.layers
    return layer, count.total - model.layers * layer


def shares_of_gradients(model: ModelConfig) -> tuple[float, float]:
    """Part of all gradients that is there with `fsdp` in the backward pass of the first unit of layers, and when all
    layers are done: those of the embedding, and of the head if it is the same, come last.
    """
    count = count_parameters(model)
    layer, root = _layer_and_root(count, model)
    done = count.total - root + own_head(model, "fsdp")
    return (done - min(layers_in_unit(layer), model.layers) * layer) / count.total, done / count.total


def _zero_items(
    total: float,
    count: ParameterCount,
    model: ModelConfig,
    stage: int,
    part: float,
    low: bool,
    on_host: bool,
    element_bytes: int,
) -> tuple[tuple[str, float, float], ...]:
    narrow = low and stage >= 1  # stage 0 uses autocast
    masters = _FP32 * total * (part if stage >= 1 else 1.0)
    moments = 2 * _FP32 * total * (part if stage >= 1 else 1.0)
    gradients = _FP32 * total * (part if stage >= 2 else 1.0)
    if stage == 1 and narrow:
        gradients += 2 * total  # in bf16, beside the fp32 sums
    found = list(_placed(masters, gradients, moments, on_host))
    if stage >= 1:  # in fp32 too: DeepSpeed has those that AdamW runs on apart
        name = f"weights in {'bf16' if low else 'fp32, to compute with'}"
        found.append((name, element_bytes * total * (part if stage >= 3 else 1.0), 0.0))
    elif low:
        found.append(("weights in bf16", 2 * total, 0.0))
    if stage >= 3:
        found.append((GATHERED, _gathered(count, model, element_bytes, head=0.0), 0.0))
    bucket = min(_ZERO_BUCKET_ELEMENTS, total)
    found.append(("DeepSpeed's buffers", 2 * _FP32 * bucket, 0.0))
    return tuple(found)


def gradient_flight_items(
    model: ModelConfig, *, engine: str, num_processes: int, element_bytes: int, last: bool
) -> Iterator[tuple[str, float]]:
    """Whole gradients on their way to the ranks' parts: (name, bytes).

    Args:
        last: Of what comes when all layers are done; else of a layer, while a head's waits that comes then.
    """
    if engine == "ddp":  # its gradients are whole anyway
        return
    count = count_parameters(model)
    layer, root = _layer_and_root(count, model)
    reduced = _FP32 * (1 + 1 / num_processes)  # what is reduced is fp32, and so is the part that comes back
    head = own_head(model, engine)
    if last:
        yield "gradients of embedding and head", (element_bytes + reduced) * (root - head)
        return
    if not head:
        yield "the head's gradient", element_bytes * float(model.vocab_size * model.dim)
    in_unit = min(layers_in_unit(layer), model.layers) if engine == "fsdp" else 1
    yield (
        "gradients of a unit of layers" if in_unit > 1 else "gradients of a layer",
        (element_bytes + reduced) * in_unit * layer,
    )
