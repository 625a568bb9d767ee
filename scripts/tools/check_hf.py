"""Checks that transformers loads what `to-hf` writes, with no missing or unexpected key, and computes kdjax's logits.

    python scripts/tools/check_hf.py --torch-python ~/torch/bin/python [MODEL ...]

Converts the tests' checkpoints of each family to kdjax and back, and models that never were Hugging Face checkpoints,
as students trained from scratch; MODEL adds model or run directories. --torch-python has torch and transformers.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from kdjax.checkpoint import load_model, save_model
from kdjax.config import ModelConfig
from kdjax.convert.__main__ import main as convert
from kdjax.model import init_params

HERE = Path(__file__).parent
GOLDENS = HERE.parents[1] / "tests" / "fixtures" / "hf"
TOLERANCE = 2e-5  # kdjax in float32 against transformers in float64; transformers in float32 differs as much
RELATIVE = 5e-6  # of the largest logit, if that allows more: real models have logits of tens
OWN = {
    "llama3 rope, wide heads, padded vocabulary": ModelConfig(
        n_groups=2, head_dim=10, rope_llama3=(8.0, 1.0, 4.0, 16.0), padded_vocab_size=128, tied=False
    ),
    "biases everywhere": ModelConfig(bias=True, rope_theta=3e4),
    "qkv biases, linear rope": ModelConfig(qkv_bias=True, rope_linear_factor=3.0, n_groups=2),
    "qk norms": ModelConfig(qk_norm=True, n_groups=1, head_dim=10, norm_eps=1e-4),
    "gpt-2, exact gelu, untied": ModelConfig(
        position="learned", max_positions=37, norm="layernorm", activation="gelu", bias=True, tied=False
    ),
}
SHAPE = {"layers": 3, "d_model": 24, "n_heads": 4, "d_ff": 37, "vocab_size": 101, "init_std": 0.2, "dtype": "float32"}


def models(work: Path) -> dict[str, Path]:
    """Returns model directories by description: the families' goldens and kdjax's own models."""
    found = {}
    for golden in sorted(GOLDENS.iterdir()):
        found[golden.name] = work / "models" / golden.name
        convert(["from-hf", str(golden), str(found[golden.name])])
    for number, (name, config) in enumerate(OWN.items()):
        config = ModelConfig(**{**config.__dict__, **SHAPE})
        found[name] = work / "models" / f"own{number}"
        params = jax.tree.map(lambda x: x + 0.05, init_params(config, number))  # no bias is 0, no scale is 1
        save_model(found[name], config, params)
    return found


def main() -> int:
    """Converts the models and compares their logits; returns 0 if every difference is within the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", metavar="MODEL", nargs="*", type=Path, help="model or run directories to check too")
    parser.add_argument(
        "--torch-python", default=sys.executable, metavar="PYTHON", help="interpreter with transformers"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = models(Path(work)) | {str(path): path for path in arguments.models}
        exported = {name: Path(work) / "exported" / str(number) for number, name in enumerate(found)}
        for name, path in found.items():
            convert(["to-hf", str(path), str(exported[name]), *(["--max-positions=64"] if name in OWN else [])])
            ids = np.random.default_rng(0).integers(0, 101, (2, 31), np.int32)
            np.save(exported[name] / "input_ids.npy", ids)
        command = [arguments.torch_python, str(HERE / "hf_logits.py"), *map(str, exported.values())]
        subprocess.run(command, check=True)
        within = True
        print(f"\n{'model':<44}  largest logit  largest difference")
        for name, path in found.items():
            theirs = np.load(exported[name] / "logits.npy")
            mine = np.asarray(load_model(path)(np.load(exported[name] / "input_ids.npy")))
            apart = float(np.abs(mine - theirs).max()) if mine.shape == theirs.shape else float("inf")
            largest = float(np.abs(theirs).max())
            within = within and apart <= max(TOLERANCE, RELATIVE * largest)
            print(f"{name:<44}  {largest:>13.2f}  {apart:>18.2e}")
    print(f"{'all' if within else 'NOT ALL'} within {TOLERANCE:g}, or {RELATIVE:g} of the largest logit")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
