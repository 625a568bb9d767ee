"""Reads tf.train.Example messages without TensorFlow: the part of protobuf's wire format that they use.

    Example {1: Features}   Features {1: entry}*   entry {1: key, 2: Feature}   Feature {1: bytes, 2: floats, 3: int64s}
    lists {1: item}*, floats and integers packed or one by one

(tensorflow/core/example/feature.proto and https://protobuf.dev/programming-guides/encoding.)
"""

from collections.abc import Iterator

import numpy as np

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types


class NotAnExampleError(ValueError):
    """The bytes are not a tf.train.Example."""


def parse_example(data: bytes) -> dict[str, np.ndarray]:
    """Returns the numeric features by name, int64 or float32. Others are left out. Raises NotAnExampleError."""
    features = {}
    for field, body in _messages(memoryview(data)):
        if field != 1:
            raise NotAnExampleError(f"field {field} at the top level")
        for _, entry in _messages(body):
            parts = dict(_messages(entry))
            if 1 not in parts:
                raise NotAnExampleError("a feature without a name")
            try:
                name = bytes(parts[1]).decode()
            except UnicodeDecodeError as error:
                raise NotAnExampleError("a feature's name is not text") from error
            for kind, items in _messages(parts.get(2, memoryview(b""))):
                if kind == 2:
                    features[name] = _floats(items)
                elif kind == 3:
                    features[name] = _integers(items)
    return features


def _messages(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields (number, content) of the length-delimited fields; these messages have no others."""
    for field, wire, body in _fields(data):
        if wire != BYTES:
            raise NotAnExampleError(f"field {field} has wire type {wire}")
        yield field, body


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        if wire == BYTES:
            size, start = _varint(data, at)
        elif wire in (FIXED32, FIXED64):
            size, start = (4 if wire == FIXED32 else 8), at
        elif wire == VARINT:
            _, end = _varint(data, at)
            size, start = end - at, at
        else:
            raise NotAnExampleError(f"wire type {wire}")
        if not field or start + size > len(data):
            raise NotAnExampleError("a field reaches beyond the end")
        yield field, wire, data[start : start + size]
        at = start + size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Returns the number at a place, and where it ends."""
    value = 0
    for place, octet in enumerate(data[at : at + 10]):
        value |= (octet & 0x7F) << 7 * place
        if octet < 0x80:
            return value, at + place + 1
    raise NotAnExampleError("a number without an end")


def _floats(items: memoryview) -> np.ndarray:
    body = b"".join(part for _, _, part in _fields(items))  # packed or not, four bytes each
    if len(body) % 4:
        raise NotAnExampleError("floats that are not four bytes each")
    return np.frombuffer(body, "<f4")


def _integers(items: memoryview) -> np.ndarray:
    body = np.frombuffer(b"".join(part for _, _, part in _fields(items)), np.uint8)
    ends = np.flatnonzero(body < 0x80)
    if not len(body):
        return np.zeros(0, np.int64)
    if not len(ends) or ends[-1] != len(body) - 1:
        raise NotAnExampleError("an integer without an end")
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(body)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 9:
        raise NotAnExampleError("an integer of more than ten bytes")
    parts = (body & np.uint8(0x7F)).astype(np.uint64) << (7 * places).astype(np.uint64)
    return np.bitwise_or.reduceat(parts, starts).view(np.int64)
