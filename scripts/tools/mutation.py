"""Makes small faults in kdjax, one at a time, and reports those that no test notices.

    python scripts/tools/mutation.py [PACKAGE ...]      a sample of each package, about 40 minutes on two cores
    python scripts/tools/mutation.py data --sample 0    every mutant of kdjax/data

A mutant is the code with one fault (mutants.py); it is killed when a test fails. Each worker mutates its own copy of
the repository. For each mutant it runs the tests that execute the changed statement, then those that execute its
module, fastest first, until one fails. An interrupted run resumes; survivors are tried again when the package or its
tests have changed. Needs `pip install -e '.[dev,mutation]'`. Results: docs/mutation.md.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import coverage
import pytest
from mutants import Mutant, sample

from kdjax.cli import Progress

ROOT = Path(__file__).parents[2]
TESTS = {  # package: the tests that must notice its mutants
    "losses": ["tests/losses"],
    "data": ["tests/data"],
    "training": ["tests/training", "tests/parallel", "tests/test_train.py"],
    "checkpoint": ["tests/checkpoint"],
    "convert": ["tests/convert"],
}
PYTEST = ["-p", "no:cacheprovider", "--hypothesis-seed=0"]
LIMIT_S = 60  # a mutant gets as many tests as run in this time on unchanged code,
TIMEOUT_S, SLOWER = 60, 4  # and times out after this and so many times the time of those tests
MEMORY = 12 << 30  # bytes that a test run may allocate
REQUIRED = 0.9  # share of a package's mutants that its tests must kill
SERIAL = itertools.count(1)


class Recorder:
    """A pytest plugin that records which lines each test executes and how long it takes."""

    def __init__(self, measured: coverage.Coverage):
        self.seconds: dict[str, float] = defaultdict(float)
        self._measured = measured

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._measured.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration


def record(package: str, output: Path) -> int:
    """Runs the package's tests on the unchanged copy that is the working directory; writes what they execute."""
    measured = coverage.Coverage(data_file=None, source=[f"kdjax/{package}"])
    recorder = Recorder(measured)
    with measured.collect():
        status = pytest.main([*PYTEST, "-W", "ignore:Module already imported", *TESTS[package]], plugins=[recorder])
    data = measured.get_data()
    lines = {os.path.relpath(file): data.contexts_by_lineno(file) for file in data.measured_files()}
    output.write_text(json.dumps({"seconds": recorder.seconds, "lines": lines}))
    return int(status)


def tests_for(mutant: Mutant, baseline: dict[str, Any]) -> tuple[list[str], float]:
    """Returns the tests to run, in order (those of the statement, then those of the module), and their seconds."""
    seconds, lines = baseline["seconds"], baseline["lines"].get(mutant.module, {})
    nearest = {test for line in mutant.lines for test in lines.get(str(line), ())}
    usable = {test for tests in lines.values() for test in tests if test}
    chosen: list[str] = []
    total = 0.0
    for test in sorted(usable, key=lambda test: (test not in nearest, seconds[test])):
        if not chosen or total + seconds[test] <= LIMIT_S:
            chosen.append(test)
            total += seconds[test]
    return chosen, total


def run(copy: Path, *command: str, timeout_s: float | None = None) -> int:
    """Runs Python in a copy of the repository, without output, and returns its exit status."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def borrowed(copies: queue.Queue[Path]) -> Iterator[Path]:
    """Waits for a copy of the repository that nobody uses, and gives it back."""
    copy = copies.get()
    try:
        yield copy
    finally:
        copies.put(copy)


def measure(package: str, kept: Path, copies: queue.Queue[Path]) -> dict[str, Any]:
    """Returns what `record` finds, after a second run has shown that the tests pass when run by name, fastest first."""
    if not kept.exists():
        new = kept.with_suffix(".new")
        with borrowed(copies) as copy:
            failed = run(copy, __file__, package, "--record", str(new))
            if not failed:
                seconds = json.loads(new.read_text())["seconds"]
                failed = run(copy, "-m", "pytest", *PYTEST, *sorted(seconds, key=lambda test: seconds[test]))
        if failed:
            sys.exit(f"error: {package}: {' '.join(TESTS[package])} fail on unchanged code")
        new.rename(kept)
    return dict(json.loads(kept.read_text()))


def outcome(mutant: Mutant, baseline: dict[str, Any], copies: queue.Queue[Path]) -> str:
    """Returns "killed", "survived" or "timeout" (which counts as killed)."""
    tests, seconds = tests_for(mutant, baseline)
    if not tests:
        return "survived"
    with borrowed(copies) as copy:
        module = copy / mutant.module
        original = module.read_text()
        module.write_text(mutant.code)
        os.utime(module, (next(SERIAL),) * 2)  # Python keeps compiled modules by size and whole seconds
        try:
            failed = run(copy, "-m", "pytest", "-x", *PYTEST, *tests, timeout_s=TIMEOUT_S + SLOWER * seconds)
            return "killed" if failed else "survived"
        except subprocess.TimeoutExpired:
            return "timeout"
        finally:
            module.write_text(original)


def copy_repository(work: Path, number: int) -> Path:
    """Copies what git would track to a directory of `work`; the copies share JAX's compiled programs."""
    copy = work / f"copy{number}"
    shutil.rmtree(copy, ignore_errors=True)
    listed = subprocess.check_output(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, text=True)
    for name in listed.split("\0")[:-1]:
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (work / "jax").mkdir(exist_ok=True)
    (copy / ".pytest_cache").mkdir()
    (copy / ".pytest_cache" / "jax").symlink_to(work / "jax")
    return copy


def digest(root: Path, package: str) -> str:
    """Returns a hash of the package and of its tests."""
    folders = [root / "kdjax" / package, *(root / tests for tests in TESTS[package])]
    files = {*(root / "tests").glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))}
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(files))).hexdigest()


def read_ledger(ledger: Path, versions: Collection[str]) -> dict[str, str]:
    """Returns the outcomes known by key; survivors of other versions of package and tests are not known."""
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    found = [json.loads(line) for line in lines]
    return {key: result for key, result, version in found if result != "survived" or version in versions}


def try_packages(packages: Sequence[str], args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Tries a sample of each package's mutants; returns their outcomes by package and key. args.work keeps outcomes."""
    copies: queue.Queue[Path] = queue.Queue()
    for number in range(args.workers):
        copies.put(root := copy_repository(args.work, number))
    versions, ledger = {package: digest(root, package) for package in packages}, args.work / "outcomes.jsonl"
    known = read_ledger(ledger, versions.values())
    chosen = {package: sample(root, package, args.sample, args.seed) for package in packages}
    waiting = {package: [m for m in found if m.key not in known] for package, found in chosen.items()}
    with ThreadPoolExecutor(args.workers) as pool:
        try:
            print(f"running the tests of {', '.join(packages)} on unchanged code", flush=True)
            pending = {
                p: pool.submit(measure, p, args.work / f"{versions[p]}.json", copies) for p in packages if waiting[p]
            }
            baselines = {package: future.result() for package, future in pending.items()}
            running = {pool.submit(outcome, m, baselines[p], copies): (p, m) for p in baselines for m in waiting[p]}
            with Progress("mutants", len(running), "mutant") as progress, ledger.open("a") as file:
                for future in as_completed(running):
                    package, mutant = running[future]
                    known[mutant.key] = future.result()
                    print(json.dumps([mutant.key, future.result(), versions[package]]), file=file, flush=True)
                    progress.add(1, f"{package}: {future.result()}")
        finally:
            pool.shutdown(cancel_futures=True)
    return {package: {mutant.key: known[mutant.key] for mutant in found} for package, found in chosen.items()}


def report(results: dict[str, dict[str, str]]) -> bool:
    """Prints a table of outcomes and the survivors; returns whether enough mutants of every package were killed."""
    enough, explained = True, (ROOT / "docs" / "mutation.md").read_text()
    print("| package | mutants | killed | survived | timeout | noticed |\n|---|---|---|---|---|---|")
    for package, outcomes in results.items():
        killed, survived, timeout = (list(outcomes.values()).count(x) for x in ("killed", "survived", "timeout"))
        share = 1 - survived / len(outcomes)
        enough &= share >= REQUIRED
        print(f"| {package} | {len(outcomes)} | {killed} | {survived} | {timeout} | {share:.0%} |")
    for key in [key for outcomes in results.values() for key, result in outcomes.items() if result == "survived"]:
        print(f"\n{key}" + ("  (docs/mutation.md says why)" if key in explained else ""))
    return enough


def main() -> int:
    """Tries mutants of the packages; returns 0 if enough of them were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", metavar="PACKAGE", nargs="*", choices=[*TESTS, []], help=f"of {', '.join(TESTS)}")
    parser.add_argument("--sample", type=int, default=80, help="mutants of each package; 0: all of them")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other mutants")
    parser.add_argument("--workers", type=int, default=2, help="test runs at the same time")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir(), "kdjax-mutation"), help="for copies and outcomes"
    )
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.record:
        return record(args.packages[0], args.record)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    return 0 if report(try_packages(args.packages or [*TESTS], args)) else 1


if __name__ == "__main__":
    sys.exit(main())
