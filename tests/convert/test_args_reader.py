"""Megatron's args, NeMo's YAML and Megatron-Bridge's configuration state the architecture, or cannot be expressed."""

import re
from typing import Any

import megatron_goldens as megatron
import pytest

from kdjax.config import ModelConfig
from kdjax.convert.architecture import Stated, resolve
from kdjax.convert.megatron.args_reader import SUPPORTED_VALUES, UNSUPPORTED, from_args, from_nemo, from_provider
from kdjax.types import UserError

NEMO = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 192,
    "num_attention_heads": 4,
    "kv_channels": None,
    "max_position_embeddings": 32,
    "override_vocab_size": 500,
}
PROVIDER = {
    "num_layers": 4,
    "hidden_size": 64,
    "seq_length": 32,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "activation_func": "torch.nn.functional.gelu",
}


def args(variant: str = "gpt2ish", **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (megatron.args(variant) | changes).items() if value != "absent"}


def model(stated: dict[str, Stated]) -> ModelConfig:
    return resolve(stated, [])[0]


@pytest.mark.parametrize(
    ("variant", "changes", "expected"),
    [
        ("gpt2ish", {}, {"n_groups": 4, "max_positions": 32, "tied": True, "bias": True, "qkv_bias": False}),
        ("llamaish", {}, {"n_groups": 2, "max_positions": None, "tied": False, "bias": False, "norm": "rmsnorm"}),
        ("llamaish", {"group_query_attention": False}, {"n_groups": 4}),
        ("gpt2ish", {"bias_gelu_fusion": True}, {"activation": "gelu_tanh"}),
        ("gpt2ish", {"bias_gelu_fusion": True, "add_bias_linear": False}, {"activation": "gelu", "qkv_bias": True}),
        ("gpt2ish", {"openai_gelu": True}, {"activation": "gelu_tanh"}),
        ("gpt2ish", {"squared_relu": True, "bias_gelu_fusion": True}, {"activation": "squared_relu"}),
        ("gpt2ish", {"layernorm_zero_centered_gamma": True}, {"norm": "layernorm_1p"}),
        ("gpt2ish", {"apply_layernorm_1p": True}, {"norm": "layernorm_1p"}),
        ("gpt2ish", {"layernorm_epsilon": "absent", "norm_epsilon": 1e-6}, {"norm_eps": 1e-6}),
        ("gpt2ish", {"normalization": "absent"}, {"norm": "layernorm"}),
        ("llamaish", {"rotary_percent": 0.5, "rotary_base": 500000}, {"rope_fraction": 0.5, "rope_theta": 5e5}),
        ("llamaish", {"use_rope_scaling": True}, {"rope_llama3": (8, 1, 4, 8192)}),
        ("llamaish", {"use_rope_scaling": True, "rope_scaling_factor": 32.0}, {"rope_llama3": (32, 1, 4, 8192)}),
        ("llamaish", {"rotary_seq_len_interpolation_factor": 4}, {"rope_linear_factor": 4}),
        ("llamaish", {"qk_layernorm": True}, {"qk_norm": True}),
        ("gpt2ish", {"position_embedding_type": "absent"}, {"position": "learned"}),
        ("gpt2ish", {"use_rotary_position_embeddings": True}, {"position": "rope"}),
        ("gpt2ish", {}, {"vocab_size": 500}),
        ("gpt2ish", {"tokenizer_type": "GPT2BPETokenizer"}, {"vocab_size": 499}),
        ("gpt2ish", {"tokenizer_type": "NullMultimodalTokenizer"}, {"vocab_size": 500}),
        ("gpt2ish", {"ffn_hidden_size": None}, {"d_ff": 256}),
        ("llamaish", {"group_query_attention": "absent"}, {"n_groups": 4}),
        ("llamaish", {"add_bias_linear": "absent"}, {"bias": True}),
        ("llamaish", {"untie_embeddings_and_output_weights": "absent"}, {"tied": True}),
        ("llamaish", {"add_qkv_bias": True}, {"bias": False, "qkv_bias": True}),
        ("gpt2ish", {"add_qkv_bias": True}, {"bias": True, "qkv_bias": False}),
        ("gpt2ish", {"max_position_embeddings": None, "encoder_seq_length": 48}, {"max_positions": 48}),
        ("gpt2ish", {"bias_gelu_fusion": True, "add_bias_linear": "absent"}, {"activation": "gelu_tanh"}),
    ],
)
def test_args(variant: str, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    found = model(from_args(args(variant, **changes), "somewhere"))
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"n_groups": 4, "norm": "layernorm", "activation": "gelu_tanh", "tied": True, "position": "learned"}),
        ({"bias_activation_fusion": False}, {"activation": "gelu"}),
        ({"bias": False}, {"activation": "gelu", "bias": False}),
        ({"bias": False, "qkv_bias": True}, {"bias": False, "qkv_bias": True}),
        ({"activation": "squared-relu"}, {"activation": "squared_relu"}),
        ({"activation": "fast-swiglu", "num_query_groups": 2}, {"activation": "swiglu", "n_groups": 2}),
        ({"normalization": "layernorm1p", "layernorm_epsilon": 1e-6}, {"norm": "layernorm_1p", "norm_eps": 1e-6}),
        ({"position_embedding_type": "rope", "rotary_percentage": 0.5}, {"position": "rope", "rope_fraction": 0.5}),
        ({"share_embeddings_and_output_weights": False}, {"tied": False}),
        ({"scale_positional_embedding": True}, {"rope_llama3": (8, 1, 4, 8192)}),
        ({"scale_positional_embedding": True, "scale_factor": 4}, {"rope_llama3": (4, 1, 4, 8192)}),
        ({"seq_len_interpolation_factor": 2}, {"rope_linear_factor": 2}),
        ({"normalization": "low_precision_layernorm"}, {"norm": "layernorm"}),
        ({"normalization": "rmsnorm", "qk_layernorm": True}, {"norm": "rmsnorm", "qk_norm": True}),
        ({"activation": "openai_gelu", "bias": False}, {"activation": "gelu_tanh"}),
        ({"openai_gelu": True, "bias": False}, {"activation": "gelu_tanh"}),
        ({"activation": "swiglu", "bias_activation_fusion": True}, {"activation": "swiglu"}),
        ({"num_layers": None, "encoder_num_layers": 6}, {"layers": 6}),
        ({"max_position_embeddings": None, "encoder_seq_length": 48, "seq_length": 64}, {"max_positions": 48}),
    ],
)
def test_nemo(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    found = model(from_nemo(NEMO | changes, "somewhere"))
    assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"position_embedding_type": "rope"}, {"n_groups": 4, "d_ff": 256, "activation": "gelu", "norm": "layernorm"}),
        ({"bias_activation_fusion": True}, {"activation": "gelu_tanh"}),
        ({"gated_linear_unit": True, "activation_func": {"_target_": "torch.nn.silu"}}, {"activation": "swiglu"}),
        ({"activation_func": "megatron.core.activations.squared_relu"}, {"activation": "squared_relu"}),
        ({"layernorm_zero_centered_gamma": True}, {"norm": "layernorm_1p"}),
        ({"scale_factor": 8.0, "old_context_len": 4096}, {"rope_llama3": (8, 1, 4, 4096)}),
        ({"add_bias_linear": False, "add_qkv_bias": True}, {"qkv_bias": True}),
        ({"bias_gelu_fusion": True}, {"activation": "gelu_tanh"}),
        ({"bias_gelu_fusion": True, "add_bias_linear": False}, {"activation": "gelu"}),
        ({"activation_func": None}, {"activation": "gelu"}),
        ({"activation_func": "megatron.core.fusions.fast_gelu"}, {"activation": "gelu_tanh"}),
        ({"activation_func": {"_target_": "nemo.openai_gelu"}}, {"activation": "gelu_tanh"}),
        ({"use_rope_scaling": True, "rope_scaling_factor": 16.0}, {"rope_llama3": (16, 1, 4, 8192)}),
        ({"rope_scaling": True, "low_freq_factor": 2, "high_freq_factor": 5}, {"rope_llama3": (8, 2, 5, 8192)}),
        ({"seq_len_interpolation_factor": 2}, {"rope_linear_factor": 2}),
        ({"num_query_groups": 2}, {"n_groups": 2}),
        ({"share_embeddings_and_output_weights": False}, {"tied": False}),
        ({"normalization": "RMSNorm", "qk_layernorm": True}, {"norm": "rmsnorm", "qk_norm": True}),
    ],
)
def test_provider(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    found = model(from_provider(PROVIDER | changes, "run_config.yaml", "somewhere"))
    assert {key: getattr(found, key) for key in expected} == expected


def test_all_that_is_stated_and_where() -> None:
    """Origins are shown in the table and stored in provenance.json."""
    stated = {key: (found.value, found.origin) for key, found in from_args(args("llamaish"), "somewhere").items()}
    assert stated == {
        "layers": (4, "args: num_layers 4"),
        "d_model": (64, "args: hidden_size 64"),
        "n_heads": (4, "args: num_attention_heads 4"),
        "head_dim": (16, "args: kv_channels 16"),
        "norm_eps": (1e-05, "args: layernorm_epsilon 1e-05"),
        "d_ff": (160, "args: ffn_hidden_size 160"),
        "rope_theta": (10000, "args: rotary_base 10000"),
        "rope_fraction": (1.0, "args: rotary_percent 1.0"),
        "n_groups": (2, "args: group_query_attention True, num_query_groups 2"),
        "position": ("rope", "args: position_embedding_type rope"),
        "norm": ("rmsnorm", "args: normalization RMSNorm"),
        "bias": (False, "args: add_bias_linear False"),
        "activation": ("swiglu", "args: swiglu True"),
        "tied": (False, "args: untie_embeddings_and_output_weights True"),
        "padded_vocab_size": (512, "args: padded_vocab_size 512"),
        "vocab_size": (500, "args: vocab_size 499, tokenizer_type NullTokenizer"),
    }
    unstated = "model_config.yaml: not stated, Megatron default"
    stated = {key: (found.value, found.origin) for key, found in from_nemo(NEMO, "somewhere").items()}
    assert stated == {
        "layers": (4, "model_config.yaml: num_layers 4"),
        "d_model": (64, "model_config.yaml: hidden_size 64"),
        "n_heads": (4, "model_config.yaml: num_attention_heads 4"),
        "d_ff": (192, "model_config.yaml: ffn_hidden_size 192"),
        "n_groups": (4, unstated),
        "position": ("learned", unstated),
        "max_positions": (32, "model_config.yaml: max_position_embeddings 32"),
        "norm": ("layernorm", unstated),
        "bias": (True, unstated),
        "activation": ("gelu_tanh", unstated),
        "tied": (True, unstated),
        "vocab_size": (500, "model_config.yaml: override_vocab_size 500"),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, r"somewhere: num_experts = 8: kdjax's model has no mixture of experts"),
        ({"multi_latent_attention": True}, r"multi_latent_attention = True: .* no multi-latent attention"),
        ({"position_embedding_type": "alibi"}, r"position_embedding_type = 'alibi': .*rope, learned_absolute"),
        ({"position_embedding_type": "yarn"}, r"'yarn'"),
        ({"rotary_interleaved": True}, r"interleaved rotary"),
        ({"window_size": (128, 0)}, r"window_size = \(128, 0\): .*sliding-window"),
        ({"normalization": "RMSNorm", "layernorm_zero_centered_gamma": True}, r"RMSNorm with zero-centred scales"),
        ({"qk_layernorm": True}, r"LayerNorm on queries and keys"),
        ({"quick_geglu": True}, r"quick GEGLU"),
        ({"mtp_num_layers": 1}, r"multi-token prediction"),
        ({"normalization": "BatchNorm"}, r"normalization = 'BatchNorm'"),
    ],
)
def test_features_without_a_counterpart(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_args(args(**changes), "somewhere")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_every_feature_is_refused_only_if_it_is_used(name: str) -> None:
    unused = [None, SUPPORTED_VALUES[name]] if name in SUPPORTED_VALUES else [None, False, 0, 0.0, [], "", "none"]
    for value in unused:
        from_args(args(**{name: value}), "somewhere")
    readers = (from_nemo, NEMO), (lambda found, source: from_provider(found, "x.yaml", source), PROVIDER)
    for read, found in ((from_args, args()), *readers):
        with pytest.raises(
            UserError, match=rf"somewhere: {name} = 7: kdjax's model has no {re.escape(UNSUPPORTED[name])}"
        ):
            read(found | {name: 7}, "somewhere")


def test_features_of_the_other_two() -> None:
    with pytest.raises(UserError, match=r"activation = 'geglu': .*swiglu, fast-swiglu"):
        from_nemo(NEMO | {"activation": "geglu"}, "somewhere")
    with pytest.raises(UserError, match=r"transformer_block_type = 'post_ln'"):
        from_nemo(NEMO | {"transformer_block_type": "post_ln"}, "somewhere")
    with pytest.raises(UserError, match=r"no such gated activation; it has silu"):
        from_provider(PROVIDER | {"gated_linear_unit": True}, "run_config.yaml", "somewhere")
    with pytest.raises(UserError, match=r"num_moe_experts = 8"):
        from_provider(PROVIDER | {"num_moe_experts": 8}, "run_config.yaml", "somewhere")
    with pytest.raises(UserError, match=r"apply_embedding_scaling = True: kdjax's model has no scaled embeddings"):
        from_nemo(NEMO | {"apply_embedding_scaling": True}, "somewhere")


@pytest.mark.parametrize(
    "target",
    [
        "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider2B",
        "megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider9B",
        "nemo.collections.llm.gpt.model.gemma.GemmaConfig7B",
    ],
)
def test_gemma_scales_its_embeddings_in_code(target: str) -> None:
    """Nothing but the class's name says so; the other providers of that kind are read."""
    with pytest.raises(UserError, match=rf"somewhere: _target_ = '{target}': .* no scaled embeddings, as Gemma's"):
        from_provider(PROVIDER | {"_target_": target}, "run_config.yaml", "somewhere")
    llama = PROVIDER | {"_target_": "megatron.bridge.models.llama.llama_provider.Llama3ModelProvider8B"}
    assert from_provider(llama, "run_config.yaml", "somewhere")["layers"].value == PROVIDER["num_layers"]
