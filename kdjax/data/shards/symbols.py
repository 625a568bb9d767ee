"""Arrays of unsigned integers as compressed bytes: a symbol for each number, and the bits that the symbol leaves open.

A symbol is a byte and stands for a range of 2^b numbers; b bits say which number it is. All symbols of an array form
one zstd frame, whose entropy coder adapts to them; the bits, which are nearly random, follow each other as they are.
"""

from typing import NamedTuple

import numpy as np
import zstandard
from jaxtyping import Int, UInt

LEVEL = 9  # of zstd; higher ones gain less than 2%


class DamagedError(ValueError):
    """Stored bytes are not what their writer wrote."""


class Packed(NamedTuple):
    """An array as it is stored."""

    symbols: bytes  # a zstd frame of one byte a number
    bits: bytes  # of all numbers, least significant bit first; the last byte is filled up with zeros


class Alphabet(NamedTuple):
    """Symbol i stands for the numbers first[i] .. first[i] + 2^bits[i] - 1; first is ascending."""

    first: Int[np.ndarray, "n"]
    bits: Int[np.ndarray, "n"]

    def pack(self, numbers: UInt[np.ndarray, "..."]) -> Packed:
        """Returns an array, flattened in C order, as it is stored."""
        flat = numbers.reshape(-1).astype(np.int64)
        symbols = np.searchsorted(self.first, flat, side="right") - 1
        rest, bits = flat - self.first[symbols], self.bits[symbols]
        places = np.arange(bits.max(initial=0))
        open_bits = (rest[:, None] >> places & 1)[places < bits[:, None]]
        compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=False, write_checksum=False)
        frame = compressor.compress(symbols.astype(np.uint8).tobytes())
        return Packed(frame, np.packbits(open_bits.astype(np.uint8), bitorder="little").tobytes())

    def unpack(self, packed: Packed, count: int) -> UInt[np.ndarray, "n"]:
        """Returns the `count` numbers that were packed, uint32. Raises DamagedError if they are not `count`."""
        frame, stored_bits = packed
        try:
            # The limit keeps a hostile frame from filling the memory.
            octets = zstandard.ZstdDecompressor().decompress(frame, max_output_size=max(count, 1))
        except zstandard.ZstdError as error:
            raise DamagedError(str(error)) from error
        symbols = np.frombuffer(octets, np.uint8)
        if len(symbols) != count or symbols.max(initial=0) >= len(self.first):
            raise DamagedError(f"{len(symbols)} numbers, where {count} belong")
        bits = self.bits[symbols]
        total = int(bits.sum())
        if len(stored_bits) != -(-total // 8):
            raise DamagedError(f"{len(stored_bits)} bytes of bits, where {-(-total // 8)} belong")
        places = np.arange(bits.max(initial=0))
        open_bits = np.zeros((count, len(places)), np.int64)
        open_bits[places < bits[:, None]] = np.unpackbits(
            np.frombuffer(stored_bits, np.uint8), count=total, bitorder="little"
        )
        return (self.first[symbols] + open_bits @ (1 << places)).astype(np.uint32)


def _floating() -> Alphabet:
    """Returns the alphabet of all 32-bit numbers: those below 8, then 8 equal ranges up to each power of 2."""
    bits = np.concatenate([np.zeros(8, np.int64), np.repeat(np.arange(29), 8)])
    return Alphabet(np.concatenate([[0], np.cumsum(1 << bits)[:-1]]), bits)


NUMBERS = _floating()
