"""Damage of every kind is named, with its file and record."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_teacher import build

from kdjax.cache.__main__ import main
from kdjax.cache.recompute import compare
from kdjax.cache.verify import find_problems
from kdjax.cache.writer import CacheWriter
from kdjax.data.shards.manifest import CacheManifest, encode_ids
from kdjax.data.shards.reader import Cache
from kdjax.data.shards.record_bytes import StoredRecord, VocabularyOrder
from kdjax.data.shards.shard import OPEN_READERS
from kdjax.types import UserError

V, LENGTH, COUNT, K = 211, 64, 24, 12


def make_records(chance: float = 0.7, seed: int = 0) -> list[StoredRecord]:
    """Records of a teacher that expects the label, at this share of the positions."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(COUNT):
        tokens = rng.integers(0, V, LENGTH + 1).astype(np.int32)
        logits = rng.normal(size=(LENGTH, V)) * 2
        knows = rng.random(LENGTH) < chance
        logits[knows, tokens[1:][knows]] += 9
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        ids = np.argsort(-log_p, axis=1)[:, :K]
        made.append(
            StoredRecord(
                tokens[:-1],
                tokens[1:],
                np.ones(LENGTH, np.float32),
                ids,
                np.take_along_axis(log_p, ids, axis=1).astype(np.float32),
                np.zeros((1, LENGTH), np.float32),
                index=number,
            )
        )
    return made


def write(path: Path, records: list[StoredRecord], values: str = "quantised", size: int = 8, **known: Any) -> Path:
    order = VocabularyOrder.by_count(np.bincount(np.concatenate([r.tokens for r in records]), minlength=V))
    manifest = CacheManifest(V, K, LENGTH, values=values, first_ids=encode_ids(order.first), **known)
    writer = CacheWriter(path, manifest, {})
    for number in range(0, len(records), size):
        writer.write_shard(number // size, records[number : number + size])
    writer.finish(-(-len(records) // size))
    return path


def problems(path: Path, **options: Any) -> str:
    return "\n".join(find_problems(path, **options))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("sound") / "c", make_records())


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "c"))


def test_a_sound_cache_has_no_problems(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(sound) == ""
    assert main(["verify", str(sound)]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    assert main(["info", str(sound)]) == 0
    assert "3 shards, 24 records, 1,536 tokens, 100.0% unmasked" in capsys.readouterr().out


def test_a_flipped_bit_anywhere_is_named(copy: Path) -> None:
    rng = np.random.default_rng(1)
    for file in sorted(copy.iterdir()):
        whole = file.read_bytes()
        for place in [0, len(whole) - 2, *rng.integers(0, len(whole), 6).tolist()]:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(damaged)
            found = problems(copy)
            assert file.name in found, (file.name, place, found)
        file.write_bytes(whole)
    assert problems(copy) == ""


def test_the_damaged_record_is_named(copy: Path) -> None:
    file = copy / "shard-00001.arrayrecord"
    content = file.read_bytes()
    record = Cache(copy).shards[1].read(4)
    place = content.index(record) + len(record) // 2
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert "shard-00001.arrayrecord, record 5: " in problems(copy)
    assert main(["verify", str(copy)]) == 1


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_cut_or_missing_shard_is_named(copy: Path, share: float) -> None:
    file = copy / "shard-00002.arrayrecord"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "shard-00002.arrayrecord: " in problems(copy)
    file.unlink()
    assert "shard-00002.arrayrecord: missing; copy it again" in problems(copy)


def test_shards_that_changed_places_are_named(copy: Path) -> None:
    (copy / "shard-00000.arrayrecord").rename(copy / "x")
    (copy / "shard-00001.arrayrecord").rename(copy / "shard-00000.arrayrecord")
    (copy / "x").rename(copy / "shard-00001.arrayrecord")
    assert "shard-00000.arrayrecord: its digest is not the manifest's" in problems(copy)


def test_a_cache_of_many_shards_opens_few_files(tmp_path: Path) -> None:
    """More shards than a process may have open files; every record is read, and read again after its file was shut."""
    records = [dataclasses.replace(make_records()[0], index=number) for number in range(OPEN_READERS + 12)]
    cache = Cache(write(tmp_path / "c", records, size=1))
    descriptors = Path("/proc/self/fd")
    for _ in range(2):
        assert [cache.read(i).index for i in range(len(cache))] == list(range(len(records)))
        opened = [str(path.readlink()) for path in descriptors.iterdir() if path.is_symlink()]
        assert sum(name.startswith(str(tmp_path)) for name in opened) <= OPEN_READERS


def test_an_incomplete_cache_is_named(copy: Path) -> None:
    (copy / "cache.json").unlink()
    assert "cache.json" in problems(copy)


def exchange(records: list[StoredRecord], order: list[int]) -> list[StoredRecord]:
    """The records, with the targets of others."""
    return [
        dataclasses.replace(record, ids=records[i].ids, log_probs=records[i].log_probs)
        for record, i in zip(records, order, strict=True)
    ]


def shift(records: list[StoredRecord], by: int) -> list[StoredRecord]:
    return [
        dataclasses.replace(r, ids=np.roll(r.ids, by, axis=0), log_probs=np.roll(r.log_probs, by, axis=0))
        for r in records
    ]


def change(records: list[StoredRecord], number: int, **values: Callable[[np.ndarray], Any]) -> list[StoredRecord]:
    """The records, one of which has fields changed in place."""
    changed = {}
    for name, damage in values.items():
        array = getattr(records[number], name).copy()
        damage(array)
        changed[name] = array
    return [dataclasses.replace(r, **changed) if i == number else r for i, r in enumerate(records)]


def put(place: Any, value: float) -> Callable[[np.ndarray], Any]:
    return lambda array: array.__setitem__(place, value)


def swap(a: Any, b: Any) -> Callable[[np.ndarray], Any]:
    def exchange(array: np.ndarray) -> None:
        array[a], array[b] = array[b].copy(), array[a].copy()

    return exchange


@pytest.mark.parametrize("by", [-1, 1])
def test_shifted_targets_are_named(tmp_path: Path, by: int) -> None:
    assert "misaligned by one position" in problems(write(tmp_path / "c", shift(make_records(), by)))


# NeMo-Aligner's capture writes records in the order of its data-parallel ranks, and targets in another.
PERMUTATIONS = {
    "two exchanged": [1, 0, *range(2, COUNT)],
    "shifted by one": [*range(1, COUNT), 0],
    "two ranks interleaved": [*range(0, COUNT, 2), *range(1, COUNT, 2)],
    "four ranks of microbatches": [i for r in range(4) for i in range(r, COUNT, 4)],
    "reversed": list(range(COUNT))[::-1],
}


@pytest.mark.parametrize("name", PERMUTATIONS)
def test_scrambled_records_are_named(tmp_path: Path, name: str) -> None:
    order = PERMUTATIONS[name]
    found = problems(write(tmp_path / "c", exchange(make_records(), order)))
    moved = [number for number, i in enumerate(order) if i != number]
    if len(moved) > COUNT / 2:
        assert "chance" in found or "look misaligned" in found
    else:
        for number in moved:
            assert f"shard-0000{number // 8}.arrayrecord, record {number % 8 + 1}: " in found
        assert found.count("another record's targets") == len(moved)


def test_a_random_teacher_is_refused(tmp_path: Path) -> None:
    assert "chance is log V = 5.35" in problems(write(tmp_path / "c", make_records(chance=0.0)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"log_probs": put((9, 3), np.nan)}, "nan at an unmasked position"),
        ({"log_probs": put((9, 3), np.inf)}, "inf at an unmasked position"),
        ({"log_probs": put(9, -np.inf)}, "no finite entry at an unmasked position"),
        ({"log_probs": swap((9, 3), (9, 4))}, "not in descending order"),
        ({"ids": put((9, 4), 0), "log_probs": lambda a: None}, None),
        ({"loss_mask": put(5, 2.0)}, "loss_mask[5] = 2; it must be 0 or 1"),
    ],
)
def test_values_that_training_would_refuse_are_named(
    tmp_path: Path, changed: dict[str, Callable[[np.ndarray], Any]], message: str | None
) -> None:
    """In a lossless cache, which holds whatever was put in; a quantised one cannot hold such values."""
    records = change(make_records(), 10, **changed)
    if message is None:
        records = change(records, 10, ids=put((9, 3), int(records[10].ids[9, 4])))
        message = "has id 0 more than once"
    found = problems(write(tmp_path / "c", records, "float32"))
    assert "shard-00001.arrayrecord, record 3: " in found
    assert message in found


def test_ids_out_of_range_cannot_be_stored(tmp_path: Path) -> None:
    for sentinel in (V, -1, 131071):
        with pytest.raises(UserError, match=f"ids hold {sentinel}, and the cache's vocabulary has the ids 0 to 210"):
            write(tmp_path / f"c{sentinel}", change(make_records(), 10, ids=put((9, 3), sentinel)))


def test_an_index_that_comes_twice_is_named(tmp_path: Path) -> None:
    records = make_records()
    records[20] = dataclasses.replace(records[20], index=3)
    assert "shard-00002.arrayrecord, record 5: index 3 is that of an earlier record" in problems(
        write(tmp_path / "c", records)
    )


def test_another_tokenizer_is_named(tmp_path: Path) -> None:
    path, tokenizer = write(tmp_path / "c", make_records(), tokenizer_sha256="0" * 64), tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    assert "the same ids mean different tokens" in problems(path, tokenizer=tokenizer)


def test_targets_are_computed_again(teacher: Path, prose: Path, tmp_path: Path) -> None:
    cache = build(teacher, tmp_path / "c", prose)
    assert list(compare(cache, teacher, 4)) == []
    records = [cache.read(i) for i in range(len(cache) - 1)]  # the last is shorter
    writer = CacheWriter(tmp_path / "d", dataclasses.replace(cache.manifest, shards=()), {})
    writer.write_shard(0, exchange(records, [*range(1, len(records)), 0]))
    writer.finish(1)
    assert len(list(compare(Cache(tmp_path / "d"), teacher, 4))) == 4


def test_caches_are_merged_and_split(sound: Path, tmp_path: Path) -> None:
    assert main(["split", str(sound), str(tmp_path / "a"), str(tmp_path / "b"), "--share", "0.75"]) == 0
    assert (len(Cache(tmp_path / "a")), len(Cache(tmp_path / "b"))) == (18, 6)
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "c")]) == 0
    merged, whole = Cache(tmp_path / "c"), Cache(sound)
    assert problems(tmp_path / "c") == ""

    def contents(cache: Cache) -> set[bytes]:
        return {cache.read(i).tokens.tobytes() + cache.read(i).log_probs.tobytes() for i in range(len(cache))}

    assert contents(merged) == contents(whole)
    assert [merged.read(i).index for i in range(len(merged))] == list(range(24))


def test_a_picture(sound: Path, tmp_path: Path) -> None:
    assert main(["info", str(sound), "--picture", str(tmp_path / "p.svg")]) == 0
    assert "positions by their number of entries" in (tmp_path / "p.svg").read_text()
