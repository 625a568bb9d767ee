"""The README is true: its commands exist, its links resolve, the output it shows is what the program prints."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import compiled_steps
import numpy as np
import pytest
import toy_problem as toy
from test_layers import LAYERS

from kdjax import cli, train
from kdjax import config as configs
from kdjax.config import command_line
from kdjax.training import metrics

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.py"
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def test_links_resolve() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_commands_exist() -> None:
    commands = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.strip()]
    assert any("scripts/quickstart.sh" in command for command in commands)
    assert any("scripts/test.sh" in command for command in commands)
    for command in commands:
        for word in re.findall(r"(?:scripts|configs)/[\w./]+", command):
            assert (ROOT / word).exists(), word
        for module in re.findall(r"-m (kdjax\.\w+)", command):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
        for key in re.findall(r"--config\.([\w.]+)", command):
            assert key in configs.KNOBS, key
        for name in re.findall(r"^kdjax (\w+)", command):
            assert name in cli.COMMANDS, name
        for recipe in re.findall(r"--config (\w+)", command):
            assert recipe in command_line.recipes(), recipe


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_files_that_pages_name_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (page.parent / link).exists(), link
    for name in re.findall(r"(?<![\w/])((?:kdjax|tests|scripts|configs|docs|data)/[\w./]*\w)", text):
        assert (ROOT / name).exists(), name


def test_the_layers_that_contributing_lists_are_those_of_the_test() -> None:
    rows = re.findall(r"^ *\| \d+ \| ([^|]+) \|", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    listed = [name.rstrip("/") for row in reversed(rows) for name in reversed(re.findall(r"`([\w/]+)`", row))]
    assert listed == [name for name in LAYERS if name != "kdjax"]


def test_named_knobs_and_choices_exist() -> None:
    for key in re.findall(r"`((?:" + "|".join(vars(configs.Config())) + r")\.\w+)", README):
        assert key in configs.KNOBS, key
    for key, value in re.findall(r"`((?:\w+)\.(?:\w+)) = \"(\w+)\"`", README):
        assert value in (configs.KNOBS[key].choices or ()), (key, value)


def test_python_blocks_run() -> None:
    blocks = [text for kind, text in BLOCKS if kind == "python"]
    assert blocks
    for text in blocks:
        exec(compile(text, "README.md", "exec"), {})


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Its run directory and what it prints, on one device, as a user has it."""
    workdir = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "kdjax.train", "--config", str(QUICKSTART), "--workdir", str(workdir)]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True, timeout=600)
    return workdir, done.stdout.splitlines()


@pytest.mark.slow
def test_quickstart_prints_what_the_readme_shows(quickstart: tuple[Path, list[str]]) -> None:
    """Every line of the README's quickstart output but the times, to two digits; and the promised end."""
    shown = next(text for kind, text in BLOCKS if kind == "text" and "validation" in text)
    _, printed = quickstart
    for line in shown.splitlines():
        if "validation" in line:
            step = line.split()[1]
            same = next(other for other in printed if other.split()[:2] == ["step", step] and "validation" in other)
            for name in ("loss", "kd_loss", "sft_loss"):
                ours, theirs = (float(re.search(rf"\b{name} ([\d.]+)", x)[1]) for x in (same, line))
                assert ours == pytest.approx(theirs, rel=0.02), (line, same)
        elif not re.search(r"step \d+/|workdir|checkpoints are in|…", line):
            assert line in printed, line
    last = [line for line in printed if "validation" in line][-1]
    assert float(re.search(r"sft_loss ([\d.]+)", last)[1]) < 6.7


@pytest.mark.slow
def test_a_mesh_learns_what_one_device_learns(
    quickstart: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quickstart's first 50 steps on pipe 2 x data 2 x tensor 2."""
    make = functools.partial(compiled_steps.optimised_train_step, top_k=16)
    monkeypatch.setattr(train, "make_train_step", make)
    steps, workdir = 50, tmp_path / "run"
    mesh = {"mesh__pipe": 2, "mesh__data": 2, "mesh__tensor": 2, "batch__microbatch_size": 2}
    config = configs.replace(
        configs.build(command_line.load(QUICKSTART)), **mesh, data__scratch_dir=str(tmp_path / "scratch")
    )
    assert train.run(config, workdir, toy.StopAfter(steps - 1)).ended == "interrupted"
    for split, lines in (("train", steps), ("val", 2)):
        one, on_mesh = (metrics.read(directory, split)[:lines] for directory in (quickstart[0], workdir))
        assert len(on_mesh) == lines
        for name in ("loss", "kd_loss", "sft_loss"):
            ours, expected = ([line[name] for line in history] for history in (on_mesh, one))
            np.testing.assert_allclose(ours, expected, rtol=1e-3, err_msg=f"{split} {name}")
    assert one[-1]["sft_loss"] < one[0]["sft_loss"] - 3
