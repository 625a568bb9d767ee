"""Files of `torch.save`, read and written without torch: a zip whose `data.pkl` describes tensors over storages."""

import struct
import zipfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from kdjax.convert.files import Region
from kdjax.convert.pytorch.pickle_writer import Call, Global, Persistent, dumps
from kdjax.convert.pytorch.unpickle import STORAGES, dtype_of, unpickle
from kdjax.convert.tensors import StoredTensor, in_file
from kdjax.types import UserError

LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE.TXT 4.3.7, of the zip format


def load(region: Region) -> Any:
    """The saved object, its tensors as unread `StoredTensor`s. Raises UserError for a damaged or foreign file."""
    try:
        with region.open() as window, zipfile.ZipFile(window) as archive:
            entries = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
            order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
            pickled = archive.read(entries["data.pkl"])
            offsets = {name: _data_offset(window, info) for name, info in entries.items() if name.startswith("data/")}
    except (zipfile.BadZipFile, KeyError, struct.error, EOFError) as error:
        raise UserError(_damaged(region, error)) from error
    if order != b"little":
        raise UserError(f"{region.label}: written on a big-endian machine, which cannot be read")

    def storage(reference: Any) -> tuple[str, str]:
        kind, dtype, key, *_ = reference
        assert kind == "storage", reference
        return dtype, f"data/{key}"

    def tensor(
        stored: tuple[str, str],
        first: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool = False,
        hooks: Any = None,
        dtype: str | None = None,  # of _rebuild_tensor_v3, whose storages are bytes
        metadata: Any = None,
    ) -> StoredTensor:
        storage_dtype, entry = stored
        if entry not in entries:
            raise UserError(f"{region.label}: the storage {entry} is missing; copy the file again")
        chosen = dtype_of(dtype or storage_dtype, region.label)
        return _tensor(region, offsets[entry], entries[entry], chosen, first, size, stride)

    return unpickle(pickled, region.label, tensor, storage)


def _tensor(
    region: Region,
    offset: int,
    info: zipfile.ZipInfo,
    dtype: np.dtype,
    first: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
) -> StoredTensor:
    items = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if 0 not in size else 0
    if (first + items) * dtype.itemsize > info.file_size:
        raise UserError(f"{region.label}: a tensor {size} reaches beyond its storage {info.filename}; copy it again")
    at = region.offset + offset + first * dtype.itemsize
    return in_file(region.path, at, size, dtype, strides=stride, where=region.label)


def _data_offset(window: Any, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: its local header has a length of its own."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{info.filename} is compressed")
    window.seek(info.header_offset)
    *_, name_length, extra_length = LOCAL_HEADER.unpack(window.read(LOCAL_HEADER.size))
    return info.header_offset + LOCAL_HEADER.size + name_length + extra_length


def _damaged(region: Region, error: Exception) -> str:
    with region.open() as window:
        head = window.read(16)
    if head[:2] == b"\x80\x02":
        return (
            f"{region.label}: written by torch before 1.6, not as a zip; load and save it once with a newer torch "
            "(torch.save(torch.load(FILE, weights_only=True), FILE))"
        )
    return (
        f"{region.label} is no complete torch.save file ({error}); "
        f"it has {region.size} bytes: perhaps it was cut off, so copy it again"
    )


# NumPy dtype -> torch's name of such a storage; an untyped one has bytes, as ByteStorage has.
STORAGE_NAMES = {dtype_of(dtype, name): name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


def save(file: BinaryIO, thing: Any) -> int:
    """Writes what torch.save would of `thing`, its arrays as tensors, from here on in `file`; the count of bytes."""
    storages: list[np.ndarray] = []

    def tensor(array: np.ndarray) -> Call:
        storages.append(array)
        strides = tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim))
        return tensor_over(array, len(storages) - 1, 0, array.shape, strides)

    pickled = dumps(thing, tensor)  # it fills `storages`
    return write(file, pickled, storages)


def tensor_over(storage: np.ndarray, number: int, first: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Call:
    """A tensor, as a pickle describes it, over part of the file's storage of this number; counts are of items."""
    kind = Global("torch", STORAGE_NAMES[storage.dtype])
    reference = Persistent(("storage", kind, str(number), "cpu", storage.size))
    no_hooks = Call(Global("collections", "OrderedDict"), ())
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, (reference, first, shape, strides, False, no_hooks))


def write(file: BinaryIO, pickled: bytes, storages: Sequence[np.ndarray]) -> int:
    """Writes the zip; the same bytes for the same content, whenever. Returns their count."""
    counted = _Counted(file)
    with zipfile.ZipFile(counted, "w") as archive:  # type: ignore[call-overload]
        for name, content in (
            ("data.pkl", pickled),
            ("byteorder", b"little"),
            *((f"data/{number}", _bytes(storage)) for number, storage in enumerate(storages)),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)  # uncompressed, dated 1980
    return counted.tell()


def _bytes(array: np.ndarray) -> memoryview:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


class _Counted:
    """A file that starts here and cannot be sought in, so that a zip's offsets count from its own first byte."""

    def __init__(self, file: BinaryIO):
        self._file, self._written = file, 0

    def write(self, data: bytes | memoryview) -> int:
        self._file.write(data)
        self._written += len(data)
        return len(data)

    def tell(self) -> int:
        return self._written

    def flush(self) -> None:
        self._file.flush()
