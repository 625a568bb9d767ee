"""Writes pickles that name classes and functions which need not exist here, such as torch's.

Protocol 2, as in torch's own files, with only those opcodes that torch's restricted unpickler (`weights_only`) accepts.
"""

import dataclasses
import pickle
import struct
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Global:
    """A class or function that the reader imports."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Construct:
    """The result of calling a class or function."""

    function: Global
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, so that it can be a dict's key
class Instance:
    """An instance of a class with these attributes, or with the state that its `__setstate__` takes."""

    kind: Global
    state: Any


@dataclasses.dataclass(frozen=True)
class Persistent:
    """A reference that the reader resolves outside the pickle."""

    reference: tuple[Any, ...]


def dumps(content: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """Returns the pickle of containers, text, numbers and the classes above; `default` converts anything else to these.

    Raises TypeError for other objects when there is no `default`.
    """
    return b"".join((pickle.PROTO + b"\x02", *_opcodes(content, default), pickle.STOP))


def _opcodes(content: Any, default: Callable[[Any], Any] | None) -> Iterator[bytes]:
    def each(*parts: Any) -> Iterator[bytes]:
        for part in parts:
            yield from _opcodes(part, default)

    match content:
        case None:
            yield pickle.NONE
        case bool():
            yield pickle.NEWTRUE if content else pickle.NEWFALSE
        case int():
            yield _integer(content)
        case float():
            yield pickle.BINFLOAT + struct.pack(">d", content)
        case str():
            text = content.encode()
            yield pickle.BINUNICODE + struct.pack("<I", len(text)) + text
        case tuple():
            yield from (pickle.MARK, *each(*content), pickle.TUPLE)
        case list():
            yield from (pickle.EMPTY_LIST, pickle.MARK, *each(*content), pickle.APPENDS)
        case dict():
            items = (part for item in content.items() for part in item)
            yield from (pickle.EMPTY_DICT, pickle.MARK, *each(*items), pickle.SETITEMS)
        case Global(module, name):
            yield pickle.GLOBAL + f"{module}\n{name}\n".encode()
        case Construct(function, arguments):
            yield from (*each(function, arguments), pickle.REDUCE)
        case Instance(kind, state):
            yield from (*each(kind), pickle.EMPTY_TUPLE, pickle.NEWOBJ, *each(state), pickle.BUILD)
        case Persistent(reference):
            yield from (*each(reference), pickle.BINPERSID)
        case _:
            if default is None:
                raise TypeError(f"{type(content).__name__} {content!r:.80} cannot be pickled here")
            yield from each(default(content))


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded
