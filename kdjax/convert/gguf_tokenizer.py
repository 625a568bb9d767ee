"""A GGUF file's tokenizer as the files that Hugging Face's `tokenizers` reads.

Only byte-level BPE (GPT-2's kind) whose splitting into words is known by name; others are left out.
"""

import json
from collections.abc import Mapping
from typing import Any

CONTROL, USER_DEFINED = 3, 4  # kinds of tokens that are never split
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
# llama.cpp's name of how text is split into words before BPE -> Hugging Face's.
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTE_LEVEL]},
}


def tokenizer_files(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns tokenizer.json and tokenizer_config.json, or nothing if the tokenizer is of another kind.

    `fields` are the file's metadata, its arrays as lists.
    """
    if fields.get("tokenizer.ggml.model") != "gpt2" or fields.get("tokenizer.ggml.pre") not in PRE_TOKENIZERS:
        return {}
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    special = [i for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags, "special": kinds[i] == CONTROL} for i in special],
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[fields["tokenizer.ggml.pre"]],
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": fields["tokenizer.ggml.merges"],
        },
    }
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    settings = {
        f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for key, name in names.items()
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    return {
        "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False).encode(),
    }
