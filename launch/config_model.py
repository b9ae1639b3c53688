"""The `model` section: which decoder, its kind of attention, and selective attention."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from launch.config_section import PositiveFloat, PositiveInt, Section

EvenInt = Annotated[int, Field(ge=2, multiple_of=2)]
_SELECTION = "selection_"


class ModelSection(Section):
    """Which decoder; null means: as the preset says, or not used by this kind of attention."""

    preset: Literal["test", "qwen3-0.6b", "llama-3.2-1b", "llama-3-8b"] = Field(
        default="test", description="shape to start at"
    )
    layers: PositiveInt | None = Field(default=None, description="number of decoder layers")
    dim: PositiveInt | None = Field(default=None, description="model width")
    heads: PositiveInt | None = Field(default=None, description="query heads")
    kv_heads: PositiveInt | None = Field(default=None, description="key/value heads; must divide heads")
    head_dim: EvenInt | None = Field(default=None, description="width of one head (even)")
    ffn_dim: PositiveInt | None = Field(default=None, description="inner width of the SwiGLU feed-forward")
    vocab_size: PositiveInt | None = Field(
        default=None, description="null: from the tokenizer; else at least the tokenizer's"
    )
    attention: Literal["mha", "mqa", "gqa", "mla", "tpa", "sas"] | None = Field(
        default=None, description="kind of attention; null: mha, mqa or gqa, as heads and kv_heads are"
    )
    latent_dim: PositiveInt | None = Field(default=None, description="mla: width of the latent that travels")
    rope_dim: EvenInt | None = Field(default=None, description="mla: rotary part of queries and keys (even)")
    value_dim: PositiveInt | None = Field(default=None, description="mla: width of a value; null: head_dim")
    query_rank: PositiveInt | None = Field(default=None, description="tpa: pairs of factors of a query")
    key_rank: PositiveInt | None = Field(default=None, description="tpa: pairs of factors of a key, which travel")
    value_rank: PositiveInt | None = Field(default=None, description="tpa: pairs of factors of a value, which travel")
    simulated_heads: PositiveInt | None = Field(default=None, description="sas: heads of the attention; k * heads")
    simulated_dim: EvenInt | None = Field(default=None, description="sas: width of their queries and keys (even)")
    kernel_size: PositiveInt | None = Field(
        default=None, description="sas: features that the head expansion sees (odd; 1: MLP over heads); null: 5"
    )
    selection: bool = Field(default=False, description="selective attention: queries vote keys out")
    selection_head: int = Field(default=0, ge=0, description="query head that votes; with sas a simulated one")
    selection_protect_first: bool = Field(default=True, description="a document's first token cannot be voted out")
    selection_lag: int = Field(default=1, ge=1, description="votes count at multiples of this (tokens); 1: exact")
    selection_gain: float | Literal["learned"] = Field(default=1.0, description="factor of votes; learned: per layer")
    selection_gain_start: float = Field(default=0.0, description="first value of a learned gain")
    selection_zero_key_init: bool = Field(default=False, description="the voting head's keys start at zero")
    selection_guide: bool = Field(default=False, description="votes of shallower layers count, by learned factors")
    selection_memory_tau: PositiveFloat = Field(default=1.0, description="memory loss: F at which a key is forgotten")
    selection_memory_eps: float = Field(default=0.0, ge=0, description="memory loss: its weight; 0: none")
    qk_norm: bool | None = Field(default=None, description="RMSNorm on each head's query and key (as Qwen3 has)")
    tied_head: bool | None = Field(default=None, description="output projection shares the embedding's weight")
    norm_eps: PositiveFloat | None = Field(default=None, description="epsilon of RMSNorm")
    rope_theta: Annotated[float, Field(gt=1)] | None = Field(default=None, description="base of the rotary frequencies")
    rope_scaling: Literal["none", "linear", "ntk", "yarn"] = Field(
        default="none", description="stretching of the positions"
    )
    rope_factor: float = Field(default=1.0, ge=1, description="how many times longer than rope_original_len (ratio)")
    rope_original_len: PositiveInt | None = Field(
        default=None, description="length the rotary base was made for (tokens)"
    )

    def overrides(self) -> dict[str, Any]:
        """Fields to lay over the preset: `model.preset(section.preset, **section.overrides())`.

        Unset fields (null) are absent, and so is what the rotary scaling or the selection in force does not use:
        `ModelConfig` refuses it, while here it only is a setting without effect, which the loader warns about.

        Raises:
            ValueError: a selection that cannot be; a checked `Config` has none.
        """
        found = self.shape()
        if self.selection:
            from model.config import SelectionConfig  # torch-free; late, since model/ is above this module

            found["selection"] = SelectionConfig(**self.selection_settings())
        return found

    def shape(self) -> dict[str, Any]:
        """The overrides but for the selection."""
        unused = set() if self.rope_scaling == "yarn" else {"rope_original_len"}
        if self.rope_scaling == "none":
            unused.add("rope_factor")
        unused |= {name for name in type(self).model_fields if name.startswith("selection")}
        return self.model_dump(exclude={"preset", *unused}, exclude_none=True)

    def selection_settings(self) -> dict[str, Any]:
        """Fields of `model.config.SelectionConfig` that have an effect."""
        unused = {"selection"}
        if self.selection_gain != "learned":
            unused.add("selection_gain_start")
        if self.selection_memory_eps == 0:
            unused.add("selection_memory_tau")
        names = [name for name in type(self).model_fields if name.startswith(_SELECTION) and name not in unused]
        return {name.removeprefix(_SELECTION): getattr(self, name) for name in names}
