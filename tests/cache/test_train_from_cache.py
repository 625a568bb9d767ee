"""Training from a cache: the same as from the records it was made of, and what only a cache can do."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import toy_problem
from small_teacher import build
from test_codec import make

from kdjax import config as configs
from kdjax import train
from kdjax.cache.__main__ import main
from kdjax.cache.writer import CacheWriter
from kdjax.config import DataConfig
from kdjax.data import open_dataset
from kdjax.data.loader import train_batches
from kdjax.data.shards.manifest import CacheManifest
from kdjax.data.shards.reader import Cache
from kdjax.types import UserError


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON lines of the toy problem, and lossless and quantised caches of them."""
    directory = tmp_path_factory.mktemp("records")
    for name, count, first in (("train", 22, 0), ("val", 11, 1000)):
        path = toy_problem.write(directory / f"{name}.jsonl", count, first)
        vocab = ["--vocab-size", str(toy_problem.VOCAB)]
        assert main(["import", str(path), str(directory / f"{name}.lossless"), "--lossless", *vocab]) == 0
        assert main(["import", str(path), str(directory / f"{name}.quantised"), *vocab]) == 0
    return directory


def losses(workdir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_s") and k != "memory_mib"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("pack", [False, True])
def test_fifty_steps_from_a_lossless_cache_have_the_same_bits(records: Path, tmp_path: Path, pack: bool) -> None:
    results = []
    for kind in ("jsonl", "lossless"):
        config = configs.replace(
            toy_problem.config(records),
            train__steps=50,
            train__val_every=25,
            train__save_every=50,
            data__train=(str(records / f"train.{kind}"),),
            data__val=(str(records / f"val.{kind}"),),
            data__pack=pack,
            loss__tail="ghost",
        )
        outcome = train.run(config, tmp_path / kind, devices=jax.devices()[:1])
        results.append((jax.tree.map(np.asarray, outcome.state.params), losses(tmp_path / kind)))
    jax.tree.map(np.testing.assert_array_equal, results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_quantised_cache_trains_alike(records: Path) -> None:
    sets = [
        open_dataset((str(records / f"train.{kind}"),), DataConfig(sequence_length=12), vocab_size=toy_problem.VOCAB)
        for kind in ("jsonl", "quantised")
    ]
    assert len(sets[0]) == len(sets[1])
    assert sets[1].has_log_sum_exp
    for i in range(len(sets[0])):
        exact, coded = sets[0][i], sets[1][i]
        np.testing.assert_array_equal(coded.tokens, exact.tokens)
        np.testing.assert_array_equal(coded.loss_mask, exact.loss_mask)
        p, q = (
            {t: dict(zip(r.topk_token_ids[t].tolist(), np.exp(r.topk_logits[t] - r.log_sum_exp_logits[t]), strict=True))
             for t in np.flatnonzero(r.loss_mask)}
            for r in (exact, coded)
        )  # fmt: skip
        assert all(abs(p[t][id] - q[t][id]) < 0.004 for t in p for id in p[t])


def test_a_ghost_at_a_stored_temperature(teacher: Path, prose: Path, tmp_path: Path) -> None:
    """Records have logits at the loss's scale and the logsumexp that belongs to them; other scales are refused."""
    cache = build(teacher, tmp_path / "c", prose, temperature=2.0, lossless=True)
    paths, data = (str(tmp_path / "c"),), DataConfig(sequence_length=32)
    dataset = open_dataset(paths, data, vocab_size=300, target_logits_scale=0.5, need_log_sum_exp=True)
    record, stored = dataset[0], cache.read(0)
    np.testing.assert_array_equal(record.topk_logits, np.float32(0.5) * stored.log_probs)
    np.testing.assert_array_equal(record.log_sum_exp_logits, stored.log_sums[1])
    with pytest.raises(UserError, match=r"no logsumexp at loss.target_logits_scale = 0.25 \(stored: 1, 0.5\)"):
        open_dataset(paths, data, vocab_size=300, target_logits_scale=0.25, need_log_sum_exp=True)
    unscaled = open_dataset(paths, data, vocab_size=300, target_logits_scale=0.25)
    np.testing.assert_array_equal(unscaled[0].topk_logits, stored.log_probs)


def test_sampled_targets_need_the_setting_and_reach_the_batch(teacher: Path, prose: Path, tmp_path: Path) -> None:
    build(teacher, tmp_path / "c", prose, targets="hybrid", draws=6, top_k=4)
    paths, data = (str(tmp_path / "c"),), DataConfig(sequence_length=32)
    with pytest.raises(UserError, match=r"holds sampled targets.*set loss.targets=sampled"):
        open_dataset(paths, data, vocab_size=300)
    dataset = open_dataset(paths, data, vocab_size=300, targets="sampled", need_log_sum_exp=True)
    batches = train_batches(dataset, data, global_size=4, start_step=0, stop_step=1, rows=slice(0, 4))
    batch = next(batches)
    assert batch.topk_weights is not None
    learned = batch.loss_mask > 0
    np.testing.assert_allclose(batch.topk_weights.sum(axis=-1)[learned], 1, atol=1e-5)
    with pytest.raises(UserError, match="sampled targets are used as a whole"):
        open_dataset(paths, dataclasses.replace(data, top_k=2), vocab_size=300, targets="sampled")


def test_sampled_targets_are_not_read_from_json(records: Path) -> None:
    with pytest.raises(UserError, match=r"holds the teacher's top-k, and loss.targets is 'sampled'"):
        open_dataset((str(records / "train.jsonl"),), DataConfig(sequence_length=12), vocab_size=61, targets="sampled")


def test_json_has_the_logsumexp_of_the_unscaled_logits_only(records: Path) -> None:
    with pytest.raises(UserError, match=r"belongs to the unscaled logits.*target_logits_scale = 0.5; set it to 1"):
        open_dataset(
            (str(records / "train.jsonl"),),
            DataConfig(sequence_length=12),
            vocab_size=61,
            target_logits_scale=0.5,
            need_log_sum_exp=True,
        )


@pytest.mark.slow
def test_training_with_label_tails_and_draws_learns(teacher: Path, prose: Path, tmp_path: Path) -> None:
    """A student of a small teacher follows it more closely after a few steps, whatever the targets."""
    build(teacher, tmp_path / "topk", prose, temperature=2.0)
    build(teacher, tmp_path / "hybrid", prose, targets="hybrid", draws=6, top_k=4)
    settings: dict[str, dict[str, Any]] = {
        "label": {"loss__tail": "label"},
        "warm": {"loss__tail": "ghost", "loss__target_logits_scale": 0.5, "loss__logits_scale": 0.5},
        "sampled": {"loss__targets": "sampled"},
    }
    for name, changes in settings.items():
        path = str(tmp_path / ("hybrid" if name == "sampled" else "topk"))
        config = configs.replace(
            toy_problem.config(tmp_path),
            model__vocab_size=300,
            data__train=(path,),
            data__val=(path,),
            data__sequence_length=32,
            loss__sft_loss_weight=0.0,  # this teacher knows nothing of the text
            train__steps=30,
            train__val_every=30,
            train__save_every=30,
            **changes,
        )
        train.run(config, tmp_path / f"run_{name}", devices=jax.devices()[:1])
        first, last = (line["kd_loss"] for line in losses(tmp_path / f"run_{name}") if line["split"] == "val")
        assert last < 0.9 * first, (name, first, last)


def test_a_damaged_record_is_refused_or_left_out(records: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(records / "train.quantised", tmp_path / "c"))
    shard = path / "shard-00000.arrayrecord"
    stored = Cache(path).shards[0].read(5)
    content = shard.read_bytes()
    place = content.index(stored) + len(stored) // 2
    shard.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    data = DataConfig(sequence_length=12)
    with pytest.raises(UserError, match=r"shard-00000.arrayrecord, record 6: damaged"):
        open_dataset((str(path),), data, vocab_size=61)
    dataset = open_dataset((str(path),), dataclasses.replace(data, max_bad_records=1), vocab_size=61)
    assert dataset.bad_records == 1
    assert not dataset[5].loss_mask.any()


def test_the_tokenizer_and_vocabulary_are_compared(teacher: Path, prose: Path, tmp_path: Path) -> None:
    build(teacher, tmp_path / "c", prose)
    paths, data = (str(tmp_path / "c"),), DataConfig(sequence_length=32)
    with pytest.raises(UserError, match="the same ids mean different tokens"):
        open_dataset(paths, data, vocab_size=300, tokenizer_sha256="0" * 64)
    with pytest.raises(UserError, match="the teacher's vocabulary has 300 ids"):
        open_dataset(paths, data, vocab_size=299)


MEASURE = """
import resource, sys
from kdjax.config import DataConfig
from kdjax.data import open_dataset
from kdjax.data.loader import train_batches
data = DataConfig(sequence_length=512, verify_records=2)
dataset = open_dataset((sys.argv[1],), data, vocab_size=50000)
peaks = []
for batch in train_batches(dataset, data, global_size=8, start_step=0, stop_step=60, rows=slice(0, 8)):
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(peaks[20], peaks[-1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_what_was_read(tmp_path: Path) -> None:
    """A cache that is larger than what the process may add to its memory is read to the end."""

    template = make(0, 512, 64, 50000)
    manifest = CacheManifest(50000, 64, 512, values="float32", target_logits_scales=(1.0, 0.5))
    writer = CacheWriter(tmp_path / "c", manifest, {})
    noise = np.random.default_rng(0)
    for number in range(4):
        writer.write_shard(
            number,
            (
                dataclasses.replace(
                    template,
                    log_probs=-np.sort(noise.random((512, 64), np.float32)),
                    log_sums=np.full((2, 512), 9, np.float32),
                    index=number * 60 + i,
                )
                for i in range(60)
            ),
        )
    size = sum(entry.bytes for entry in writer.finish(4).shards)
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "c")], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    early, late = map(int, ended.stdout.split()[-2:])
    assert (late - early) * 1024 < 0.25 * size
