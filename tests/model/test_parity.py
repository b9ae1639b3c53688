"""Against the Hugging Face implementations of Qwen3 and Llama: RoPE frequencies, loss and every gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import ModelConfig
from model.decoder import Decoder
from model.rope import attention_factor, inverse_frequencies, rotation
from tests.model.dense import dense_causal, random_row, tiny

transformers = pytest.importorskip("transformers")

OUR_NAMES = (
    ("model.embed_tokens.", "embed."),
    ("model.layers.", "layers."),
    ("model.norm.", "norm."),
    ("lm_head.", "head."),
    ("self_attn.", "attention."),
    ("input_layernorm.", "attention_norm."),
    ("post_attention_layernorm.", "mlp_norm."),
)


def _our_name(name: str) -> str:
    for theirs, ours in OUR_NAMES:
        name = name.replace(theirs, ours)
    return name


def _their_config(family: str, config: ModelConfig, **rope):  # type: ignore[no-untyped-def]
    kind = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}[family]
    return kind(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_head,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta, **rope},
        attn_implementation="eager",
    )


ROPES = [
    ({}, {}),
    ({"rope_scaling": "linear", "rope_factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    (
        {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), ROPES, ids=["plain", "linear", "yarn"])
@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen3", False), ("llama", True), ("llama", False)])
def test_loss_and_gradients_equal_transformers(family: str, tied: bool, ours: dict, theirs: dict) -> None:
    config = tiny(qk_norm=family == "qwen3", tied_head=tied, dim=32, **ours)
    torch.manual_seed(0)
    kind = {"qwen3": transformers.Qwen3ForCausalLM, "llama": transformers.LlamaForCausalLM}[family]
    oracle = kind(_their_config(family, config, **theirs)).double()
    for parameter in oracle.parameters():  # away from the flat start: norms that are not one, scores that matter
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    module = Decoder(config).double()
    weights = {_our_name(name): parameter for name, parameter in oracle.named_parameters()}
    assert weights.keys() == dict(module.named_parameters()).keys()
    module.load_state_dict({name: parameter.detach() for name, parameter in weights.items()})

    tokens, labels, positions = random_row(config, 24, batch=2)
    loss = module(tokens, labels, positions, dense_causal, 10)
    loss.backward()
    logits = oracle(input_ids=tokens, position_ids=positions[None].expand(2, -1)).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    expected.backward()

    # theirs has fp32 angles and norms inside even for fp64 weights: that, not ours, bounds the agreement
    torch.testing.assert_close(loss, expected, rtol=3e-6, atol=0)
    for name, parameter in module.named_parameters():
        wanted, got = weights[name].grad, parameter.grad
        assert wanted is not None
        assert got is not None
        assert (got - wanted).norm() < 1e-5 * wanted.norm(), name


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize(("scaling", "factor"), [("linear", 8.0), ("ntk", 8.0), ("yarn", 4.0), ("yarn", 32.0)])
def test_frequencies_equal_transformers(scaling: str, factor: float, width: int, theta: float) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = 4096 if scaling == "yarn" else None
    config = tiny(
        head_dim=width, rope_theta=theta, rope_scaling=scaling, rope_factor=factor, rope_original_len=original
    )
    if scaling == "ntk":
        # theirs is dynamic: with factor 1 and a length of `factor` times the original it is the fixed rule
        kind, length = "dynamic", int(256 * factor)
        their_config = _their_config("qwen3", config, rope_type=kind, factor=1.0)
    else:
        kind, length = scaling, None
        their_config = _their_config(
            "qwen3", config, rope_type=kind, factor=factor, original_max_position_embeddings=original
        )
    frequencies, temperature = ROPE_INIT_FUNCTIONS[kind](their_config, torch.device("cpu"), seq_len=length)
    torch.testing.assert_close(inverse_frequencies(config), frequencies.double(), rtol=1e-6, atol=1e-12)
    assert attention_factor(config) == pytest.approx(temperature)


@pytest.mark.parametrize(("ours", "theirs"), ROPES, ids=["plain", "linear", "yarn"])
def test_rotation_equals_transformers(ours: dict, theirs: dict) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

    config = tiny(head_dim=32, **ours)
    positions = torch.tensor([3, 0, 200, 17, 64])
    heads: Tensor = torch.randn(1, 5, 2, 32, generator=torch.Generator().manual_seed(0))
    embedding = Qwen3RotaryEmbedding(_their_config("qwen3", config, **theirs))
    turned, _ = apply_rotary_pos_emb(heads, heads, *embedding(heads, positions[None]), unsqueeze_dim=2)
    torch.testing.assert_close(rotation(config, positions).apply(heads), turned, rtol=1e-4, atol=5e-5)
