"""docs/cache.md is true: its commands work, and its description of the format suffices to read a cache."""

import base64
import hashlib
import json
import math
import re
import shlex
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zstandard
from array_record.python import array_record_module
from small_teacher import build

from kdjax.cache.__main__ import main as cache_main
from kdjax.convert.__main__ import main as convert_main
from kdjax.train import main as train_main

PAGE = (Path(__file__).parents[2] / "docs" / "cache.md").read_text()


def test_three_commands_lead_from_a_teacher_and_a_text_to_a_student(
    teacher: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    block = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)[0].splitlines()
    commands = [shlex.split(line) for line in block]
    assert [command[:2] for command in commands] == [["kdjax", "convert"], ["kdjax", "cache"], ["kdjax", "train"]]
    monkeypatch.chdir(tmp_path)
    export = f"to-hf {teacher} smollm2 --max-positions 512 --tokenizer {teacher / 'tokenizer'}"
    assert convert_main(export.split()) == 0
    (tmp_path / "book.txt").write_text(prose.read_text())
    assert convert_main(commands[0][2:]) == 0
    assert cache_main(commands[1][2:]) == 0
    shorter = {"train.steps": 4, "optim.warmup_steps": 1, "train.val_every": 4, "train.save_every": 4}
    small = {"model.vocab_size": 300, "batch.microbatch_size": 1, "model.layers": 1, "data.verify_records": 4}
    words = [f"--config.{key}={value}" for key, value in {**shorter, **small}.items()]
    assert train_main([*commands[2][2:], *words]) == 0
    assert "complete after step 4/4" in capsys.readouterr().out


def numbers(packed: tuple[bytes, bytes], count: int, coded: bool) -> list[int]:
    """What the page says of packed arrays, number by number."""
    symbols = zstandard.ZstdDecompressor().decompress(packed[0], max_output_size=max(1, count))
    bits = iter([byte >> i & 1 for byte in packed[1] for i in range(8)])
    found = []
    for symbol in symbols:
        if coded:
            first, width = (symbol, 0) if symbol < 172 else (172 + 16 * (symbol - 172), 4)
        elif symbol < 8:
            first, width = symbol, 0
        else:
            e = 3 + (symbol - 8) // 8
            width = e - 3
            first = 2**e + (symbol - 8) % 8 * 2**width
        found.append(first + sum(next(bits) << i for i in range(width)))
    assert len(found) == count
    return found


def probability(code: int) -> float:
    if code == 0:
        return 0.0
    if code <= 48:
        return math.exp(math.log(2**-14) - (48 - code) / 4)
    return (1 / 128 + (code - 48) / 512) ** 2 if code <= 172 else 1 / 16 + (code - 172) / 256


def test_the_format_can_be_read_by_what_the_page_says(teacher: Path, prose: Path, tmp_path: Path) -> None:
    cache = build(teacher, tmp_path / "c", prose, top_p=0.8, top_k=12, label_log_probs=True, offsets=True)
    manifest = json.loads((tmp_path / "c" / "cache.json").read_text())
    stated = manifest.pop("sha256")
    assert stated == hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    first = zstandard.ZstdDecompressor().decompress(base64.b64decode(manifest["first_ids"]))
    order = np.frombuffer(first, "<i4").tolist()
    order += [i for i in range(manifest["vocab_size"]) if i not in set(order)]
    read = 0
    for shard in manifest["shards"]:
        path = tmp_path / "c" / shard["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        *stored, last = array_record_module.ArrayRecordReader(str(path)).read_all()
        index = msgpack.unpackb(last)
        assert index["magic"] == "kdjax shard 1"
        assert len(stored) == shard["records"]
        for place, record in enumerate(stored):
            expected = cache.read(read)
            assert record[:8] == hashlib.blake2b(record[8:], digest_size=8).digest()
            s, k, number, arrays = msgpack.unpackb(record[8:])
            names = re.findall(r"^\| `(\w+)` \| (?:S|sum|entries|scales)", PAGE, flags=re.MULTILINE)
            found = dict(zip(names, arrays, strict=True))
            assert (s, number) == (len(expected), read)
            assert s == np.frombuffer(index["lengths"], "<u4")[place]
            ranks = numbers(found["tokens"], s, False)
            assert [order[r] for r in ranks] == expected.tokens.tolist()
            assert (
                index["hashes"][8 * place : 8 * place + 8]
                == hashlib.blake2b(expected.tokens.astype("<i4").tobytes(), digest_size=8).digest()
            )
            labels = [a ^ b for a, b in zip(numbers(found["labels"], s, False), [*ranks[1:], 0], strict=True)]
            assert [order[r] for r in labels] == expected.labels.tolist()
            assert numbers(found["mask"], s, False) == expected.loss_mask.tolist()
            counts = numbers(found["counts"], s, False)
            gaps, values = (
                iter(numbers(found["ids"], sum(counts), False)),
                iter(numbers(found["values"], sum(counts), True)),
            )
            tails = numbers(found["log_sums"], s, True)
            for t in range(s):
                entries, rank = {}, -1
                for _ in range(counts[t]):
                    rank += next(gaps) + 1
                    entries[order[rank]] = probability(next(values))
                there = dict(zip(expected.ids[t].tolist(), np.exp(expected.log_probs[t]).tolist(), strict=True))
                assert counts[t] == (expected.log_probs[t] > -np.inf).sum() <= k
                assert all(math.isclose(entries[i], there[i], rel_tol=1e-5) for i in entries)
                mass = sum(entries.values()) / math.exp(expected.log_sums[0, t])
                assert math.isclose(1 - mass, probability(tails[t]), abs_tol=1e-5)
            assert expected.label_log_probs is not None
            np.testing.assert_allclose(
                [probability(c) for c in numbers(found["label_values"], s, True)],
                np.exp(expected.label_log_probs),
                rtol=1e-5,
            )
            assert expected.offsets is not None
            assert np.cumsum(numbers(found["offsets"], s, False)).tolist() == expected.offsets.tolist()
            read += 1
    assert read == len(cache)
