"""RUN/checkpoints: a training run's steps, saved and restored by Orbax.

A step holds `params`, `opt_state` and `meta` apart, so that a model can be read without the optimiser.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from kdjax.checkpoint.model_directory import save_in_layers
from kdjax.config import Config
from kdjax.distributed import consensus
from kdjax.training.metrics import as_rank
from kdjax.training.state import TrainState
from kdjax.types import UserError

log = logging.getLogger("kdjax")


class RunCheckpoints:
    """The steps in RUN/checkpoints: saved asynchronously; the newest and the best are kept."""

    def __init__(self, workdir: Path, config: Config):
        best, policies = config.checkpoint.best_metric, [keep.LatestN(config.checkpoint.keep_last)]
        judges = config.checkpoint.keep_best > 0 and bool(config.data.val)
        if judges:
            lowest = keep.BestN(
                get_metric_fn=lambda metrics: as_rank(metrics[best]),
                reverse=True,
                n=config.checkpoint.keep_best,
                keep_checkpoints_without_metrics=False,
            )
            policies.append(lowest)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy(policies),
            best_fn=(lambda metrics: as_rank(metrics[best])) if judges else None,
            best_mode="min",
            cleanup_tmp_directories=True,
        )
        self._directory = workdir.absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, state: TrainState, meta: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Starts a save, with the validation metrics if there are any. The state may be donated at once."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params, save_args=save_in_layers(state.params)),
            opt_state=ocp.args.StandardSave(state.opt_state),
            meta=ocp.args.JsonSave(dict(meta)),
        )
        self._manager.save(int(state.step), args=items, metrics=None if metrics is None else dict(metrics), force=True)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the newest readable step, in `like`'s shapes and shardings, and its meta; None if there is no step.

        Warns about a step that cannot be read and tries the one before it. Steps that cannot be read are moved to
        RUN/damaged, so that the run can save these steps again; nothing is deleted.
        """
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        steps = sorted(self._manager.all_steps(), reverse=True)
        for place, step in enumerate(steps):
            items = ocp.args.Composite(
                params=ocp.args.StandardRestore(shapes.params),
                opt_state=ocp.args.StandardRestore(shapes.opt_state),
                meta=ocp.args.JsonRestore(),
            )
            try:
                found = self._manager.restore(step, args=items)
            except Exception as error:  # Orbax raises many kinds for a damaged step
                path = self._directory / str(step)
                if not consensus.all_agree(f"{path} cannot be read"):
                    raise UserError(f"{path} cannot be read here, though other processes can: {error}") from error
                log.warning("CHECKPOINT %s CANNOT BE READ; trying the one before it: %s", path, error)
                continue
            self._set_aside(steps[:place])
            number = jax.device_put(like.step * 0 + step, like.step.sharding)
            return dataclasses.replace(like, step=number, params=found.params, opt_state=found.opt_state), found.meta
        if steps:
            raise UserError(
                f"none of the checkpoints {steps} in {self._directory} can be read; move it away to start over"
            )
        return None

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Moves damaged steps out of the way; every process must call this."""
        if not steps:
            return
        if consensus.is_process_zero():
            aside = self._directory.parent / "damaged"
            aside.mkdir(exist_ok=True)
            for step in steps:
                times = sum(1 for _ in aside.glob(f"{step}-*"))
                (self._directory / str(step)).rename(aside / f"{step}-{times}")
                log.warning("the damaged checkpoint of step %d is now in %s", step, aside / f"{step}-{times}")
        consensus.wait_for_all(f"damaged steps {steps} are set aside")
        self._manager.reload()

    def wait(self) -> None:
        """Blocks until the last save finishes; re-raises its error."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
