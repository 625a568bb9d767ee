"""A teacher of a few thousand parameters with a real tokenizer and texts, and the cache command in this process."""

import dataclasses
import json
from pathlib import Path
from pydoc_data.topics import topics

import tokenizers

from kdjax.cache.__main__ import main
from kdjax.checkpoint.model_directory import save_model
from kdjax.config import ModelConfig
from kdjax.config.validate import resolve_model
from kdjax.data.shards.reader import Cache
from kdjax.data.shards.shard import file_sha256
from kdjax.model import init_params

VOCAB = 300
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def text(characters: int, start: int = 0) -> str:
    """English prose that every Python installation has."""
    return "\n".join(topics[name] for name in sorted(topics))[start : start + characters]


def make_teacher(directory: Path) -> Path:
    """A model directory with a byte-level BPE tokenizer. Its logits are far from uniform."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB - 1,
        special_tokens=["<end>", "<assistant>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text(20000)], trainer)
    (directory / "tokenizer").mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer" / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "eos_token": "<end>"}
    (directory / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    config = ModelConfig(
        layers=2, d_model=16, n_heads=4, n_groups=2, d_ff=32, vocab_size=VOCAB, tied=False, init_std=0.4,
        scaled_init=False, dtype="float32", padded_vocab_size=304,
        tokenizer_sha256=file_sha256(directory / "tokenizer" / "tokenizer.json"),
    )  # fmt: skip
    config = resolve_model(config)
    save_model(directory, config, init_params(dataclasses.replace(config), 3))
    return directory


def build(teacher: Path, out: Path, *texts: Path, **options: object) -> Cache:
    """The cache that `kdjax cache build` makes; an option of True is a flag."""
    options = {"dtype": "float32", "sequence_length": 32, "shard_tokens": 256, "top_k": 8} | options
    words = ["build", "--teacher", str(teacher), "--text", *map(str, texts), str(out)]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
    assert main(words) == 0
    return Cache(out)
