"""Megatron-LM's tar files of cached log-probabilities."""

import tarfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from foreign_files import VOCAB, Taught, compress, run_import, sequence, stored, torch_bytes, write_tar

from kdjax.types import UserError

K, S = 5, 13
BIG = 2**16 + 1000  # a vocabulary that needs the 17th bit


def arrays(given: list[Taught], dtype: Any = np.float32, kept: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Values and ids [S, samples, k]. From `kept` on, entries are those that top-p leaves out."""
    tops = [each.top(K) for each in given]
    values = np.stack([values for _, values in tops], axis=1)
    ids = np.stack([ids for ids, _ in tops], axis=1)
    values[..., kept:], ids[..., kept:] = -1e4, -1
    return values.astype(dtype), ids


def payload(microbatches: list[tuple[np.ndarray, np.ndarray]], version: int) -> bytes:
    low = [(ids & 0xFFFF).astype(np.uint16) for _, ids in microbatches]
    high = [(ids >> 16 & 1).astype(bool) for _, ids in microbatches]
    values = [values for values, _ in microbatches]
    if version == 1:
        return compress(torch_bytes({"values": values, "indices_low": low, "bit_17": high}))
    joined = {"values": values, "indices_low": low, "bit_17": high}
    content = {name: np.concatenate(parts, axis=1) for name, parts in joined.items()}
    return compress(torch_bytes(content | {"format_version": 2}))


def write(
    directory: Path,
    version: int = 1,
    ranks: int = 2,
    microbatch: int = 2,
    turns: int = 2,
    iterations: int = 3,
    by_sample: bool = False,
    vocab: int = VOCAB,
    **options: Any,
) -> tuple[list[Taught], Path]:
    """A run's files. Microbatch m of an iteration is dealt to rank m % ranks. Returns the samples in training order."""
    directory.mkdir(exist_ok=True)
    batch = ranks * microbatch * turns
    given = [sequence(seed, S, vocab) for seed in range(batch * iterations)]
    meta: dict[str, Any] = {"hash": "x", "identifiers": {}, "saver": {"k": K, "p": None}}
    if version == 2:
        meta["saver"] |= {"format_version": 2, "mbs_save": microbatch, "dp_size_save": ranks, "gbs_save": batch}
    for rank in range(ranks):
        members = {}
        for iteration in range(iterations):
            parts = []
            for turn in range(turns):
                first = iteration * batch + (turn * ranks + rank) * microbatch
                parts.append(arrays(given[first : first + microbatch], **options))
            name = f"{iteration * batch}-{(iteration + 1) * batch}" if by_sample else f"{iteration}"
            members[f"{name}.pt.zst"] = payload(parts, version)
        prefix = "cp0_" if version == 1 else ""
        write_tar(directory / f"{prefix}dp{rank}__{iterations - 1}.tar", meta, members)
    tokens = directory / "tokens.npy"
    np.save(tokens, np.stack([each.ids for each in given]))
    return given, tokens


@pytest.mark.parametrize("vocab", [VOCAB, BIG])
@pytest.mark.parametrize(("version", "by_sample"), [(1, False), (2, False), (2, True)])
def test_samples_come_in_the_order_of_training(tmp_path: Path, version: int, by_sample: bool, vocab: int) -> None:
    iterations = 3 if vocab == VOCAB else 1
    given, tokens = write(tmp_path / "in", version, iterations=iterations, by_sample=by_sample, vocab=vocab)
    cache = run_import(tmp_path / "cache", tmp_path / "in", vocab_size=vocab, tokens=tokens, lossless=True)
    assert cache.manifest.target_logits_scales == (1.0,)
    assert len(cache) == 8 * iterations
    for record, each in zip(stored(cache), given, strict=True):
        ids, values = each.top(K)
        np.testing.assert_array_equal(record.tokens, each.ids[:-1])
        np.testing.assert_array_equal(record.labels, each.ids[1:])
        np.testing.assert_array_equal(record.ids, ids)
        np.testing.assert_array_equal(record.log_probs, values.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_values(tmp_path: Path, dtype: Any) -> None:
    given, tokens = write(tmp_path / "in", iterations=1, dtype=dtype)
    cache = run_import(tmp_path / "cache", tmp_path / "in", vocab_size=VOCAB, tokens=tokens, lossless=True)
    for record, each in zip(stored(cache), given, strict=True):
        found = np.take_along_axis(each.log_probs, record.ids.astype(int), 1)  # equal after rounding: any order
        np.testing.assert_allclose(record.log_probs, found, rtol=2**-8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_top_p_left_out_is_absent(tmp_path: Path, dtype: Any) -> None:
    """Its id -1 is stored as 131071, beyond the vocabulary; its value says that it is none."""
    _, tokens = write(tmp_path / "in", kept=3, dtype=dtype)
    cache = run_import(tmp_path / "cache", tmp_path / "in", vocab_size=VOCAB, tokens=tokens, lossless=True)
    for record in stored(cache):
        np.testing.assert_array_equal((record.log_probs > -np.inf).sum(axis=1), np.full(S, 3))


@pytest.mark.parametrize(("kept", "vocab", "readable"), [(K, VOCAB, True), (3, VOCAB, True), (K, BIG, False)])
def test_packed_17th_bits(tmp_path: Path, kept: int, vocab: int, readable: bool) -> None:
    """The latest version packs them, in an order that is not published; without ids above 65535 it does not matter."""
    given = [sequence(0, S, vocab), sequence(1, S, vocab)]
    values, ids = arrays(given, kept=kept)
    high = np.packbits((ids >> 16 & 1).astype(bool).ravel())
    content = {"values": values, "indices_low": (ids & 0xFFFF).astype(np.uint16), "bit_17": high, "format_version": 2}
    meta = {"saver": {"format_version": 2, "mbs_save": 2, "k": K}}
    path = write_tar(tmp_path / "dp0__0-2.tar", meta, {"0-2.pt.zst": compress(torch_bytes(content))})
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.stack([each.ids for each in given]))
    if readable:
        cache = run_import(tmp_path / "cache", path, vocab_size=vocab, tokens=tokens, lossless=True)
        np.testing.assert_array_equal(cache.read(1).ids[:, :kept], given[1].top(kept)[0])
    else:
        with pytest.raises(UserError, match="17th bits of the ids are packed"):
            run_import(tmp_path / "cache", path, vocab_size=vocab, tokens=tokens)


def test_tokens_must_be_given(tmp_path: Path) -> None:
    _, tokens = write(tmp_path / "in")
    with pytest.raises(UserError, match=r"dp0__2.tar: holds log-probabilities and no tokens: .*--tokens FILE.npy"):
        run_import(tmp_path / "cache", tmp_path / "in", vocab_size=VOCAB)
    with pytest.raises(UserError, match="--vocab-size"):
        run_import(tmp_path / "cache", tmp_path / "in", tokens=tokens)
    for array, message in (
        (np.load(tokens)[:20], r"holds 20 samples, and the log-probabilities reach sample 23"),
        (np.load(tokens)[:, 1:], r"sample 0: 13 positions, and .* has 13 tokens a sample; it must have one more"),
        (np.load(tokens).astype(float), r"must hold an integer array \[samples, sequence length \+ 1\]"),
        (np.load(tokens)[0], r"must hold an integer array"),
    ):
        np.save(tokens, array)
        with pytest.raises(UserError, match=message):
            run_import(tmp_path / "cache", tmp_path / "in", vocab_size=VOCAB, tokens=tokens)
    tokens.write_bytes(b"no array")
    with pytest.raises(UserError, match=r"tokens.npy: cannot be read as a .npy file"):
        run_import(tmp_path / "cache", tmp_path / "in", vocab_size=VOCAB, tokens=tokens)


def test_other_tokens_are_noticed(tmp_path: Path) -> None:
    """Samples in another order: the teacher agrees with no more labels than by chance."""
    _, tokens = write(tmp_path / "in", ranks=2, turns=5, iterations=3)
    array = np.load(tokens)
    np.save(tokens, np.roll(array, -1, axis=1))
    with pytest.raises(UserError, match="misaligned by one position"):
        run_import(tmp_path / "cache", tmp_path / "in", vocab_size=VOCAB, tokens=tokens)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    source = tmp_path / "in"
    _, tokens = write(source)
    flags: dict[str, Any] = {"vocab_size": VOCAB, "tokens": tokens}
    with pytest.raises(UserError, match=r"rank 0 lacks 0; name the files of all data-parallel ranks"):
        run_import(tmp_path / "cache", source / "cp0_dp1__2.tar", **flags)
    (source / "cp0_dp1__2.tar").rename(source / "cp1_dp0__2.tar")
    with pytest.raises(UserError, match=r"cp1_dp0__2.tar: holds a slice of each sequence, of context-parallel rank 1"):
        run_import(tmp_path / "cache", source, **flags)
    (source / "cp1_dp0__2.tar").rename(source / "other.tar")
    with pytest.raises(UserError, match=r"other.tar: its name is not dpRANK__ITERATION.tar"):
        run_import(tmp_path / "cache", source, **flags)
    write_tar(source / "other.tar", {"saver": {"format_version": 3}}, {})
    (source / "other.tar").rename(source / "dp1__2.tar")
    with pytest.raises(UserError, match=r"dp1__2.tar: format version 3; versions 1 and 2 are read"):
        run_import(tmp_path / "cache", source, **flags)


def test_a_description_that_is_no_file(tmp_path: Path) -> None:
    _, tokens = write(tmp_path / "in", ranks=1)
    (path,) = (tmp_path / "in").glob("*.tar")
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("_meta.json")
        entry.type = tarfile.DIRTYPE
        archive.addfile(entry)
    with pytest.raises(UserError, match=r"dp0__2.tar: cannot be read as a tar file \(_meta.json is not a file\)"):
        run_import(tmp_path / "cache", tmp_path / "in", vocab_size=VOCAB, tokens=tokens, format="megatron")


def test_damaged_files(tmp_path: Path) -> None:
    _, tokens = write(tmp_path / "in", ranks=1)
    (path,) = (tmp_path / "in").glob("*.tar")
    flags: dict[str, Any] = {"vocab_size": VOCAB, "tokens": tokens, "format": "megatron"}
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"dp0__2.tar: (ends in the middle|cannot be read as a tar file)"):
        run_import(tmp_path / "cache", path, **flags)
    start = content.index(b"\x28\xb5\x2f\xfd")
    path.write_bytes(content[: start + 20] + bytes(40) + content[start + 60 :])
    with pytest.raises(UserError, match=r"dp0__2.tar, 0"):
        run_import(tmp_path / "cache", path, **flags)
    write_tar(path, {}, {"0.pt.zst": compress(torch_bytes({"values": [np.zeros((2, 1, 1), np.float32)]}))})
    with pytest.raises(UserError, match=r"has no values, indices_low and bit_17"):
        run_import(tmp_path / "cache", path, **flags)
    write_tar(path, {}, {})
    with pytest.raises(UserError, match=r"holds no iteration"):
        run_import(tmp_path / "cache", path, **flags)
    assert not (tmp_path / "cache").exists()
