"""The wheel, built from a source distribution: it holds the package, the recipes and the records, and it trains."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import kdjax
from kdjax.training import metrics

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "data" / "smollm2_topk"


def build(kind: str, source: Path, out: Path) -> Path:
    """Builds an "sdist" or a "wheel" in `out`, as pip would, with this environment's setuptools; returns its path."""
    hook = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    out.mkdir()
    subprocess.run(
        [sys.executable, "-W", "error", "-c", hook, out], cwd=source, capture_output=True, text=True, check=True
    )
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source distribution of a copy of this checkout, because setuptools writes beside its sources."""
    tmp = tmp_path_factory.mktemp("wheel")
    checkout = tmp / "checkout"
    for name in ("kdjax", "configs", "data", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    sdist = build("sdist", checkout, tmp / "sdist")
    shutil.unpack_archive(sdist, tmp / "unpacked", filter="data")
    (source,) = (tmp / "unpacked").iterdir()
    assert not (source / "tests").exists()
    return build("wheel", source, tmp / "dist")


def test_holds_the_package_the_recipes_and_the_records(wheel: Path) -> None:
    package = [*(ROOT / "kdjax").rglob("*.py"), ROOT / "kdjax" / "py.typed"]
    expected = {str(path.relative_to(ROOT)) for path in package}
    expected |= {f"kdjax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    expected |= {f"kdjax/data/smollm2_topk/{path.name}" for path in RECORDS.iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names - expected == set()
        assert expected - names == set(), "a package that [tool.setuptools] in pyproject.toml does not list?"
        for path in RECORDS.iterdir():
            assert archive.read(f"kdjax/data/smollm2_topk/{path.name}") == path.read_bytes()


def test_metadata(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"kdjax-{kdjax.__version__}.dist-info"
        assert "kdjax = kdjax.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        lines = archive.read(f"{info}/METADATA").decode().splitlines()
    assert f"Version: {kdjax.__version__}" in lines
    assert "Requires-Dist: jax<0.13,>=0.10.2" in lines


@pytest.mark.slow
def test_trains_the_quickstart_in_an_empty_directory(wheel: Path, tmp_path: Path) -> None:
    """With what the wheel installs on PYTHONPATH, by the console script's function and the recipe's name."""
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    shutil.unpack_archive(wheel, installed, format="zip")
    empty.mkdir()
    small = {
        "model.layers": 1,
        "data.val": "",  # no validation
        "data.scratch_dir": tmp_path / "scratch",
        "optim.warmup_steps": 1,
        "train.steps": 2,
    }
    arguments = ["train", "--config", "quickstart", "--workdir", "run"]
    arguments += [f"--config.{name}={value}" for name, value in small.items()]
    # One device, as users have it, and quick compilation.
    environment = os.environ | {"PYTHONPATH": str(installed), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-c", "from kdjax.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in empty.iterdir()] == ["run"]
    config = json.loads((empty / "run" / "config.json").read_text())
    records = installed / "kdjax" / "data" / "smollm2_topk"
    assert config["data"]["train"] == [str(records / "train_with_logits_0.jsonl.gz")]
    first, second = metrics.read(empty / "run", "train")
    assert first["sft_loss"] == pytest.approx(10.8, abs=0.1)  # ln 49152: nothing is learned yet
    assert second["loss"] < first["loss"]
