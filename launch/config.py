"""Every setting of a run: one frozen pydantic model per section, each field with its range and its meaning.

Read in this order: the sections below are the YAML file's top-level keys (`model` is in `launch/config_model.py`). What
two fields mean together is checked in `launch/config_checks.py`; where a value came from is known to
`launch/config_load.py`. No torch is imported here, so a mistake is reported at once.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from launch.config_checks import cross_problems, resolve_mesh
from launch.config_model import ModelSection
from launch.config_problem import ConflictingSettings
from launch.config_section import PositiveFloat, PositiveInt, Section, Text


class RunConfig(Section):
    """Where the run lives and what makes it repeatable."""

    dir: Text = Field(description="run folder (checkpoints, metrics, status.json), relative to the working directory")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the weights and of the order of the data")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA where there is a GPU, else CPU"
    )
    deterministic: bool | Literal["auto"] = Field(
        default="auto",
        description="bitwise repeatable kernels only; slower on GPUs; auto: on the CPU, where it is free",
    )


class DataConfig(Section):
    """What is read, how it becomes tokens, and how documents become rows of `seq_len` tokens."""

    source: Literal["python", "json", "parquet", "text", "hub"] = Field(
        default="python",
        description="python: the standard library sources of this interpreter; hub: a Hugging Face dataset",
    )
    paths: Annotated[tuple[Text, ...], Field(strict=False)] = Field(
        default=(), description="files, folders or globs; required for json, parquet and text"
    )
    name: Text | None = Field(default=None, description="dataset name on the hub; required for hub")
    subset: Text | None = Field(default=None, description="configuration of the hub dataset")
    split: Text = Field(default="train", description="split of the hub dataset")
    streaming: bool = Field(default=False, description="read a hub dataset without downloading it first")
    field: Text = Field(default="text", description="name of the column that holds the text")
    seq_len: int = Field(ge=2, description="row length T over the whole ring (tokens)")
    tokenizer: Text = Field(
        default="bytes", description="bytes, bpe (trained on this data), or a Hugging Face tokenizer folder"
    )
    bpe_vocab: int = Field(default=4096, ge=257, description="vocabulary of the bpe that is trained (tokens)")
    shuffle: bool = Field(default=True, description="shuffle the documents, by run.seed")
    max_documents: PositiveInt | None = Field(default=None, description="read only the first N documents")
    held_out_fraction: float = Field(
        default=0.02, ge=0, lt=1, description="part of the documents kept for evaluation (ratio)"
    )
    held_out_rows: int = Field(default=8, ge=0, description="rows of held-out documents an evaluation reads")
    on_error: Literal["error", "skip"] = Field(
        default="error", description="what a damaged record does; skipped ones are counted"
    )
    accept_changed: bool = Field(default=False, description="resume although the data is not what the run began with")
    cross_document_attention: bool = Field(default=False, description="let packed documents see each other")


class ParallelConfig(Section):
    """How one sequence is cut over processes. cp: context parallel (ring), dp: data parallel."""

    cp: PositiveInt | Literal["auto"] = Field(default="auto", description="processes per ring; auto: processes / dp")
    dp: PositiveInt | Literal["auto"] = Field(default="auto", description="number of rings; auto: processes / cp, or 1")
    layout: Literal["contiguous", "zigzag", "striped"] = Field(
        default="zigzag", description="which positions a rank holds"
    )
    window: PositiveInt | None = Field(
        default=None, description="sliding window: a query sees this many keys back (tokens)"
    )
    sinks: int = Field(default=0, ge=0, description="first tokens of a document that every window also sees (tokens)")
    kernel: Literal["auto", "reference", "cpu", "cudnn", "flash", "flash3", "flash4", "tiled", "triton"] = Field(
        default="auto",
        description="attention of one block; flash3, flash4: packages of that name; tiled, triton: selective attention",
    )
    transport: Literal["auto", "copy_engine", "hybrid", "p2p"] = Field(
        default="auto",
        description="how payloads move: copy_engine inside a host, p2p by messages, hybrid: the first inside hosts",
    )
    ulysses: PositiveInt | Literal["auto"] = Field(
        default=1,
        description="ranks that exchange heads for tokens; parallel.cp for no ring at all; auto: as was measured",
    )
    self_check: bool = Field(
        default=True,
        description="before the first step, prove attention of this run at small size against its definition",
    )
    setup_timeout_s: float = Field(default=600.0, gt=0, description="limit on start-up and the first step (seconds)")
    hop_timeout_s: float = Field(default=120.0, gt=0, description="limit on a hop or collective after that (seconds)")


class EngineConfig(Section):
    """How weights, gradients and optimizer state are spread over the processes."""

    name: Literal["ddp", "fsdp", "zero"] = Field(default="fsdp", description="replicated, FSDP2, or DeepSpeed ZeRO")
    zero_stage: int = Field(
        default=1, ge=0, le=3, description="what ZeRO shards: 1 optimizer, 2 and gradients, 3 and weights"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="of the computation; the master weights stay fp32"
    )
    compile: bool | Literal["auto"] = Field(
        default="auto",
        description="the halves of a layer around its attention (with ZeRO-3, and in MLA, TPA and SAS before it, their "
        "norms, gates and RoPE alone) and the loss by torch.compile; auto: on GPUs, but not with "
        "run.deterministic=true, since the order of compiled sums depends on the length that came first",
    )


class MemoryConfig(Section):
    """What is kept, recomputed, moved to the host or done in pieces; `memory: auto` is short for {auto: true}."""

    auto: bool = Field(default=False, description="choose everything below by the memory at hand; short: memory: auto")
    recompute: bool | Literal["keep_attention"] = Field(
        default=False,
        description="recompute each layer in the backward pass instead of keeping it; keep_attention: all of it but "
        "attention, so that the ring does not run again",
    )
    keep_layers: PositiveInt | None = Field(
        default=None,
        description="layers, counted from the last, that keep_attention is for, the others are as with true; null: all",
    )
    offload: Literal["none", "inputs", "all"] = Field(
        default="none",
        description="what goes to pinned host memory until the backward pass: each layer's input; all: and what "
        "keep_attention keeps",
    )
    offload_layers: PositiveInt | None = Field(
        default=None,
        description="layers, counted from the first, that offload is for, the others keep theirs on the GPU; null: all "
        "but the last, whose input is needed at once",
    )
    tile: PositiveInt | None = Field(
        default=None,
        description="positions that norms, projections and feed-forward see at a time (tokens); null: the whole shard",
    )
    optimizer: Literal["device", "host"] = Field(
        default="device",
        description="where fp32 weights, gradients and AdamW state are; host: in host memory, with fsdp",
    )
    weights: Literal["regather", "keep"] = Field(
        default="regather",
        description="a layer's gathered weights between its forward and its backward pass, with fsdp: let go of and "
        "gathered again, or kept",
    )


class OptimConfig(Section):
    """AdamW and its schedule."""

    steps: PositiveInt = Field(description="optimizer steps of the whole run")
    rows_per_step: int = Field(
        default=1, ge=1, description="rows of seq_len tokens per step over all rings; multiple of dp"
    )
    lr: float = Field(default=3e-4, gt=0, description="peak learning rate")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warmup")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="cosine", description="learning rate after the warmup"
    )
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1, description="last learning rate over the peak (ratio)")
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = Field(default=(0.9, 0.95), description="decay of AdamW's two moments")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled weight decay")
    clip_norm: PositiveFloat | None = Field(default=1.0, description="largest global gradient norm; null: no clipping")
    loss_tile: int = Field(default=2048, ge=1, description="positions whose logits exist at one time (tokens)")
    max_bad_steps: int = Field(
        default=3, ge=1, description="non-finite steps in a row before the run stops with status 76"
    )


class CheckpointConfig(Section):
    """When state is saved and how much of it is kept."""

    every_steps: int = Field(default=100, ge=0, description="steps between checkpoints; 0: none but the last")
    keep: int = Field(default=2, ge=1, description="published checkpoints kept; older ones are removed")
    asynchronous: bool = Field(default=False, description="write while training goes on")
    save_last: bool = Field(default=True, description="save after the last step")
    max_failed_saves: int = Field(
        default=2, ge=0, description="failed saves in a row the run survives before status 73"
    )


class EvaluateConfig(Section):
    """When the held-out rows are measured."""

    every_steps: int = Field(
        default=0, ge=0, description="steps between evaluations; 0: only before and after training"
    )


class MetricsConfig(Section):
    """Where numbers go. metrics.jsonl is always written."""

    every_steps: int = Field(default=1, ge=1, description="steps between records")
    selection_every_steps: int = Field(
        default=50, ge=0, description="steps between looks at what selective attention does in each layer; 0: never"
    )
    hop_trace_every_steps: int = Field(
        default=0,
        ge=0,
        description="steps between tables of exposed communication per layer and hop; such a step takes no "
        "CUDA graphs and is slower at short shards; 0: never",
    )
    tensorboard: bool = Field(default=False, description="also write TensorBoard events")
    wandb: bool = Field(default=False, description="also log to Weights & Biases, if installed")
    peak_tflops: PositiveFloat | None = Field(
        default=None, description="peak of one device for MFU; null: known per GPU, or no MFU"
    )


class Config(Section):
    """A whole run. Building one checks every field and every combination that can be judged without torch."""

    run: RunConfig
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    optim: OptimConfig
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        problems = cross_problems(self)
        if problems:
            raise ConflictingSettings(problems)
        return self

    def compiles(self, *, on_gpu: bool) -> bool:
        """`engine.compile`, resolved for a kind of device."""
        choice = self.engine.compile
        return (on_gpu and self.run.deterministic is not True) if choice == "auto" else choice

    def mesh(self, num_processes: int) -> tuple[int, int]:
        """Resolve `auto` for this many processes.

        Returns:
            (dp, cp), with dp * cp == num_processes.

        Raises:
            ConfigError: the processes do not fit dp and cp, or dp and cp do not fit the batch or the sequence. All
                the problems are listed.
        """
        return resolve_mesh(self, num_processes)


SECTIONS: dict[str, type[Section]] = {
    "run": RunConfig,
    "model": ModelSection,
    "data": DataConfig,
    "parallel": ParallelConfig,
    "engine": EngineConfig,
    "memory": MemoryConfig,
    "optim": OptimConfig,
    "checkpoint": CheckpointConfig,
    "evaluate": EvaluateConfig,
    "metrics": MetricsConfig,
}
