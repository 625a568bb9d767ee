"""Brings the parameter names of all Megatron and NeMo releases to the canonical ones, Megatron-Core's with TE layers.

Transformer Engine (TE) layers keep a norm inside the linear map that follows it. `torch_dist` checkpoints always have
such names; here each layer's number is written out.
"""

import re
from collections.abc import Iterable, Mapping

from kdjax.convert.tensors import LazyTensor, concatenate
from kdjax.types import UserError

WRAPPERS = re.compile(r"^((module|model)\.)+")
# Applied in this order. Core with local layers names the norms on their own. The language model from before Core
# (megatron.legacy, NeMo) has other names, which changed between releases.
RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^language_model\.", ""),
        (r"^(encoder|transformer)\.", "decoder."),
        (r"^(decoder\.layers\.\d+)\.attention\.", r"\1.self_attention."),
        (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
        (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
        (r"\.mlp\.dense_h_to_4h(_2)?\.", r".mlp.linear_fc1\1."),
        (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
        (r"^(decoder(?:\.layers(?:\.\d+)?)?)\.input_(?:layer)?norm\.", r"\1.self_attention.linear_qkv.layer_norm_"),
        (
            r"^(decoder\.layers(?:\.\d+)?)\.(?:pre_mlp_layernorm|post_attention_(?:layer)?norm)\.",
            r"\1.mlp.linear_fc1.layer_norm_",
        ),
        (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
        (r"^word_embeddings(_for_head)?\.weight$", "output_layer.weight"),  # the last stage's copy of a tied embedding
    )
)
# The up projection where it is stored apart from the gate: NeMo's second matrix, Megatron's singleton_local_shards.
SEPARATE_UP = re.compile(r"^(.*\.mlp\.linear_fc1)(_2\.(?:weight|bias)|\.(?:weight|bias)_v)$")


def canonical_name(name: str) -> str:
    """Returns the canonical name, without the prefixes of wrapping modules. Unknown names stay as they are."""
    name = WRAPPERS.sub("", name)
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def by_name(tensors: Iterable[tuple[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """Returns the tensors as a dict. Raises UserError when two stored names have the same canonical name."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors:
        if name in found:
            raise UserError(f"{tensor.label}: {tensor.name} and {found[name].name} both mean {name}; remove one")
        found[name] = tensor
    return found


def merge_gate_and_up(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Returns the tensors with gate and up projections that are stored apart joined to one `linear_fc1` [gate; up].

    One without the other stays as it is: no rule uses it, and the error names it.
    """
    joined = dict(tensors)
    for name in tensors:
        match = SEPARATE_UP.match(name)
        if match is None:
            continue
        kind = "bias" if "bias" in match[2] else "weight"
        gate = f"{match[1]}.{kind}" + ("_w" if match[2].endswith("_v") else "")
        if gate in joined:
            joined[f"{match[1]}.{kind}"] = concatenate([joined.pop(gate), joined.pop(name)], axis=0)
    return joined
