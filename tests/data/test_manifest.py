"""The manifest beside records: read, shown, and compared with the configuration and the records."""

import json

import pytest
from record_files import VOCAB, make_records, open_paths, open_records, write

from kdjax.types import UserError

RECORDS = make_records(29, 29, 7, 29, 29)


def manifest(tmp_path, **fields):
    (tmp_path / "manifest.json").write_text(json.dumps(fields))


def refused(tmp_path, **knobs) -> str:
    with pytest.raises(UserError) as caught:
        open_records(tmp_path, RECORDS, **knobs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fields", "knobs", "parts"),
    [
        ({"kind": "log_probs"}, {}, ["kind is 'log_probs'", "data.kind is 'logits'", "set data.kind=log_probs"]),
        ({"teacher_temperature": 2}, {}, ["is 2", "data.teacher_temperature is 1", "data.teacher_temperature=2"]),
        ({"top_k": 5}, {"top_k": 6}, ["top_k is 5", "data.top_k is 6", "at most 5"]),
        ({"vocab_size": VOCAB + 1}, {}, [str(VOCAB + 1), f"model.vocab_size is {VOCAB}", "cross_tokenizer=rank_match"]),
        ({"tokenizer_sha256": "ab"}, {"tokenizer_sha256": "cd"}, ["is ab", "is cd", "cross_tokenizer=rank_match"]),
        ({"top_k": "5"}, {}, ["top_k = '5' is a str; it must be int"]),
        ({"top_k": True}, {}, ["top_k = True is a bool; it must be int"]),
        ({"teacher_temperature": "2"}, {}, ["teacher_temperature = '2' is a str; it must be int or float"]),
        ({"teacher": 1}, {}, ["teacher = 1 is a int; it must be str"]),
    ],
)
def test_a_manifest_that_contradicts_the_configuration_is_refused(tmp_path, fields, knobs, parts):
    manifest(tmp_path, **fields)
    message = refused(tmp_path, **knobs)
    assert [part for part in parts if part not in message] == []
    assert message.startswith(f"{tmp_path}/manifest.json: ")


def test_a_temperature_is_not_applied_twice(tmp_path):
    message = refused(tmp_path, teacher_temperature=2.0, target_logits_scale=0.5)
    for part in ("loss.target_logits_scale = 0.5", "data.teacher_temperature = 2.0", "applied twice"):
        assert part in message
    open_records(tmp_path, RECORDS, teacher_temperature=2.0)
    open_records(tmp_path, RECORDS, target_logits_scale=0.5)


def test_a_manifest_that_agrees_is_shown(tmp_path):
    manifest(
        tmp_path,
        teacher="T-1B",
        license="MIT",
        kind="logits",
        teacher_temperature=2.0,
        vocab_size=VOCAB,
        tokenizer_sha256="ab",
        top_k=5,
        sequence_length=29,
        notes=["anything"],
    )
    dataset = open_records(tmp_path, RECORDS, teacher_temperature=2.0, tokenizer_sha256="ab", top_k=5)
    assert dataset.warnings == ()
    assert f"{tmp_path}/manifest.json: teacher T-1B, licence MIT" in dataset.summary()
    open_records(tmp_path, RECORDS, teacher_temperature=2.0)  # the student's tokenizer is not known


def test_fields_may_be_missing_or_null(tmp_path):
    manifest(tmp_path, teacher=None)
    dataset = open_records(tmp_path, RECORDS, tokenizer_sha256="ab", top_k=4)
    assert f"{tmp_path}/manifest.json: teacher not named, licence not stated" in dataset.summary()


def test_vocabulary_and_tokenizer_do_not_matter_if_ids_are_ignored(tmp_path):
    manifest(tmp_path, vocab_size=5000, tokenizer_sha256="ab")
    assert len(open_records(tmp_path, RECORDS, tokenizer_sha256="cd", ignore_teacher_ids=True)) == 5
    manifest(tmp_path, kind="probs")
    assert "kind is 'probs'" in refused(tmp_path, ignore_teacher_ids=True)


def test_records_with_more_than_the_manifest_says_give_a_warning(tmp_path):
    manifest(tmp_path, top_k=4, sequence_length=28)
    assert open_records(tmp_path, RECORDS).warnings == (
        f"{tmp_path}/manifest.json: top_k is 4, but records have 5",
        f"{tmp_path}/manifest.json: sequence_length is 28, but a record has 29 tokens",
    )
    manifest(tmp_path, top_k=6, sequence_length=30)
    assert open_records(tmp_path, RECORDS).warnings == ()


@pytest.mark.parametrize(("text", "part"), [("{", "not valid JSON"), ("[]", "holds a list; a manifest must be")])
def test_a_malformed_manifest_is_refused(tmp_path, text, part):
    (tmp_path / "manifest.json").write_text(text)
    message = refused(tmp_path)
    assert part in message
    assert "manifest.json" in message


def test_a_manifest_that_cannot_be_read_is_explained(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    assert "manifest.json: cannot read this manifest: Is a directory" in refused(tmp_path)


def test_the_manifest_of_every_directory_is_compared(tmp_path):
    for name, top_k in (("one", 3), ("two", 4)):
        (tmp_path / name).mkdir()
        manifest(tmp_path / name, top_k=top_k)
    paths = [write(tmp_path / name / "a.jsonl", RECORDS) for name in ("one", "two")]
    assert open_paths(tmp_path, *paths).warnings == tuple(
        f"{tmp_path / name}/manifest.json: top_k is {top_k}, but records have 5"
        for name, top_k in (("one", 3), ("two", 4))
    )
