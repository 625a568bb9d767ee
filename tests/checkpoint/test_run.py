"""A run's steps: saved, restored into any sharding, and passed over when they are damaged."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.checkpoint import RunCheckpoints
from kdjax.checkpoint.arrays import open_arrays
from kdjax.config import Config
from kdjax.distributed import consensus
from kdjax.training.state import TrainState
from kdjax.types import UserError


def state(step: int, sharding: jax.sharding.Sharding | None = None) -> TrainState:
    """A state of eight rows that differs from step to step."""
    rows = jnp.arange(24.0).reshape(8, 3) + step
    layers = {"layers": {"w": jnp.stack([rows, -rows])}, "embed": rows}
    return jax.device_put(TrainState(jnp.int32(step), layers, {"m": rows / 7}), sharding)


@pytest.fixture
def saved(tmp_path: Path) -> RunCheckpoints:
    """Steps 3 and 5, of which nothing is deleted."""
    checkpoints = RunCheckpoints(tmp_path, Config())
    for step in (3, 5):
        checkpoints.save(state(step), {"data": f"records of {step}"}, None)
    checkpoints.wait()
    return checkpoints


def damage(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def test_a_new_run_has_nothing_to_restore(tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(tmp_path, Config())
    assert checkpoints.latest_step() is None
    assert checkpoints.restore(state(0)) is None


def test_the_newest_step_is_restored_with_its_meta(saved: RunCheckpoints) -> None:
    assert saved.latest_step() == 5
    found, meta = saved.restore(state(0))
    jax.tree.map(np.testing.assert_array_equal, found, state(5))
    assert jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, found, state(5)))
    assert meta == {"data": "records of 5"}


def test_a_later_run_restores_into_its_own_shardings(saved: RunCheckpoints, tmp_path: Path) -> None:
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    like = TrainState(jnp.int32(0), {"layers": {"w": jnp.zeros((2, 8, 3))}, "embed": jnp.zeros((8, 3))}, {"m": 0})
    shardings = TrainState(everywhere, {"layers": {"w": everywhere}, "embed": rows}, {"m": rows})
    like = jax.device_put(TrainState(like.step, like.params, {"m": jnp.zeros((8, 3))}), shardings)
    found, _ = RunCheckpoints(tmp_path, Config()).restore(like)
    jax.tree.map(np.testing.assert_array_equal, found, state(5))
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == shardings


def test_a_damaged_step_is_passed_over_and_kept(
    saved: RunCheckpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(tmp_path / "checkpoints" / "5" / "params")
    with caplog.at_level(logging.WARNING, logger="kdjax"):
        found, meta = saved.restore(state(0))
    assert (int(found.step), meta) == (3, {"data": "records of 3"})
    jax.tree.map(np.testing.assert_array_equal, found.params, state(3).params)
    assert f"{tmp_path}/checkpoints/5 CANNOT BE READ; trying the one before it" in caplog.text
    assert not (tmp_path / "checkpoints" / "5").exists()
    assert (tmp_path / "damaged" / "5-0" / "params").is_dir()


def test_damaged_steps_only(saved: RunCheckpoints, tmp_path: Path) -> None:
    for step in ("3", "5"):
        damage(tmp_path / "checkpoints" / step / "opt_state")
    with pytest.raises(UserError, match=r"none of the checkpoints \[5, 3\] in .*checkpoints can be read; move it away"):
        saved.restore(state(0))


def test_a_step_that_only_this_process_cannot_read(
    saved: RunCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not passed over, as the processes would go on from different steps."""
    damage(tmp_path / "checkpoints" / "5" / "params")
    monkeypatch.setattr(consensus, "all_agree", lambda statement: False)
    with pytest.raises(UserError, match=r"checkpoints/5 cannot be read here, though other processes can: "):
        saved.restore(state(0))


def test_layers_are_stored_one_by_one(saved: RunCheckpoints, tmp_path: Path) -> None:
    arrays = open_arrays(tmp_path / "checkpoints" / "5" / "params")
    chunks = {name: array.store.chunk_layout.read_chunk.shape for name, array in arrays.items()}
    assert chunks == {"layers/w": (1, 8, 3), "embed": (8, 3)}


def test_remains_of_an_interrupted_save_are_deleted(saved: RunCheckpoints, tmp_path: Path) -> None:
    saved.close()
    remains = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    remains.mkdir()
    later = RunCheckpoints(tmp_path, Config())
    later.save(state(8), {}, None)  # waits for the deletion, which Orbax does in a thread
    later.close()
    assert not remains.exists()


def test_only_a_run_with_validation_keeps_the_best(tmp_path: Path) -> None:
    """Without data.val there are no metrics to judge by, and checkpoint.keep_last alone decides."""
    checkpoints = RunCheckpoints(tmp_path, Config())
    for step in (1, 2, 3, 4):
        checkpoints.save(state(step), {}, None)
    checkpoints.wait()
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [5 - n for n in range(Config().checkpoint.keep_last, 0, -1)]
