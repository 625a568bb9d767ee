"""The files of a checkpoint, in a directory or inside an uncompressed tar archive (`.nemo`), which is read in place."""

import dataclasses
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdjax.types import UserError


@dataclasses.dataclass(frozen=True)
class ByteRange:
    """Consecutive bytes of a file: all of it, or a member of an archive."""

    path: Path
    offset: int
    size: int
    label: str  # for error messages: the file's path, followed by the member's name in an archive

    def open(self) -> "ByteRangeFile":
        """Returns the bytes as a binary file."""
        return ByteRangeFile(self)

    def read(self) -> bytes:
        """Returns all of the bytes."""
        with self.open() as file:
            return file.read()

    def part(self, offset: int, size: int) -> "ByteRange":
        """Returns `size` bytes at `offset`. Raises UserError when they are not all inside the range."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise UserError(
                f"{self.label} has {self.size} bytes and should hold an entry of {size} bytes at byte {offset}: "
                "the file is truncated or damaged; copy it again"
            )
        return ByteRange(self.path, self.offset + offset, size, self.label)


class ByteRangeFile(io.RawIOBase):
    """A byte range as a seekable file of its own, for `zipfile` and `pickle`."""

    def __init__(self, source: ByteRange):
        self._file, self._source, self._position = source.path.open("rb"), source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}[whence]
        if base + offset < 0:
            raise OSError(f"{self._source.label}: seek before the start")  # as for any file; zipfile relies on it
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._source.size - self._position))
        self._file.seek(self._source.offset + self._position)
        count = self._file.readinto(view[:count])
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


Files = Mapping[str, ByteRange]  # by path relative to the checkpoint, with "/"


def list_files(path: Path) -> Files:
    """Returns the files below a directory, or those in a tar archive. Raises UserError for anything else."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(path)): ByteRange(file, 0, file.stat().st_size, str(file)) for file in found}
    if not path.exists():
        raise UserError(f"{path}: there is no such file or directory")
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is not a complete, uncompressed tar archive ({error}). If it is truncated, copy it again; if it "
            f"is a compressed .nemo file, unpack it (mkdir DIR && tar xf {path.name} -C DIR) and convert DIR"
        ) from error
    return {
        member.name.removeprefix("./"): ByteRange(path, member.offset_data, member.size, f"{path}:{member.name}")
        for member in members
    }


def subdirectory(files: Files, directory: str) -> Files:
    """Returns the files below a directory by their paths relative to it; "" stands for all files."""
    prefix = f"{directory}/" if directory else ""
    return {name.removeprefix(prefix): source for name, source in files.items() if name.startswith(prefix)}
