"""`torch.save` files, read and written without torch: zip archives whose `data.pkl` describes tensors over storages."""

import struct
import zipfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from kdjax.convert.checkpoint_files import ByteRange
from kdjax.convert.pytorch.pickle_reader import STORAGES, numpy_dtype, unpickle
from kdjax.convert.pytorch.pickle_writer import Construct, Global, Persistent, dumps
from kdjax.convert.tensors import LazyTensor, span, tensor_in_file
from kdjax.types import UserError

LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip entry: APPNOTE.TXT 4.3.7


def load(source: ByteRange) -> Any:
    """Returns the saved object with its tensors unread. Raises UserError for a damaged or foreign file."""
    try:
        with source.open() as file, zipfile.ZipFile(file) as archive:
            entries = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
            order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
            pickled = archive.read(entries["data.pkl"])
            storages = {
                name: source.part(_data_offset(file, info), info.file_size)
                for name, info in entries.items()
                if name.startswith("data/")
            }
    except (zipfile.BadZipFile, KeyError, struct.error, EOFError) as error:
        raise UserError(_describe_damage(source, error)) from error
    if order != b"little":
        raise UserError(f"{source.label}: written on a big-endian machine, which cannot be read")

    def resolve_storage(reference: Any) -> tuple[str, str]:
        kind, dtype, key, *_ = reference
        assert kind == "storage", reference
        return dtype, f"data/{key}"

    def rebuild_tensor(
        storage: tuple[str, str],
        first: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        requires_grad: bool = False,
        hooks: Any = None,
        dtype: str | None = None,  # given by _rebuild_tensor_v3, whose storages are bytes
        metadata: Any = None,
    ) -> LazyTensor:
        storage_dtype, entry = storage
        if entry not in storages:
            raise UserError(f"{source.label}: the storage {entry} is missing; copy the file again")
        return _view(storages[entry], entry, numpy_dtype(dtype or storage_dtype, source.label), first, shape, strides)

    return unpickle(pickled, source.label, rebuild_tensor, resolve_storage)


def _view(
    storage: ByteRange, entry: str, dtype: np.dtype, first: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> LazyTensor:
    """Returns the tensor over part of a storage, counted in items. Raises UserError when it reaches outside of it."""
    view = f"{storage.label}: a tensor of shape {shape} with strides {strides} at item {first} of the storage {entry}"
    numbers = (first, *shape, *strides)
    if len(shape) != len(strides) or any(type(number) is not int or number < 0 for number in numbers):
        raise UserError(f"{view}: these must be whole numbers from 0, one stride for each axis; do not trust this file")
    if (first + span(shape, strides)) * dtype.itemsize > storage.size:
        raise UserError(f"{view} reaches beyond its {storage.size} bytes; copy the file again")
    start = storage.offset + first * dtype.itemsize
    return tensor_in_file(storage.path, start, shape, dtype, strides=strides, label=storage.label)


def _data_offset(file: Any, info: zipfile.ZipInfo) -> int:
    """Returns where an entry's bytes begin: its local header has a length of its own."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{info.filename} is compressed")
    file.seek(info.header_offset)
    *_, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    return info.header_offset + LOCAL_HEADER.size + name_length + extra_length


def _describe_damage(source: ByteRange, error: Exception) -> str:
    with source.open() as file:
        head = file.read(16)
    if head[:2] == b"\x80\x02":
        return (
            f"{source.label}: written by torch before 1.6, not as a zip archive; load and save it once with a newer "
            "torch (torch.save(torch.load(FILE, weights_only=True), FILE))"
        )
    return (
        f"{source.label} is not a complete torch.save file ({error}); "
        f"it has {source.size} bytes and may be truncated: copy it again"
    )


# NumPy dtype -> torch's name of its storage. An untyped storage holds bytes, as ByteStorage does.
STORAGE_NAMES = {numpy_dtype(dtype, name): name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


def save(file: BinaryIO, content: Any) -> int:
    """Writes what torch.save would write at the file's position, arrays as tensors. Returns the number of bytes."""
    storages: list[np.ndarray] = []

    def describe(array: np.ndarray) -> Construct:
        storages.append(array)
        strides = tuple(int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim))
        return describe_tensor(array, len(storages) - 1, 0, array.shape, strides)

    pickled = dumps(content, describe)  # fills `storages`
    return write_archive(file, pickled, storages)


def describe_tensor(
    storage: np.ndarray, number: int, first: int, shape: tuple[int, ...], strides: tuple[int, ...]
) -> Construct:
    """Returns how a pickle describes a tensor over part of the archive's storage `number`, counted in items."""
    kind = Global("torch", STORAGE_NAMES[storage.dtype])
    reference = Persistent(("storage", kind, str(number), "cpu", storage.size))
    no_hooks = Construct(Global("collections", "OrderedDict"), ())
    rebuild = Global("torch._utils", "_rebuild_tensor_v2")
    return Construct(rebuild, (reference, first, shape, strides, False, no_hooks))


def write_archive(file: BinaryIO, pickled: bytes, storages: Sequence[np.ndarray]) -> int:
    """Writes the zip archive, the same bytes for the same content. Returns their number."""
    counted = _CountingFile(file)
    with zipfile.ZipFile(counted, "w") as archive:  # type: ignore[call-overload]
        for name, content in (
            ("data.pkl", pickled),
            ("byteorder", b"little"),
            *((f"data/{number}", _little_endian(storage)) for number, storage in enumerate(storages)),
            ("version", b"3\n"),
        ):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)  # uncompressed, dated 1980
    return counted.tell()


def _little_endian(array: np.ndarray) -> memoryview:
    """Returns the array's bytes."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little.reshape(-1).view(np.uint8).data


class _CountingFile:
    """A file that starts at the current position and cannot seek, so a zip's offsets count from its own first byte."""

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
