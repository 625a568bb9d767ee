"""Training runs of Megatron GPTs under NeMo-Aligner's loss and torch's AdamW, reproduced step by step.

Through the real entry point: configs/parity_nemo.py, a converted checkpoint, `run`, and the metrics it writes.
"""

import functools
from pathlib import Path
from typing import Any

import compiled_steps
import jax
import megatron_goldens as megatron
import numpy as np
import pytest

from kdjax import config as configs
from kdjax import train
from kdjax.config import command_line
from kdjax.training import metrics

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parent.parent.parent / "configs" / "parity_nemo.py"
SETTINGS = ("token_fwd", "nemo_fwd", "token_bwd", "token_kdonly")


@pytest.fixture(autouse=True)
def _optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles train steps with LLVM's optimisations, without which some roundings differ more from Megatron's."""

    make = functools.partial(compiled_steps.optimised_train_step, top_k=8)
    monkeypatch.setattr(train, "make_train_step", make)


def history(variant: str, setting: str, workdir: Path, **changes: Any) -> list[dict[str, Any]]:
    golden = megatron.trajectory(variant)["runs"][setting]
    config = configs.replace(
        configs.build(command_line.load(CONFIG)),
        model__init_from=str(megatron.converted(variant)),
        data__train=(str(megatron.DATA / variant / "train_with_logits_0.jsonl"),),
        data__scratch_dir=str(workdir / "scratch"),
        batch__microbatch_size=golden["micro_batch_size"],
        loss__reduction=golden["reduction"],
        loss__kd_loss=golden["kd_loss"],
        loss__kd_loss_weight=golden["kd_loss_weight"],
        loss__sft_loss_weight=golden["sft_loss_weight"],
        loss__logits_scale=golden["logits_scale"],
        loss__target_logits_scale=golden["target_logits_scale"],
        mesh__data=1,
    )
    devices = changes.pop("devices", 1)
    config = configs.replace(config, mesh__data=-1, **changes)
    train.run(config, workdir / "run", devices=jax.devices()[:devices])
    return metrics.read(workdir / "run", "train")


def assert_same(found: list[dict[str, Any]], golden: list[dict[str, Any]], rtol: float = 5e-5) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in golden]
    for name in ("lr", "loss", "kd_loss", "sft_loss", "grad_norm"):
        ours, theirs = ([line[name] for line in lines] for lines in (found, golden))
        np.testing.assert_allclose(ours, theirs, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("variant", megatron.VARIANTS)
def test_every_step_of_every_setting(variant: str, setting: str, tmp_path: Path) -> None:
    golden = megatron.trajectory(variant)["runs"][setting]["history"]
    assert_same(history(variant, setting, tmp_path), golden)


@pytest.mark.parametrize(("devices", "microbatch_size"), [(1, 1), (1, 8), (2, 2), (8, 1)])
def test_token_reduction_whatever_the_split(devices: int, microbatch_size: int, tmp_path: Path) -> None:
    golden = megatron.trajectory("llamaish")["runs"]["token_fwd"]["history"]
    found = history("llamaish", "token_fwd", tmp_path, devices=devices, batch__microbatch_size=microbatch_size)
    assert_same(found, golden)


MESHES = {
    "data2-fsdp2-tensor2": {"mesh__fsdp": 2, "mesh__tensor": 2, "batch__microbatch_size": 2},
    "pipe2-data2-tensor2": {"mesh__pipe": 2, "mesh__tensor": 2, "batch__microbatch_size": 1},
}


@pytest.mark.parametrize("split", MESHES)
@pytest.mark.parametrize("variant", megatron.VARIANTS)
def test_on_a_mesh(variant: str, split: str, tmp_path: Path) -> None:
    """Rows, state, layers and the stack of them split in two each."""
    golden = megatron.trajectory(variant)["runs"]["token_fwd"]["history"]
    assert_same(history(variant, "token_fwd", tmp_path, devices=8, **MESHES[split]), golden)


@pytest.mark.parametrize("setting", ["nemo_fwd", "token_kdonly"])
def test_settings_through_a_pipeline(setting: str, tmp_path: Path) -> None:
    """Two runs of layers a stage; "nemo" counts microbatches, so they keep their size."""
    golden = megatron.trajectory("gpt2ish")["runs"][setting]["history"]
    split = {"mesh__pipe": 2, "mesh__interleave": 2, "mesh__tensor": 2}
    assert_same(history("gpt2ish", setting, tmp_path, devices=4, **split), golden)
