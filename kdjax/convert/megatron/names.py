"""The dialects of Megatron's parameter names, brought to one: see `kdjax.convert.megatron.rules`."""

import re
from collections.abc import Iterable, Mapping

from kdjax.convert.tensors import StoredTensor, concatenated
from kdjax.types import UserError

WRAPPERS = re.compile(r"^((module|model)\.)+")
# In this order, each at most once. Core with local layers keeps the norms apart; the language model from before Core
# (Megatron's gpt2_legacy and NeMo's) has names of its own, which changed between releases.
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
# The gate and the up map stored apart: NeMo's two matrices, Megatron's singleton_local_shards.
SPLIT = re.compile(r"^(.*\.mlp\.linear_fc1)(_2\.(?:weight|bias)|\.(?:weight|bias)_v)$")


def canonical(name: str) -> str:
    """The name without wrappers' prefixes and in the one dialect; unknown names stay as they are."""
    name = WRAPPERS.sub("", name)
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def by_name(tensors: Iterable[tuple[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """A dict; raises UserError where two stored names come to the same one."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors:
        if name in found:
            raise UserError(f"{tensor.where}: {tensor.name} and {found[name].name} both mean {name}")
        found[name] = tensor
    return found


def join_split_maps(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Gate and up maps that are stored apart, joined to one `linear_fc1` [gate; up]. A half alone stays, to be told."""
    joined = dict(tensors)
    for name in tensors:
        match = SPLIT.match(name)
        if match is None:
            continue
        kind = "bias" if "bias" in match[2] else "weight"
        gate = f"{match[1]}.{kind}" + ("_w" if match[2].endswith("_v") else "")
        if gate in joined:
            joined[f"{match[1]}.{kind}"] = concatenated([joined.pop(gate), joined.pop(name)], axis=0)
    return joined
