"""Writing pickles that name functions and classes which need not exist here, such as torch's.

Protocol 2, which torch's own files are in, of the few opcodes that its restricted unpickler (`weights_only`) knows too.
"""

import dataclasses
import pickle
import struct
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Global:
    """A name that is imported when the pickle is read."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Call:
    """What calling a name gives."""

    function: Global
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)  # so that it can be a dict's key, whatever its attributes
class Record:
    """An object of a class with these attributes, or with the state that its `__setstate__` takes."""

    kind: Global
    state: Any


@dataclasses.dataclass(frozen=True)
class Persistent:
    """A reference that the reader of the pickle resolves."""

    reference: tuple[Any, ...]


def dumps(thing: Any, default: Callable[[Any], Any] | None = None) -> bytes:
    """The pickle of a thing made of these records, containers, text and numbers; `default` turns others into such."""
    return b"".join((pickle.PROTO + b"\x02", *_opcodes(thing, default), pickle.STOP))


def _opcodes(thing: Any, default: Callable[[Any], Any] | None) -> Iterator[bytes]:
    def each(*things: Any) -> Iterator[bytes]:
        for one in things:
            yield from _opcodes(one, default)

    match thing:
        case None:
            yield pickle.NONE
        case bool():
            yield pickle.NEWTRUE if thing else pickle.NEWFALSE
        case int():
            yield _integer(thing)
        case float():
            yield pickle.BINFLOAT + struct.pack(">d", thing)
        case str():
            text = thing.encode()
            yield pickle.BINUNICODE + struct.pack("<I", len(text)) + text
        case tuple():
            yield from (pickle.MARK, *each(*thing), pickle.TUPLE)
        case list():
            yield from (pickle.EMPTY_LIST, pickle.MARK, *each(*thing), pickle.APPENDS)
        case dict():
            items = (part for item in thing.items() for part in item)
            yield from (pickle.EMPTY_DICT, pickle.MARK, *each(*items), pickle.SETITEMS)
        case Global(module, name):
            yield pickle.GLOBAL + f"{module}\n{name}\n".encode()
        case Call(function, arguments):
            yield from (*each(function, arguments), pickle.REDUCE)
        case Record(kind, state):
            yield from (*each(kind), pickle.EMPTY_TUPLE, pickle.NEWOBJ, *each(state), pickle.BUILD)
        case Persistent(reference):
            yield from (*each(reference), pickle.BINPERSID)
        case _:
            if default is None:
                raise TypeError(f"{type(thing).__name__} {thing!r:.80} cannot be pickled here")
            yield from each(default(thing))


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded
