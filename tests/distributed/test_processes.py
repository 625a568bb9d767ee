"""How several processes end: all of them, soon, and with one word of what went wrong and where."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from test_launch import Launched, write_config

from kdjax.distributed import processes
from kdjax.types import UserError


def test_an_error_on_one_process_ends_both_with_its_message(tmp_path: Path) -> None:
    """Record 11 is the second process's in step 0, and damaged; the survey reads the first record only."""
    file = write_config(tmp_path, shuffle=False, verify_records=1, val=())
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    lines[10] = json.dumps(json.loads(lines[10]) | {"labels": [99] * len(json.loads(lines[10])["labels"])})
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    code, output = Launched(file, tmp_path / "run").end()
    assert code == 2, output
    errors = [line for line in output.splitlines() if re.match(r"\d\| error", line)]
    assert len(errors) == 1, output
    assert re.match(r"0\| error on process 1 of 2: .*train.jsonl, record 11: labels\[1\] = 99 is outside", errors[0])


# At the end of a configuration file: what the second process, and no other, does before its first batch.
FAULT = """
import ctypes, os, pathlib, sys, time
if sys.argv[sys.argv.index("--process") + 1] == "1":
    def faulty(*args, real=sys.modules["__main__"].train_batches, **kwargs):
        {fault}
        return real(*args, **kwargs)
    sys.modules["__main__"].train_batches = faulty
"""


@pytest.mark.parametrize("fault", ["time.sleep(999)", "ctypes.PyDLL(None).sleep(999)"])
def test_a_process_that_hangs_ends_all_and_says_where(fault: str, tmp_path: Path) -> None:
    """Its heart goes on beating. The first kind lets Python's other threads run, the second does not."""
    file = write_config(tmp_path)
    file.write_text(file.read_text() + FAULT.format(fault=fault))
    code, output = Launched(file, tmp_path / "run", "--step-timeout", "5").end()
    assert code == (processes.HUNG if fault.startswith("time") else 1), output
    text = re.sub(r"^\d\| ", "", output, flags=re.MULTILINE)
    errors = dict(re.findall(r"^error(.*?): (.*?)(?=^error|\Z)", text, re.MULTILINE | re.DOTALL))
    assert " on process 0 of 2" in errors, output
    said = r"nothing has moved for 5 s \(--step-timeout\) since the (start|dispatch of step 0)\nin MainThread:\n"
    assert re.match(said, errors[" on process 0 of 2"]), output
    assert "train_step(state, batch)" in errors[" on process 0 of 2"]
    if fault.startswith("time"):
        assert re.match(said, errors.get(" on process 1 of 2", "")), output
        assert "in faulty" in errors[" on process 1 of 2"]
    else:
        assert errors[""].startswith("no answer from process 1 of 2: killed, or hanging"), output
        assert re.search(r"^Timeout \(.*most recent call first.* in faulty", text, re.MULTILINE | re.DOTALL), output


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("pathlib.Path({train!r}).open('r+').truncate(300)", r", record \d+: not valid JSON"),
        ("os.pread = lambda *a: os.read(-1, 1)", ", record .*: cannot read this record: Bad file descriptor; check"),
    ],
)
def test_records_that_only_one_process_cannot_read_any_more_end_both(fault: str, said: str, tmp_path: Path) -> None:
    """The other waits for it in a step by then. The records were well when the run began."""
    file, train_file = write_config(tmp_path, shuffle=False, val=()), str(tmp_path / "train.jsonl")
    file.write_text(file.read_text() + FAULT.format(fault=fault.format(train=train_file)))
    code, output = Launched(file, tmp_path / "run").end()
    assert code == 2, output
    errors = [line for line in output.splitlines() if re.match(r"\d\| error", line)]
    assert len(errors) == 1, output
    assert re.match(rf"0\| error on process 1 of 2: {train_file}{said}", errors[0]), output


@pytest.mark.slow
def test_another_speaks_for_a_first_process_that_hangs(tmp_path: Path) -> None:
    """The second fails while the first holds Python, and so neither looks for failures nor answers."""
    file = write_config(tmp_path, shuffle=False, val=())
    faults = [FAULT.format(fault="ctypes.PyDLL(None).sleep(999)").replace('"1"', '"0"')]
    faults += [FAULT.format(fault="raise ValueError('seven')")]
    file.write_text(file.read_text() + "".join(faults))
    code, output = Launched(file, tmp_path / "run").end()
    assert code == 1, output
    assert re.search(r"^1\| error on process 1 of 2: Traceback .*ValueError: seven$", output, re.MULTILINE | re.DOTALL)
    assert "1| error: no answer from process 0 of 2: killed, or hanging" in output


def test_flags_of_xla_are_set_before_it_reads_them(tmp_path: Path) -> None:
    """Through the command line; the mistake ends the run once JAX knows its devices."""
    run = Launched(write_config(tmp_path), tmp_path / "run", "--xla", "deterministic", "--config.mesh.data=3")
    code, output = run.end()
    assert code == 2, output
    assert (
        "0| INFO: XLA flags of deterministic: --xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0\n" in output
    )
    assert re.search(r"^0\| error: .*mesh", output, re.MULTILINE), output


def test_processes_whose_copies_of_the_records_differ_do_not_start(tmp_path: Path) -> None:
    """The same path on two hosts, and the second's copy lacks its last record."""
    file = write_config(tmp_path, train="train.jsonl", val=())
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    for number, copied in enumerate((lines, lines[:-1])):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "train.jsonl").write_text("".join(copied))
    there = f"import os, sys\nos.chdir({str(tmp_path)!r} + '/' + sys.argv[sys.argv.index('--process') + 1])\n"
    file.write_text(there + file.read_text())
    code, output = Launched(file, tmp_path / "run").end()
    assert code == 2, output
    assert "0| error: process 1 of 2 differ from process 0 in the training records; give all" in output


def test_failures_are_told_once_with_those_they_happened_on() -> None:
    told = processes._told
    assert told({0: (2, "x"), 1: (2, "x")}, {0, 1}, 2) == "error: x"
    assert told({1: (2, "x")}, {0, 1}, 2) == "error on process 1 of 2: x"
    assert told({3: (2, "x"), 0: (2, "x"), 1: (1, "y")}, {0, 1, 2, 3}, 5).splitlines() == [
        "error on processes 0, 3 of 5: x",
        "error on process 1 of 5: y",
        "error: no answer from process 4 of 5: killed, or hanging; it may have failed first",
    ]


def test_processes_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third process of four read other records."""

    def gather(mine_2x16: np.ndarray) -> np.ndarray:
        digests_4x2x16 = np.stack([mine_2x16] * 4)
        digests_4x2x16[2, 1, 7] ^= 1
        return digests_4x2x16

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    with pytest.raises(UserError, match=r"process 2 of 4 differ from process 0 in the training records; give all"):
        processes.require_same({"the configuration": "a", "the training records": "b"})
