"""How several processes end: all of them, soon, and with each failure printed once with where it occurred."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, members, train, write_config

from kdjax.distributed.cluster import HANG_EXIT_CODE
from kdjax.distributed.failures import format_failures

pytestmark = pytest.mark.slow


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"\d\| error", line)]


def test_a_training_error_on_one_process_ends_both_with_its_message(tmp_path: Path) -> None:
    """Record 11 is process 1's in step 0, and damaged; the survey reads the first record only. Process 0 waits."""
    file = write_config(tmp_path, shuffle=False, verify_records=1, val=())
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    lines[10] = json.dumps(json.loads(lines[10]) | {"labels": [99] * len(json.loads(lines[10])["labels"])})
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    code, output = train(file, tmp_path / "run").end()
    assert code == 2, output
    (error,) = errors(output)
    assert re.match(r"0\| error on process 1 of 2: .*train.jsonl, record 11: labels\[1\] = 99 is outside", error)


def test_processes_with_different_records_do_not_start_and_xla_flags_are_set_in_time(tmp_path: Path) -> None:
    """The same path on two hosts, and process 1's copy lacks its last record. XLA reads its flags before that."""
    file = write_config(tmp_path, train="train.jsonl", val=())
    lines = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    for process, copied in enumerate((lines, lines[:-1])):
        (tmp_path / str(process)).mkdir()
        (tmp_path / str(process) / "train.jsonl").write_text("".join(copied))
    there = f"import os, sys\nos.chdir({str(tmp_path)!r} + '/' + sys.argv[sys.argv.index('--process') + 1])\n"
    file.write_text(there + file.read_text())
    code, output = train(file, tmp_path / "run", "--xla", "deterministic").end()
    assert code == 2, output
    (error,) = errors(output)
    assert error.startswith("0| error: process 1 of 2 differs from process 0 in the training records; start all")
    assert (
        "0| INFO: XLA flags of deterministic: --xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0\n" in output
    )


def test_processes_that_all_finish_exit_with_0() -> None:
    """Only process 0 prints. A slow one is waited for."""
    code, output = members((1, "time.sleep(1)")).end()
    assert code == 0, output
    assert "0| all there\n" in output
    assert "1| all there" not in output
    assert errors(output) == []


def test_an_exception_is_printed_once_with_its_traceback() -> None:
    code, output = members((0, "raise ValueError('seven')")).end()
    assert code == 1, output
    (error,) = errors(output)
    assert error == "0| error on process 0 of 2: Traceback (most recent call last):"
    assert re.search(r"^0\| ValueError: seven$", output, re.MULTILINE)
    assert output.count("seven") == 1


HANG = r"no progress for 1 s \(--step-timeout\) since the start\nin MainThread:\n"


@pytest.mark.parametrize("hangs", ["time.sleep(999)", "ctypes.PyDLL(None).sleep(999)"])
def test_a_process_that_hangs_ends_all_and_shows_where(hangs: str) -> None:
    """It still sends heartbeats. The first kind lets Python's other threads run, the second does not."""
    code, output = members((1, hangs), flags=("--step-timeout", "1")).end()
    assert code == (HANG_EXIT_CODE if hangs.startswith("time") else 1), output
    text = re.sub(r"^\d\| ", "", output, flags=re.MULTILINE)
    by_process = dict(re.findall(r"^error(.*?): (.*?)(?=^error|\Z)", text, re.MULTILINE | re.DOTALL))
    assert re.match(HANG, by_process[" on process 0 of 2"]), output
    assert "in from_process_zero" in by_process[" on process 0 of 2"]
    if hangs.startswith("time"):
        assert re.match(HANG, by_process.get(" on process 1 of 2", "")), output
        assert "in run_fault" in by_process[" on process 1 of 2"]
    else:
        assert by_process[""].startswith("no answer from process 1 of 2: killed or hanging"), output
        assert re.search(r"^Timeout \(.*most recent call first.* in run_fault", text, re.MULTILINE | re.DOTALL), output


def test_another_process_reports_where_process_0_hangs() -> None:
    """Process 1 fails while process 0 holds Python's lock, and so neither polls for failures nor acknowledges them."""
    code, output = members((0, "ctypes.PyDLL(None).sleep(999)"), (1, "raise ValueError('seven')")).end()
    assert code == 1, output
    assert re.search(r"^1\| error on process 1 of 2: Traceback .*ValueError: seven$", output, re.MULTILINE | re.DOTALL)
    assert "1| error: no answer from process 0 of 2: killed or hanging" in output


@pytest.mark.parametrize("launcher", ["slurm", "open mpi"])
def test_a_launchers_processes_join_and_print_a_shared_mistake_once(launcher: str, tmp_path: Path) -> None:
    """As `srun -n 2` and `mpirun -n 2` start them: without a flag. The port follows from the job's number."""
    job = next(job for job in range(os.getpid(), os.getpid() + 99) if is_free(61440 + job % 4096))
    command = [sys.executable, str(Path(__file__).parent / "member.py")]
    for process in "01":
        command += ["--fault", process, "raise UserError('no such file')"]
    running = []
    for process in "01":
        variables = {
            "slurm": {
                "SLURM_JOB_ID": str(job),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": process,
                "SLURM_LOCALID": process,
            },
            "open mpi": {
                "OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://127.0.0.1:1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": process,
                "OMPI_COMM_WORLD_LOCAL_RANK": process,
            },
        }[launcher]
        environment = os.environ | variables
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE))
    printed = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [2, 2], printed
    assert "\nerror: no such file\n" in "\n" + printed[0]
    assert "\nerror" not in "\n" + printed[1]  # JAX may log one of its own


def is_free(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) != 0


def test_failures_are_formatted_once_with_the_processes_they_occurred_on() -> None:
    assert format_failures({0: (2, "x"), 1: (2, "x")}, {0, 1}, 2) == "error: x"
    assert format_failures({1: (2, "x")}, {0, 1}, 2) == "error on process 1 of 2: x"
    assert format_failures({3: (2, "x"), 0: (2, "x"), 1: (1, "y")}, {0, 1, 2, 3}, 5).splitlines() == [
        "error on processes 0, 3 of 5: x",
        "error on process 1 of 5: y",
        "error: no answer from process 4 of 5: killed or hanging; this may have come first",
    ]
