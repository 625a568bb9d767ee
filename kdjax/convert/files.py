"""The files of a checkpoint, in a directory or inside an uncompressed tar (`.nemo`), which is read in place."""

import dataclasses
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdjax.types import UserError


@dataclasses.dataclass(frozen=True)
class Region:
    """Some consecutive bytes of a file."""

    path: Path
    offset: int
    size: int
    label: str  # for messages: the file's name, with the tar's before it

    def open(self) -> "Window":
        """The bytes as a binary file."""
        return Window(self)

    def read(self) -> bytes:
        """All of the bytes."""
        with self.open() as window:
            return window.read()

    def part(self, offset: int, size: int) -> "Region":
        """`size` bytes at `offset`. Raises UserError when the region ends before them."""
        if offset + size > self.size:
            raise UserError(
                f"{self.label} has {self.size} bytes and should hold an entry up to byte {offset + size}: "
                "the file was cut off; copy it again"
            )
        return Region(self.path, self.offset + offset, size, self.label)


class Window(io.RawIOBase):
    """A region as a seekable file of its own, for `zipfile` and `pickle`."""

    def __init__(self, region: Region):
        self._file, self._region, self._at = region.path.open("rb"), region, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._region.size}[whence]
        if base + offset < 0:
            raise OSError(f"{self._region.label}: seek before the start")  # as a file does; zipfile relies on it
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._region.size - self._at))
        self._file.seek(self._region.offset + self._at)
        count = self._file.readinto(view[:count])
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


Files = Mapping[str, Region]  # by path relative to the checkpoint, with "/"


def files_of(path: Path) -> Files:
    """The files below a directory, or in a tar. Raises UserError for anything else."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        return {str(file.relative_to(path)): Region(file, 0, file.stat().st_size, str(file)) for file in found}
    if not path.exists():
        raise UserError(f"{path}: there is no such file or directory")
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in tar if member.isfile()]
    except tarfile.TarError as error:
        raise UserError(
            f"{path}: not an uncompressed tar archive ({error}). A .nemo file that was compressed has to be "
            f"unpacked first (mkdir DIR && tar xf {path.name} -C DIR), then convert DIR"
        ) from error
    size = path.stat().st_size
    for member in members:
        if member.offset_data + member.size > size:
            raise UserError(f"{path} ends in the middle of {member.name}: the file was cut off; copy it again")
    return {
        member.name.removeprefix("./"): Region(path, member.offset_data, member.size, f"{path}:{member.name}")
        for member in members
    }


def below(files: Files, directory: str) -> Files:
    """The files below a directory, by their paths relative to it; "" is the top."""
    prefix = f"{directory}/" if directory else ""
    return {name.removeprefix(prefix): region for name, region in files.items() if name.startswith(prefix)}
