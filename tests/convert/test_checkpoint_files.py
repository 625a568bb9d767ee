"""Files of a directory or a tar archive, and byte ranges of them."""

import io
import tarfile
from pathlib import Path

import pytest

from kdjax.convert.checkpoint_files import ByteRange, list_files, subdirectory
from kdjax.types import UserError


@pytest.fixture
def numbers(tmp_path: Path) -> ByteRange:
    """Bytes 10 to 89 of a file that holds 0 to 99."""
    (tmp_path / "a.bin").write_bytes(bytes(range(100)))
    return ByteRange(tmp_path / "a.bin", 10, 80, "a.bin")


def test_a_part_of_a_range(numbers: ByteRange) -> None:
    assert numbers.read() == bytes(range(10, 90))
    assert numbers.part(60, 20).read() == bytes(range(70, 90))
    assert numbers.part(60, 20).part(1, 2).read() == bytes([71, 72])
    assert numbers.part(80, 0).read() == b""


@pytest.mark.parametrize(("offset", "size"), [(60, 21), (-1, 5), (5, -1), (81, 0)])
def test_a_part_outside_its_range(numbers: ByteRange, offset: int, size: int) -> None:
    message = rf"a.bin has 80 bytes and should hold an entry of {size} bytes at byte {offset}: .*copy it again"
    with pytest.raises(UserError, match=message):
        numbers.part(offset, size)


def test_a_range_is_a_seekable_file(numbers: ByteRange) -> None:
    with numbers.open() as file:
        assert file.readable()
        assert file.seekable()
        assert file.seek(-3, io.SEEK_END) == 77
        assert file.read(9) == bytes([87, 88, 89])
        assert file.read() == b""
        assert file.seek(5) == 5
        assert file.seek(2, io.SEEK_CUR) == 7
        assert file.read(1) == bytes([17])
        assert file.seek(0) == 0
        with pytest.raises(OSError, match=r"a.bin: seek before the start"):
            file.seek(-1)
        assert file.seek(90) == 90
        assert file.read(1) == b""


def test_files_of_a_directory_and_of_an_archive(tmp_path: Path) -> None:
    (tmp_path / "top" / "b").mkdir(parents=True)
    (tmp_path / "top" / "b" / "c.txt").write_bytes(b"see")
    (tmp_path / "top" / "a.txt").write_bytes(b"a")
    with tarfile.open(tmp_path / "x.nemo", "w") as tar:
        tar.add(tmp_path / "top", ".")
    for path, label in (
        (tmp_path / "top", f"{tmp_path}/top/b/c.txt"),
        (tmp_path / "x.nemo", f"{tmp_path}/x.nemo:./b/c.txt"),
    ):
        files = list_files(path)
        assert sorted(files) == ["a.txt", "b/c.txt"]
        assert (files["b/c.txt"].read(), files["b/c.txt"].label) == (b"see", label)
        assert list(subdirectory(files, "b")) == ["c.txt"]
        assert subdirectory(files, "") == files
        assert subdirectory(files, "a") == {}


def test_an_archive_that_ends_in_the_middle_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(2000))
    with tarfile.open(tmp_path / "x.nemo", "w") as tar:
        tar.add(tmp_path / "big", "big")
    whole = (tmp_path / "x.nemo").read_bytes()
    for size in (100, 512 + 1000, 512 + 1999):  # the header has 512 bytes
        (tmp_path / "x.nemo").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"x.nemo is not a complete, uncompressed tar archive .* copy it again"):
            list_files(tmp_path / "x.nemo")
