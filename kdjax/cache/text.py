"""Reads text and turns it into token sequences, with a mask of what a student learns from.

    .jsonl (also .gz, .zst)  a line is {"messages": [{"role": ..., "content": ...}, ...]}, rendered by the tokenizer's
                             own chat template, masked to what the assistant says; or {"prompt": ..., "response": ...},
                             masked to the response; or {"text": ...}
    anything else            plain text, one document a file

A document longer than a row is cut into rows that follow each other.
"""

import contextlib
import dataclasses
import functools
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard
from jaxtyping import Bool, Int

from kdjax.data.errors import explain_os_errors
from kdjax.data.shards.shard import file_sha256
from kdjax.types import UserError

TOKENIZER_DIRECTORY = "tokenizer"  # in a model directory that was converted from Hugging Face


@dataclasses.dataclass(frozen=True)
class Example:
    """A sequence to put before the teacher: it predicts `ids[1:]`."""

    ids: Int[np.ndarray, "n"]  # int32, one more than positions
    learned: Bool[np.ndarray, "n"]  # whether a student learns to predict this token
    starts: Int[np.ndarray, "n"]  # the byte of the document's text at which each token starts

    def __len__(self) -> int:
        """Returns the number of positions."""
        return max(0, len(self.ids) - 1)

    def rows(self, length: int) -> Iterator["Example"]:
        """Yields pieces of at most `length` positions; each predicts the first token of the next."""
        for start in range(0, len(self), length):
            part = slice(start, start + length + 1)
            yield Example(self.ids[part], self.learned[part], self.starts[part])


class Tokenizer:
    """A Hugging Face tokenizer, read by the `tokenizers` package, and its chat template if it has one."""

    def __init__(self, path: Path):
        """Opens `path`, a tokenizer.json or a directory that holds one."""
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("reading text requires the tokenizers package: pip install 'kdjax[text]'") from error
        self.path = path / "tokenizer.json" if path.is_dir() else path
        if not self.path.is_file():
            raise UserError(
                f"{self.path}: there is no such file; give the tokenizer of the teacher with --tokenizer FILE"
            )
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the package raises plain Exceptions
            raise UserError(f"{self.path} is not a tokenizer that the tokenizers package reads: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.sha256 = file_sha256(self.path)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, special ones included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def encode(self, text: str, special: bool = True) -> Example:
        """Returns a text's tokens, all of them learned; `special` adds the tokens that the tokenizer puts around."""
        return self._example(self._tokenizer.encode(text, add_special_tokens=special), text)

    def _example(self, found: Any, text: str) -> Example:
        ids = np.array(found.ids, np.int32)
        places = _byte_places(text)
        starts = np.array([places[start] for start, _ in found.offsets], np.int64)
        return Example(ids, np.ones(len(ids), bool), starts)

    def encode_parts(self, parts: Sequence[tuple[str, bool]], special: bool = True) -> Example:
        """Returns the tokens of all parts as one text; those with any character of a learned part are learned."""
        text = "".join(part for part, _ in parts)
        found = self._tokenizer.encode(text, add_special_tokens=special)
        is_learned = np.repeat([learned for _, learned in parts], [len(part) for part, _ in parts])
        learned = np.array([is_learned[start:end].any() for start, end in found.offsets], bool)
        return dataclasses.replace(self._example(found, text), learned=learned)

    def render(self, messages: list[dict[str, Any]], where: str) -> list[tuple[str, bool]]:
        """Returns a conversation as parts of a text; the parts that the assistant says are learned."""
        parts, done = list[tuple[str, bool]](), ""
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._apply_template(messages[:i], where, add_generation_prompt=True)
            after = self._apply_template(messages[: i + 1], where, add_generation_prompt=False)
            if not (before.startswith(done) and after.startswith(before)):
                raise UserError(
                    f"{where}: the chat template changes earlier messages when a later one is added, so that the "
                    "assistant's words cannot be told apart; give prompt and response instead of messages"
                )
            parts += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
        if not parts:
            raise UserError(f"{where}: no message with role 'assistant', so there is nothing to learn; leave it out")
        return parts

    def _apply_template(self, messages: list[dict[str, Any]], where: str, add_generation_prompt: bool) -> str:
        template, tokens = self._chat_template
        try:
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **tokens)
        except Exception as error:  # a template may raise anything
            raise UserError(f"{where}: the tokenizer's chat template fails on these messages: {error}") from error

    @functools.cached_property
    def _chat_template(self) -> tuple[Any, dict[str, str]]:
        """The compiled template and the special tokens that it may use."""
        return _read_template(self.path.parent)


def _read_template(directory: Path) -> tuple[Any, dict[str, str]]:
    try:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UserError("chat templates require the jinja2 package: pip install 'kdjax[text]'") from error
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    source = settings.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        source = (directory / "chat_template.jinja").read_text()
    if isinstance(source, list):  # several named templates
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    if not isinstance(source, str):
        raise UserError(
            f"{directory}: neither chat_template.jinja nor a chat_template in tokenizer_config.json, which messages "
            "need; give prompt and response instead of messages"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = raise_exception
    tokens = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        tokens[name] = value or ""
    return environment.from_string(source), tokens


def _byte_places(text: str) -> np.ndarray | range:
    """Returns for each character, and for the end, the byte at which it starts in UTF-8."""
    if text.isascii():
        return range(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes)])


def read_examples(paths: Sequence[Path], tokenizer: Tokenizer) -> Iterator[Example]:
    """Yields the documents of all files in order. Raises UserError for lines that are not what they should be."""
    for path in paths:
        with _open(path) as file:
            if {".jsonl", ".ndjson"} & set(path.suffixes):
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _line_example(line, tokenizer, f"{path}, line {number}")
            else:
                yield tokenizer.encode(file.read())


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    """Yields the text of a file, decompressed; what is wrong with its bytes becomes a UserError."""
    with explain_os_errors(path, "read this text"):
        raw = path.open("rb")
    with raw:
        plain: Any = raw
        if path.suffix == ".gz":
            plain = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            plain = zstandard.ZstdDecompressor().stream_reader(raw)
        try:
            yield io.TextIOWrapper(plain, encoding="utf-8-sig", newline="")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error}); convert it, or name another file") from error
        except (OSError, EOFError, zstandard.ZstdError) as error:
            raise UserError(f"{path}: damaged or cut off ({error}); copy it again") from error


def _line_example(line: str, tokenizer: Tokenizer, where: str) -> Example:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); correct or remove this line") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where}: a {type(fields).__name__}; a line must be a JSON object")
    if "messages" in fields:
        messages = fields["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(f"{where}: messages must be a list of objects with role and content")
        return tokenizer.encode_parts(tokenizer.render(messages, where), special=False)
    if "prompt" in fields and "response" in fields:
        return tokenizer.encode_parts(
            [(_text(fields, "prompt", where), False), (_text(fields, "response", where), True)]
        )
    if "text" in fields:
        return tokenizer.encode(_text(fields, "text", where))
    raise UserError(
        f"{where}: has {', '.join(fields) or 'no fields'}; a line needs messages, or prompt and response, or text"
    )


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(fields[name], str):
        raise UserError(f"{where}: {name} is a {type(fields[name]).__name__}; it must be a string")
    return fields[name]
