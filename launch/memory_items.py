"""What layers keep, and the working set of each moment of a step, in bytes. Part of `launch.memory_plan`."""

from __future__ import annotations

from collections.abc import Iterator

from launch.config import MemoryConfig
from launch.memory_case import Item, MemoryCase
from launch.memory_state import gradient_flight_items
from launch.plan_attention import column_state_bytes, expanded_bytes
from launch.plan_ulysses import expanded_at_home, inner_plan, ulysses_bytes
from model.config import ModelConfig
from model.flops import (
    attention_elements,
    attention_result_bytes_per_token,
    between_elements,
    flight_bytes_per_token,
    layer_bytes_per_token,
    loss_bytes,
    unrounded_bytes_per_token,
    votes_bytes_per_token,
)
from model.kinds import attention_shape
from ringattn.kernels.reference import TILES, max_scores
from ringattn.schedule import head_groups
from ringattn.scoring.simulated_limits import size_problem
from ringattn.transport.copy_engine import GRAPH_BYTES

# Payloads that wait in an inbox of peer memory, beside the own payload: as `ringattn.transport.copy_engine`.
_INBOX_SLOTS = 3
# Backward over a ring, in sizes of a group of heads: gradients of queries that wait to be summed; part of the payloads
# that are under way, and their gradients. With these, 32k tokens per GPU come to what was measured (fitted).
_QUERY_PARTS = 2.5
_NEEDED_PART = 0.75
# What the five products that read a norm's result keep of it under autocast beyond the two that they would share: each
# rounds it for itself. In halves that are compiled whole they share them; what four H200 took there
# (docs/records/steps-4-h200.jsonl, engine.name=ddp) is two copies more than their saved tensors, of which not all is
# understood.
_ROUNDED_COPIES = 3
_ROUNDED_COPIES_COMPILED = 2
# Payloads of selection under way: two at least, see `_AHEAD_BYTES` in `ringattn.transport.copy_engine`.
_AHEAD = 2
# Votes of shallower layers while they count, in sizes of those votes in bf16: joined for a layer, sums and messages in
# fp32, and the gradients of each layer's. Read off the allocations of a backward pass with nothing else in it.
_VOTE_PARTS = 8.0
_VOTE_PARTS_RING = 9.4
# Layer inputs on the GPU while the others are on the host: in use, and on the way.
_INPUTS_AT_HAND = 2
# Rows and keys whose biases exist at once: `span_of` (two tiles of rows for each of 132 multiprocessors, over all
# heads) and `span_all` of the kernels, and bytes of a pair in two buffers.
_SELECTION_PROGRAMS = 264
_SELECTION_KEYS = 32_768
_SELECTION_PAIR = 6
_FP32 = 4


def table_bytes_per_token(model: ModelConfig) -> float:
    """Tokens, labels and positions as int64, cos and sin in fp32."""
    return 3 * 8 + 2 * attention_shape(model).rotary_dim / 2 * _FP32


def kept_items(case: MemoryCase, memory: MemoryConfig, layers: int) -> Iterator[Item]:
    """What the first `layers` layers keep from forward to backward."""
    model, size, tokens = case.model, case.element_bytes, case.tokens
    inner = inner_plan(case.plan, case.ulysses)
    states = column_state_bytes(model, inner, recompute=True)  # of one layer
    votes = tokens * votes_bytes_per_token(model, size)  # of one layer
    if votes:
        # a layer that is not run again keeps those of all shallower ones, joined; the last layer's are for nobody
        terms = min(layers, model.layers - 1) if memory.recompute else layers * (layers - 1) / 2
        yield Item(name="votes for deeper layers", device=terms * votes)
    # selection keeps its output unrounded
    result = tokens * attention_result_bytes_per_token(model, _FP32 if model.selection else size)
    if not memory.recompute:
        inside: float = _layer_bytes_per_token(case)
        if memory.tile is not None:  # what lies between the tiles: a layer's input, and the attention's tensors
            inside = case.hidden + _attention_bytes_per_token(case)
        whole = tokens * (inside + unrounded_bytes_per_token(model, size))
        yield Item(name="activations of all layers", device=layers * whole)
        if case.ulysses > 1:
            expanded = expanded_at_home(model, case.plan, size, recompute=True)
            yield Item(name="expanded keys and values", device=layers * expanded)
        if states:
            yield Item(name="column states of selection", device=layers * states)
        return
    inputs, away = tokens * case.hidden, layers_offloading(memory, model.layers)
    yield Item(name="inputs of layers", device=_at_hand(layers, layers - away) * inputs, host=away * inputs)
    if memory.recompute != "keep_attention":
        if states:
            yield Item(name="column states of selection", device=states)
        return
    # those that keep are the last ones, those that offload the first
    recomputed = model.layers - layers_keeping(memory, model.layers)
    kept, away = max(0, layers - recomputed), max(0, away - recomputed) if memory.offload == "all" else 0
    at_hand = _at_hand(kept, kept - away)
    yield Item(name="attention's outputs", device=at_hand * result, host=away * result)
    if states:
        yield Item(name="column states of selection", device=at_hand * states, host=away * states)


def layers_keeping(memory: MemoryConfig, layers: int) -> int:
    """How many of all layers keep their attention, with "keep_attention"."""
    return layers if memory.keep_layers is None else memory.keep_layers


def layers_offloading(memory: MemoryConfig, layers: int) -> int:
    """How many of all layers put away what they keep."""
    if memory.offload == "none":
        return 0
    return layers - 1 if memory.offload_layers is None else memory.offload_layers


def _at_hand(kept: int, staying: int) -> int:
    """Of so many layers' tensors, how many are on the GPU in the backward of the last of them.

    Args:
        staying: Those that are not put away, the last ones; may be negative, when all of them are on the host. While
            there are several, none is on its way back: a layer announces only the one before it.
    """
    return min(kept, max(_INPUTS_AT_HAND, staying))


def loss_items(case: MemoryCase) -> Iterator[Item]:
    """The last layer's output, its norm's, and their gradient; logits of a tile and the head's gradient."""
    model, size = case.model, case.element_bytes
    yield Item(name="hidden states at the loss", device=3 * case.tokens * case.hidden)
    yield Item(name="loss tile", device=loss_bytes(model, min(case.loss_tile, case.tokens), size))


def feed_forward_items(case: MemoryCase, memory: MemoryConfig) -> Iterator[Item]:
    model, size, tokens = case.model, case.element_bytes, case.tokens
    yield from _gradient_items(case)
    layer, flight = _layer_bytes_per_token(case), flight_bytes_per_token(model, size)
    inputs = case.hidden
    if memory.tile is not None:
        if memory.recompute:
            yield Item(name="one layer again", device=tokens * _attention_bytes_per_token(case))
        # of the layer's result and input, and of the attention's output
        out = attention_shape(model).heads * attention_shape(model).value_dim * size
        yield Item(name="gradients inside a layer", device=tokens * (2 * inputs + out))
        scratch = layer - _attention_bytes_per_token(case) + flight
        yield Item(name="tile of a layer", device=min(memory.tile, tokens) * scratch)
        return
    if memory.recompute:  # what it keeps less its input, which is among `kept`
        yield Item(name="one layer again", device=tokens * (layer - inputs))
    yield Item(name="gradients inside a layer", device=tokens * (flight + inputs))


def attention_items(case: MemoryCase, memory: MemoryConfig, layers: int) -> Iterator[Item]:
    """Gradients of queries and payload beside what the attention has kept, and what is under way around the ring.

    Args:
        layers: It is the backward of the last of so many layers.
    """
    model, size, tokens = case.model, case.element_bytes, case.tokens
    shape, inputs = attention_shape(model), case.hidden
    yield from _gradient_items(case)
    between = (
        model.dim + between_elements(model, fused=_fused(case))
    ) * size  # the norm's output, and what lies before the attention
    if memory.recompute:
        again = _attention_bytes_per_token(case) + (between if memory.tile is None else 0)
        yield Item(name="one layer again", device=tokens * again)
    gradients = shape.heads * shape.value_dim
    # in a ring without groups those of queries and payload are there when the last sums have gone
    if _goes_in_groups(model) or inner_plan(case.plan, case.ulysses).cp_size == 1:
        gradients += shape.heads * shape.score_dim + shape.payload
    yield Item(name="gradients inside a layer", device=tokens * (gradients * size + inputs))
    votes = (layers - 1) * tokens * votes_bytes_per_token(model, size)
    if votes:
        parts = _VOTE_PARTS if case.plan.cp_size == 1 else _VOTE_PARTS_RING
        yield Item(name="votes joined, and gradients", device=parts * votes)
    yield from _ring_items(case, memory)


def _layer_bytes_per_token(case: MemoryCase) -> float:
    """What a layer keeps if nothing is recomputed or in tiles; a compiled gate keeps its inputs, not silu's result."""
    model, size = case.model, case.element_bytes
    kept = layer_bytes_per_token(model, size, fused=_fused(case))
    if case.compiled:
        kept -= model.ffn_dim * size
    if case.autocast:  # the layer's input is unrounded, and so is that of its second norm unless that is compiled
        unrounded, rounded = case.hidden - model.dim * size, model.dim * size
        kept += (
            unrounded + _ROUNDED_COPIES_COMPILED * rounded
            if case.compiled
            else 2 * unrounded + _ROUNDED_COPIES * rounded
        )
    return kept


def _attention_bytes_per_token(case: MemoryCase) -> float:
    """Queries, payload, out and lse."""
    return attention_elements(case.model) * case.element_bytes + 4 * attention_shape(case.model).heads


def _ring_items(case: MemoryCase, memory: MemoryConfig) -> Iterator[Item]:
    """Working set of the ring's backward pass beside its results."""
    model, plan, size = case.model, case.plan, case.element_bytes
    if case.ulysses > 1:
        exchanged = ulysses_bytes(model, plan, size, case.ulysses)
        yield Item(name="exchange of heads", device=exchanged.memory - exchanged.ring.memory)
        expanded = expanded_at_home(model, plan, size, recompute=True) if memory.recompute else 0  # else it is kept
    else:
        in_graphs = expands_in_ring(case) and graph_bytes(case) > 0  # and counted there
        expanded = (
            0 if in_graphs and not _graphs_of_rows(case) else expanded_bytes(model, plan, size, fused=_fused(case))
        )
    if expanded:
        yield Item(name="expanded keys and values", device=expanded)
    if _by_definition(case):
        yield Item(name="tiles of scores", device=_tile_bytes(case))
    if model.selection is None:
        yield Item(name="messages and sums of the ring", device=_ring_working_set(case))
    else:
        yield Item(name="messages and sums of selection", device=_selection_working_set(case))


def _ring_working_set(case: MemoryCase) -> float:
    """Payloads under way, their gradients, parts of gradients that wait to be summed, the kernel's fp32 sums."""
    queries, payload = _group_bytes(case)
    ring = inner_plan(case.plan, case.ulysses).cp_size
    kernel = 2 * queries * (_FP32 / 2) / case.element_bytes if case.on_gpu else 0.0  # cuDNN's fp32 gradient of queries
    if ring == 1:
        return kernel
    under_way = _NEEDED_PART * min(_INBOX_SLOTS, ring - 1)
    return _QUERY_PARTS * queries + (2 * under_way + 1) * payload + kernel


def _by_definition(case: MemoryCase) -> bool:
    """Whether blocks go through `ringattn.kernels.reference`: on CPUs where widths differ, on GPUs for fp32 and masks.

    Selection has kernels of its own.
    """
    shape, plan = attention_shape(case.model), case.plan
    if case.model.selection is not None:
        return False
    if not case.on_gpu:
        return shape.score_dim != shape.value_dim
    return case.element_bytes == _FP32 or plan.window is not None


def _tile_bytes(case: MemoryCase) -> float:
    inner = inner_plan(case.plan, case.ulysses)
    pairs = attention_shape(case.model).heads / case.ulysses * inner.longest_shard**2
    return TILES * _FP32 * min(pairs, max_scores(on_cpu=not case.on_gpu))


def _group_bytes(case: MemoryCase) -> tuple[float, float]:
    """Queries and payload of the heads that go around together, in bytes: see `ringattn.softmax`."""
    shape, degree = attention_shape(case.model), case.ulysses
    inner = inner_plan(case.plan, degree)
    heads, kv_heads = max(1, shape.heads // degree), max(1, shape.key_heads // degree)
    tokens = inner.longest_shard * case.element_bytes
    queries, payload = tokens * heads * shape.score_dim, tokens * shape.payload / degree
    if not _goes_in_groups(case.model) or inner.cp_size == 1:
        return queries, payload
    count = head_groups(kv_heads, max(queries, payload))
    return queries / count, payload / count


def _fused(case: MemoryCase) -> bool:
    """Whether what expands does so by GPU kernels that keep nothing; SAS has some for 16 bits, up to some sizes."""
    model = case.model
    if model.attention != "sas" or not case.on_gpu:
        return case.on_gpu
    if case.element_bytes != 2:
        return False
    sizes = (model.head_dim, model.simulated_heads or 0, model.simulated_dim, model.kernel_size or 1)
    return all(size_problem(heads, *sizes) is None for heads in (model.heads, model.kv_heads))


def _goes_in_groups(model: ModelConfig) -> bool:
    """Whether heads go around in groups, if they are many: neither with selection nor with what expands."""
    return model.selection is None and not attention_shape(model).payload_flops


def _selection_working_set(case: MemoryCase) -> float:
    """fp32 gradients of all queries, of the visiting keys and values and of the own payload; payloads under way and
    the gradient that is given back; the biases of a span of rows."""
    shape, tokens = attention_shape(case.model), inner_plan(case.plan, case.ulysses).longest_shard
    ring, heads = inner_plan(case.plan, case.ulysses).cp_size, 1 / case.ulysses
    sums = shape.heads * shape.score_dim + (0 if shape.payload_flops else shape.expanded)
    if ring > 1:
        sums += shape.payload
    messages = shape.payload * (min(_AHEAD, ring - 1) + 1) if ring > 1 else 0
    rows = 256 * max(2, _SELECTION_PROGRAMS // max(1, round(shape.heads * heads)))
    spans = rows * min(tokens, _SELECTION_KEYS) * _SELECTION_PAIR
    # votes travel as those of another layer: both ballots joined, and their fp32 gradients
    votes = 24 * shape.score_dim * tokens if case.ulysses > 1 else 0
    return tokens * heads * (sums * _FP32 + messages * case.element_bytes) + spans + votes


def graph_items(case: MemoryCase) -> Iterator[Item]:
    """What CUDA graphs hold from one step to the next."""
    held = graph_bytes(case)
    yield Item(name="tensors of CUDA graphs", device=held)
    if held and expands_in_ring(case):  # all layers' graphs have this memory in common
        made = expanded_bytes(case.model, case.plan, case.element_bytes, fused=_fused(case))
        yield Item(name="expanded keys and values", device=made)


def graph_bytes(case: MemoryCase) -> float:
    """What the graphs of passes read and write, at short shards: see `CopyEngineTransport.captures`.

    Several documents in a row: see `_graphs_of_rows`.
    """
    shape, inner = attention_shape(case.model), inner_plan(case.plan, case.ulysses)
    selection, expanded = case.model.selection, expands_in_ring(case)
    tokens, heads = inner.longest_shard, shape.heads / case.ulysses
    queries, out = (tokens * heads * width * case.element_bytes for width in (shape.score_dim, shape.value_dim))
    payload = tokens * shape.payload / case.ulysses * case.element_bytes
    # Guided layers, see `ringattn.passes`; and modules that expand with hooks, which ZeRO-3 gives to all of them.
    none = (selection is not None and selection.guide) or (expanded and case.engine == "zero" and case.zero_stage == 3)
    over_copy_engines = case.on_gpu and 1 < inner.cp_size == _near_ranks(case)
    widest = max(queries, out, payload)
    if expanded:  # keys or values, whichever are wider
        made = tokens * shape.key_heads * max(shape.score_dim, shape.value_dim) * case.element_bytes
        widest = max(queries, out, made)
    elif selection is not None:
        widest = max(queries, out)
    if none or not over_copy_engines or widest > GRAPH_BYTES:
        return 0.0
    if selection is not None or expanded:
        # Forward q, payload and out; backward the same, dout, dq and what the payload gets. Selection's out is in fp32.
        wide = 1.0 if selection is None else _FP32 / case.element_bytes
        # Parameters that expand are copied in for both passes, and have gradients.
        parameters = 3 * _FP32 * shape.expansions if expanded else 0
        one = queries * 4 + 2 * out * wide + 3 * payload + parameters
    else:  # forward q, out and lse; backward these, dout, dq and what the payload gets
        one = 3 * queries + 3 * out + 2 * tokens * heads * _FP32 + payload
    return 2 * one + _ring_working_set(case) if _graphs_of_rows(case) else one


def _graphs_of_rows(case: MemoryCase) -> bool:
    """Whether graphs are of one row alone: the next row's take their memory, and rows of one document beside them do
    not use it; what a pass works with is theirs, while calls that come before have as much of their own."""
    return case.documents and case.model.selection is None


def expands_in_ring(case: MemoryCase) -> bool:
    """Whether payloads are expanded where they arrive. Where heads are exchanged, they are at home."""
    ring = inner_plan(case.plan, case.ulysses).cp_size > 1
    return ring and case.ulysses == 1 and attention_shape(case.model).payload_flops > 0


def _gradient_items(case: MemoryCase) -> Iterator[Item]:
    for name, device in gradient_flight_items(
        case.model, engine=case.engine, num_processes=case.num_processes, element_bytes=case.element_bytes, last=False
    ):
        yield Item(name=name, device=device)


def end_items(case: MemoryCase) -> Iterator[Item]:
    """The embedding's gradient, when all layers are done."""
    yield Item(name="gradient of the hidden states", device=case.tokens * case.model.dim * case.element_bytes)
    for name, device in gradient_flight_items(
        case.model, engine=case.engine, num_processes=case.num_processes, element_bytes=case.element_bytes, last=True
    ):
        yield Item(name=name, device=device)


def peer_bytes(case: MemoryCase) -> float:
    """Own payload and inbox slots, where GPUs of one node copy from each other."""
    ring, near = inner_plan(case.plan, case.ulysses).cp_size, _near_ranks(case)
    if not case.on_gpu or near == 1 or ring % near:
        return 0.0
    # of the deepest layer, whose payload has the keys of all others' votes
    voting = (case.model.layers - 1) * case.tokens * votes_bytes_per_token(case.model, case.element_bytes) / 2
    return (1 + min(_INBOX_SLOTS, ring - 1)) * (_group_bytes(case)[1] + voting)


def _near_ranks(case: MemoryCase) -> int:
    """Of an (inner) ring, on one node, whose memory is within reach."""
    if case.transport == "p2p":
        return 1
    # It has one rank of every team, and teams are neighbours, but in the striped layout: see `ringattn.teams`.
    apart = 1 if case.plan.layout == "striped" else case.ulysses
    return min(inner_plan(case.plan, case.ulysses).cp_size, max(1, case.per_node // apart))
