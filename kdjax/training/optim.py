"""The learning rate and the optax chain."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kdjax.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> Callable[[Any], jax.Array]:
    """Returns the learning rate as a function of the step number (from 0), for a run of `steps` steps.

    "cosine" is NeMo's CosineAnnealing, which is two schedules (NeMo `core/optim/lr_scheduler.py`):
      constant_steps = 0: lr (step+1)/(warmup+1) while step <= warmup, then a cosine that reaches min_lr at `steps`;
      constant_steps > 0: Megatron's: lr step/warmup, which starts at 0, a cosine, then `constant_steps` at min_lr.
    "wsd" warms up like the first, holds lr for `constant_steps`, then falls linearly to min_lr at `steps`.
    "constant" warms up like the first and stays at lr.
    """
    peak, low = config.lr, config.min_lr
    warmup, constant = config.warmup_steps, config.constant_steps

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        if config.schedule == "cosine" and constant > 0:
            rise = peak * step / max(warmup, 1)
            fall = low + (peak - low) * _half_cosine((step - warmup) / max(steps - constant - warmup, 1))
            return jnp.where(step < warmup, rise, fall)
        rise = peak * (step + 1) / (warmup + 1)
        if config.schedule == "cosine":
            after = low + (peak - low) * _half_cosine((step - warmup) / max(steps - warmup, 1))
        elif config.schedule == "wsd":
            start = warmup + constant
            after = peak + (low - peak) * jnp.clip((step - start) / max(steps - start, 1), 0, 1)
        else:
            after = jnp.full_like(step, peak)
        return jnp.where(step <= warmup, rise, after)

    return rate


def _half_cosine(share: jax.Array) -> jax.Array:
    return 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Returns the transformation from gradient to descent direction, without the learning rate.

    The step multiplies the direction by minus the learning rate of its own number, so that a skipped step still uses up
    its place in the schedule.
    """
    direction = {
        "adamw": lambda: optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32),
        "lion": lambda: optax.scale_by_lion(config.b1, config.b2, mu_dtype=jnp.float32),
        "sgd": lambda: optax.trace(config.b1, accumulator_dtype=jnp.float32),
    }[config.name]()
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    decay = optax.add_decayed_weights(config.weight_decay, functools.partial(decay_mask, rule=config.decay_rule))
    return optax.chain(clip, direction, decay)


def decay_mask(params: Any, rule: str) -> Any:
    """Returns a tree of booleans: True where weight decay applies.

    "megatron" exempts biases and everything with one axis (as Megatron-Core's optimizer). "nemo" exempts only biases:
    NeMo's rule comes to that with Transformer Engine layers, whose norm weights it does not recognise. The stacked
    axis L is not counted.
    """

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        names = [key.key for key in path]
        if names[-1] == "bias":
            return False
        return rule == "nemo" or leaf.ndim - ("layers" in names) > 1

    return jax.tree_util.tree_map_with_path(decays, params)
