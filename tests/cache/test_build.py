"""Building a cache: what the teacher says, on any mesh and with any number of processes, interrupted or not."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_teacher import build, text

from kdjax.cache import writer
from kdjax.cache.text import Tokenizer
from kdjax.checkpoint import load_model
from kdjax.data.shards.reader import Cache
from kdjax.data.shards.record_bytes import StoredRecord
from kdjax.parallel import mesh as meshes
from kdjax.types import UserError


@functools.cache
def logits_of(teacher: Path) -> Any:
    return jax.jit(load_model(teacher).__call__)


def oracle(teacher: Path, record: StoredRecord) -> np.ndarray:
    """The teacher's log-probabilities at every position of a record, float64."""
    tokens = np.zeros((1, 200), np.int32)  # one shape, so that one program
    tokens[0, : len(record)] = record.tokens
    logits = np.asarray(logits_of(teacher)(jnp.asarray(tokens))[0], np.float64)[: len(record)]
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def files(cache: Cache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.path.iterdir())}


def records(cache: Cache) -> list[StoredRecord]:
    return [cache.read(i) for i in range(len(cache))]


def test_targets_are_the_teachers(teacher: Path, prose: Path, tmp_path: Path) -> None:
    cache = build(teacher, tmp_path / "c", prose, lossless=True, label_log_probs=True, offsets=True, temperature=2.0)
    tokenizer, whole = Tokenizer(teacher / "tokenizer"), prose.read_text()
    expected = tokenizer.encode(whole).ids
    assert np.concatenate([record.tokens for record in records(cache)]).tolist() == expected[:-1].tolist()
    assert cache.manifest.target_logits_scales == (1.0, 0.5)
    assert [record.index for record in records(cache)] == list(range(len(cache)))
    for record in (cache.read(0), cache.read(len(cache) - 1)):
        log_p = oracle(teacher, record)
        order = np.argsort(-log_p, axis=1)[:, :8]
        np.testing.assert_array_equal(record.ids, order)
        np.testing.assert_allclose(record.log_probs, np.take_along_axis(log_p, order, 1), atol=2e-5)
        for place, scale in enumerate((1.0, 0.5)):
            np.testing.assert_allclose(record.log_sums[place], np.log(np.exp(scale * log_p).sum(axis=1)), atol=2e-5)
        here = np.take_along_axis(log_p, record.labels[:, None], 1)[:, 0]
        assert record.label_log_probs is not None
        assert np.abs(np.exp(record.label_log_probs) - np.exp(here)).max() <= 0.002
        assert record.offsets is not None
        assert (record.labels[:-1] == record.tokens[1:]).all()
    start = cache.read(1).offsets
    assert start is not None
    assert tokenizer.encode(whole.encode()[start[0] :].decode()).ids[0] == cache.read(1).tokens[0]


@pytest.mark.parametrize(
    ("options", "same_bytes"),
    [
        ({"mesh": "data=8"}, True),
        ({"mesh": "data=4,fsdp=2", "microbatches": 2}, True),
        ({"mesh": "pipe=2,tensor=2,data=2", "microbatches": 3}, False),
        ({"mesh": "tensor=2,data=4"}, False),
    ],
)
def test_any_mesh(
    teacher: Path,
    prose: Path,
    tmp_path: Path,
    options: dict[str, Any],
    same_bytes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no sum is split, to the byte; else to what float32 sums in another order give."""
    with monkeypatch.context() as patch:
        patch.setattr(meshes, "make_mesh", functools.partial(meshes.make_mesh, devices=jax.devices()[:1]))
        one = build(teacher, tmp_path / "one", prose, lossless=True)
    other = build(teacher, tmp_path / "other", prose, lossless=True, **options)
    if same_bytes:
        assert files(one) == files(other)
    for a, b in zip(records(one), records(other), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=2e-5)
        np.testing.assert_allclose(a.log_sums, b.log_sums, atol=2e-5)


def test_sampled_targets_are_draws_from_the_teacher(teacher: Path, prose: Path, tmp_path: Path) -> None:
    """Over all positions, draws fall on ids as the teacher's probabilities say, within the error of chance."""
    sharded = {"mesh": "tensor=2,data=4"}
    for targets, k, n in (("sampled", 0, 24), ("hybrid", 4, 12)):
        cache = build(teacher, tmp_path / targets, prose, targets=targets, draws=n, top_k=4, **sharded)
        assert (cache.manifest.targets, cache.manifest.draws, cache.manifest.top_k) == (targets, n, k + n)
        excess, variance = np.zeros(300), np.zeros(300)
        for record in records(cache):
            p = np.exp(oracle(teacher, record))
            top = np.argsort(-p, axis=1)[:, :k]
            np.put_along_axis(p, top, 0, axis=1)
            assert record.draws is not None
            assert record.tail_log_probs is not None
            rest = p.sum(axis=1, keepdims=True)
            mean = np.where(p > 0, p * np.log(np.maximum(p, 1e-30)), 0).sum(axis=1) / rest[:, 0]
            np.testing.assert_allclose(record.tail_log_probs, mean, atol=2e-3)
            assert (record.draws.sum(axis=1) == n).all()
            exact = (record.log_probs > -np.inf) & (record.draws == 0)
            assert (exact.sum(axis=1) == k).all()
            for t in range(len(record)):
                assert set(record.ids[t, exact[t]].tolist()) == set(top[t].tolist())
                assert not set(record.ids[t, record.draws[t] > 0].tolist()) & set(top[t].tolist())
                np.add.at(excess, record.ids[t], record.draws[t])
            excess -= (n * p / rest).sum(axis=0)
            variance += (n * p / rest).sum(axis=0)
        assert np.abs(excess / np.sqrt(variance + 1)).max() < 5  # systematic draws vary less than a binomial
        weights = cache.read(0).record().topk_weights
        assert weights is not None
        np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-5)


def test_a_nucleus_has_as_many_entries_as_it_needs(teacher: Path, prose: Path, tmp_path: Path) -> None:
    cache = build(teacher, tmp_path / "c", prose, top_p=0.6, top_k=20)
    for record in records(cache)[:3]:
        p = np.exp(record.log_probs.astype(np.float64))
        counts = (p > 0).sum(axis=1)
        assert counts.min() < counts.max()
        full = counts < 20
        assert (p.sum(axis=1)[full] > 0.58).all()
        assert all(p[t, : c - 1].sum() < 0.62 for t, c in enumerate(counts))


class Killed(BaseException):
    """What stops a build in the middle."""


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(
    teacher: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(teacher, tmp_path / "whole", prose)
    out, encode, stops = tmp_path / "c", writer.encode, 0
    assert len(whole.manifest.shards) > 4
    for after in np.random.default_rng(0).integers(1, 12, 30):
        left = [int(after)]

        def stop(*arguments: Any, left: list[int] = left) -> bytes:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return encode(*arguments)

        monkeypatch.setattr(writer, "encode", stop)
        try:
            build(teacher, out, prose)
            break
        except Killed:
            stops += 1
            with pytest.raises(UserError, match="not complete; run the command that builds it again"):
                Cache(out)
    assert stops > 2
    assert files(Cache(out)) == files(whole)


@pytest.mark.slow
def test_killed_and_with_two_processes(teacher: Path, prose: Path, tmp_path: Path) -> None:
    """Two processes that are killed again and again write what one undisturbed process writes."""
    whole = build(teacher, tmp_path / "whole", prose, shard_tokens=64)
    command = [sys.executable, "-m", "kdjax.launch", "-n", "2", "--devices-per-process", "4", "--", "kdjax.cache"]
    command += ["build", "--teacher", str(teacher), "--text", str(prose), str(tmp_path / "c")]
    command += ["--dtype", "float32", "--sequence-length", "32", "--shard-tokens", "64", "--top-k", "8"]
    kills = 0
    for _ in range(8):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 60
        before = len(list((tmp_path / "c").glob("shard-*.json")))
        while process.poll() is None and kills < 2 and time.monotonic() < deadline:
            if len(list((tmp_path / "c").glob("shard-*.json"))) > before + 2:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
            time.sleep(0.02)
        output = process.communicate()[0].decode()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, output
    assert process.returncode == 0, output
    assert kills == 2
    assert files(Cache(tmp_path / "c")) == files(whole)


def test_only_what_the_assistant_says_is_learned(teacher: Path, tmp_path: Path) -> None:
    lines = tmp_path / "chat.jsonl"
    talk = [
        ("system", "Be brief."),
        ("user", "Name a colour."),
        ("assistant", "Blue."),
        ("user", "Two?"),
        ("assistant", "No"),
    ]
    messages = [{"role": role, "content": content} for role, content in talk]
    rows = [{"messages": messages}, {"prompt": "One and one is ", "response": "two."}, {"text": "All of it."}]
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    cache = build(teacher, tmp_path / "c", lines, sequence_length=200, lossless=True)
    tokenizer = Tokenizer(teacher / "tokenizer")
    said = []
    for record in records(cache):
        said.append(
            tokenizer._tokenizer.decode(record.labels[record.loss_mask > 0].tolist(), skip_special_tokens=False)
        )
        masked = record.loss_mask == 0
        assert (record.log_probs[masked] == -np.inf).all()
        assert (record.log_probs[~masked] > -np.inf).all()
    assert said == ["Blue.<end>No<end>", " two.", "ll of it."]


@pytest.mark.parametrize("masked", [False, True])
def test_packed_rows_say_what_single_ones_say(teacher: Path, tmp_path: Path, masked: bool) -> None:
    lines = tmp_path / "short.jsonl"
    pieces = [text(20 + 9 * i, start=5000 + 300 * i) for i in range(6)]
    lines.write_text(
        "".join(json.dumps({"prompt": p[:9], "response": p[9:]} if masked else {"text": p}) + "\n" for p in pieces)
    )
    cache = build(teacher, tmp_path / "c", lines, lossless=True, sequence_length=64)
    assert len(cache) == 6
    for record in records(cache):
        log_p = oracle(teacher, record)
        learned = record.loss_mask > 0
        np.testing.assert_allclose(record.log_probs[learned], -np.sort(-log_p, axis=1)[learned, :8], atol=2e-5)


def test_a_cache_that_was_begun_otherwise_is_left_alone(
    teacher: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = build(teacher, tmp_path / "c", prose)
    before = files(cache)
    build(teacher, tmp_path / "c", prose)  # the same again
    with pytest.raises(UserError, match="holds a complete cache; name another directory"):
        build(teacher, tmp_path / "c", prose, top_k=9)
    assert files(cache) == before
    monkeypatch.setattr(writer.CacheWriter, "finish", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        build(teacher, tmp_path / "d", prose)
    with pytest.raises(UserError, match=r"begun with other settings .*top_k: 8 there, 9 now"):
        build(teacher, tmp_path / "d", prose, top_k=9)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not valid JSON"),
        ("3", "line 2: a int; a line must be a JSON object"),
        ("{}", "line 2: has no fields; a line needs messages, or prompt and response, or text"),
        ('{"text": 3}', "line 2: text is a int; it must be a string"),
        ('{"messages": "hello"}', "line 2: messages must be a list"),
        ('{"messages": [{"role": "user", "content": "?"}]}', "line 2: no message with role 'assistant'"),
    ],
)
def test_bad_lines_are_named(teacher: Path, tmp_path: Path, line: str, message: str) -> None:
    lines = tmp_path / "bad.jsonl"
    lines.write_text('{"text": "Good."}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        build(teacher, tmp_path / "c", lines)
    assert not (tmp_path / "c").exists()


def test_what_cannot_work_is_refused_before_the_teacher_is_read(
    teacher: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdjax.cache.build.load_params", lambda *_: pytest.fail("the teacher was read"))
    refused: list[tuple[str, dict[str, Any], list[Path]]] = [
        ("--top-k 301: it must be from 1 to the teacher's vocabulary of 300", {"top_k": 301}, [prose]),
        ("--draws 0", {"draws": 0}, [prose]),
        ("--top-p 1.5", {"top_p": 1.5}, [prose]),
        ("--temperature", {"temperature": 0}, [prose]),
        ("its draws are made at temperature 1", {"targets": "sampled", "temperature": 2}, [prose]),
        ("--mesh sideways=2", {"mesh": "sideways=2"}, [prose]),
        ("mesh.tensor = 8", {"mesh": "tensor=8,data=1"}, [prose]),
        ("there is no such file", {}, [tmp_path / "absent.txt"]),
        ("there is no such file; give the tokenizer", {"tokenizer": tmp_path}, [prose]),
    ]
    for message, options, texts in refused:
        with pytest.raises(UserError, match=message):
            build(teacher, tmp_path / "c", *texts, **options)
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Élan".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt: not UTF-8"):
        build(teacher, tmp_path / "c", latin)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no text holds two tokens"):
        build(teacher, tmp_path / "c", tmp_path / "empty.txt")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        build(teacher, tmp_path / "busy", prose)
    config = json.loads((teacher / "model_config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_config.json").write_text(json.dumps(config | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(UserError, match="the same ids mean different tokens"):
        build(other, tmp_path / "c", prose, tokenizer=teacher / "tokenizer")
