"""Checks that Megatron-Core loads what `to-megatron` writes, finds every key, and computes the same logits on a CPU.

    python scripts/tools/check_megatron.py [--megatron-python ~/megatron/bin/python] [MODEL ...]

Converts the tests' checkpoints, which Megatron-Core wrote, to kdjax and back. Compares them with Megatron's recorded
logits and, at tensor and pipeline parallel 2, with the tensors that Megatron wrote on each rank. Models that never were
Megatron checkpoints, one for each way of stating an architecture, and MODEL are compared with kdjax's own logits.
Without --megatron-python, an environment with Megatron-Core and torch is created once in ~/.cache/kdjax (1 GB).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax.checkpoint import load_model, read_model_config, save_model
from kdjax.config import ModelConfig
from kdjax.convert.__main__ import main as convert
from kdjax.model import init_params

HERE = Path(__file__).parent
ARCHIVES = HERE.parents[1] / "tests" / "fixtures" / "megatron"
MEGATRON = "megatron-core==0.16.1"
PACKAGES = ("torch", "psutil", "six", "pyyaml", "pydantic", "triton")  # it imports them, though it declares not all
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"  # builds without CUDA
TOLERANCE = 2e-5
GOLDENS = (
    ("gpt2ish", "torch_dist_tp1pp1", "golden_tp1pp1"),
    ("gpt2ish", "torch_tp2pp2", "golden_tp2pp2"),
    ("llamaish", "torch_dist_tp1pp1", "golden_tp1pp1"),
    ("llamaish", "torch_dist_tp1pp1_bf16_release", "golden_tp1pp1"),
    ("llamaish", "legacy_tp2_fastswiglu.nemo", "golden_tp1pp1"),
)
RANKS = "torch_tp2pp2/iter_0000100"  # the tensors of each of four ranks, as Megatron wrote them
LEARNED: dict[str, Any] = {"position": "learned", "max_positions": 40, "norm": "layernorm"}
OWN: dict[str, dict[str, Any]] = {
    "llama3 rope, wide heads, padded": {
        "n_groups": 2,
        "head_dim": 10,
        "rope_llama3": (8.0, 1.0, 4.0, 8192.0),
        "padded_vocab_size": 128,
        "tied": False,
    },
    "qkv biases, linear and partial rope": {"qkv_bias": True, "rope_linear_factor": 3.0, "rope_fraction": 0.5},
    "norms of queries and keys": {"qk_norm": True, "n_groups": 1, "norm_eps": 1e-4, "rope_theta": 1e6},
    "learned positions, tanh gelu, untied": {**LEARNED, "activation": "gelu_tanh", "bias": True, "tied": False},
    "learned positions, exact gelu, no bias": {**LEARNED, "activation": "gelu"},
    "squared relu": {"norm": "layernorm", "activation": "squared_relu"},
    "swiglu with biases": {"bias": True},
}
SHAPE: dict[str, Any] = {
    "layers": 3,
    "d_model": 32,
    "n_heads": 4,
    "d_ff": 38,
    "vocab_size": 101,
    "init_std": 0.2,
    "dtype": "float32",
}


def environment() -> str:
    """Returns the interpreter of an environment with Megatron-Core, which is created if it is missing."""
    directory = Path("~/.cache/kdjax/megatron-core-0.16.1").expanduser()
    python, ready = directory / "bin" / "python", directory / "ready"
    if not ready.exists():
        print(f"creating {directory} (a few minutes)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "--extra-index-url", TORCH_INDEX, MEGATRON, *PACKAGES], check=True)
        ready.touch()
    return str(python)


def cases(work: Path, models: list[Path]) -> Iterator[tuple[str, Path, np.ndarray, np.ndarray]]:
    """Yields each model's name and directory, input ids, and the logits to expect, padded columns included."""
    for variant in {variant for variant, _, _ in GOLDENS}:
        shutil.unpack_archive(ARCHIVES / f"{variant}.tar.xz", work, filter="data")
    for number, (variant, checkpoint, golden) in enumerate(GOLDENS):
        path = work / f"golden{number}"
        convert(["from-megatron", str(work / variant / checkpoint), str(path)])
        found = np.load(work / variant / f"{golden}.npz")
        yield f"{variant} {checkpoint}", path, found["input_ids"], found["logits"]
    for number, (name, changes) in enumerate(OWN.items()):
        config, path = ModelConfig(**SHAPE | changes), work / f"own{number}"
        params = jax.tree.map(lambda x: x + 0.05, init_params(config, number))  # no bias is 0, no scale is 1
        save_model(path, config, params)
        yield name, path, *own(path)
    for path in models:
        yield str(path), path, *own(path)


def own(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns random input ids and kdjax's logits for them."""
    ids_BxT = np.random.default_rng(0).integers(0, read_model_config(path).vocab_size, (2, 31), np.int32)
    return ids_BxT, np.asarray(load_model(path)(jnp.asarray(ids_BxT)))


def run_peer(python: str, script: str, *paths: Path) -> None:
    """Runs a script of this directory where Megatron-Core is. Raises CalledProcessError if it fails."""
    command = [python, "-W", "ignore", str(HERE / script), *map(str, paths)]
    subprocess.run(command, check=True, env=os.environ | {"TORCHDYNAMO_DISABLE": "1"})


def main() -> int:
    """Converts the models and compares their logits; returns 0 if every difference is within the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="*", type=Path, help="model or run directories to check too")
    parser.add_argument("--megatron-python", metavar="PYTHON", help="an interpreter with megatron-core and torch")
    arguments = parser.parse_args()
    python = arguments.megatron_python or environment()
    with tempfile.TemporaryDirectory() as work:
        expected = {}
        for number, (name, model, ids_BxT, logits_BxTxV) in enumerate(cases(Path(work), arguments.models)):
            out = Path(work) / "exported" / str(number)
            convert(["to-megatron", str(model), str(out)])
            np.save(out / "input_ids.npy", ids_BxT)
            expected[name] = out, logits_BxTxV
        run_peer(python, "megatron_logits.py", *(out for out, _ in expected.values()))
        for variant in ("gpt2ish", "llamaish"):
            run_peer(
                python,
                "megatron_ranks.py",
                expected[f"{variant} torch_dist_tp1pp1"][0],
                Path(work) / variant / RANKS,
            )
        print(f"\n{'model':<44}  largest logit  largest difference")
        worst = 0.0
        for name, (out, logits_BxTxV) in expected.items():
            found_BxTxV = np.load(out / "logits.npy")[..., : logits_BxTxV.shape[-1]]
            apart = float(np.abs(found_BxTxV - logits_BxTxV).max())
            print(f"{name:<44}  {np.abs(logits_BxTxV).max():>13.2f}  {apart:>18.2e}")
            worst = max(worst, apart) if np.isfinite(apart) else float("inf")
    print(f"{'all' if worst <= TOLERANCE else 'NOT ALL'} within {TOLERANCE:g}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
