"""Pipeline schedules, 1F1B (one forward, one backward) and GPipe, over functions that the caller provides.

A stack of layers is cut into v * P chunks, and chunk q goes to stage q % P. With v = 1 each of the P stages has one
run of layers; with v > 1 it has several, interleaved (Megatron's virtual stages, arXiv:2104.04473). All devices run
the same program, tick by tick: receive from the neighbour, run one chunk forward on one microbatch, or one backward,
or both, and send the result on.

`gradients` is 1F1B. The last chunk's backward pass runs in the same tick as its forward pass, so at most 2vP - 1
microbatches are in flight, and memory does not grow with the number of microbatches. A stage keeps the input of each
microbatch in flight and recomputes the chunk to differentiate it. The ticks form three loops: forward only, both,
backward only.

    P = 3, M = 4   tick 0   1   |  2      3      4      5     |  6   7
          stage 0       F0  F1  |  F2     F3     B0     B1    |  B2  B3
          stage 1           F0  |  F1     F2 B0  F3 B1  B2    |  B3
          stage 2               |  F0 B0  F1 B1  F2 B2  F3 B3 |

With v = 1 a step takes (P - 1) F + M (F + B) + (P - 1) B, which equals the (M + P - 1)(F + B) of 1F1B, and no branch
depends on the stage: idle stages compute on zeros. With v > 1 it takes M v + P - 1 ticks, each 1/v of the work.
`losses` runs forward only; differentiating it gives GPipe, which keeps M + P - 1 inputs.

`enter` and `leave`, which come before the first chunk and after the last, run on all devices together for each
microbatch. Each device handles its part of the vocabulary, so that no stage waits for the last one.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from kdjax.parallel import collectives

Tree = TypeVar("Tree")


class Item(NamedTuple):
    """The work of a stage in one tick; the fields are ints, traced or not."""

    exists: Any  # bool; False: the stage idles
    microbatch: Any
    chunk: Any  # which of the stage's v chunks
    number: Any  # position among the stage's forward items


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which stage works on which microbatch in which tick.

    Microbatches pass through one chunk after the other in groups of P (Megatron's order), so that the last stage's
    output reaches the first stage in the tick in which it is needed.
    """

    stages: int  # P
    chunks: int  # v, per stage
    microbatches: int  # M; with v > 1 the last group is padded with items that do not exist

    @property
    def items(self) -> int:
        """The number of forward items of a stage."""
        groups = -(-self.microbatches // self.stages)
        return self.chunks * groups * self.stages if self.chunks > 1 else self.microbatches

    @property
    def is_ring(self) -> bool:
        """Whether the first stage continues with the last stage's output."""
        return self.chunks > 1

    @property
    def ring(self) -> int:
        """The number of stage inputs to keep: one for each item between its forward and its backward tick."""
        return 2 * self.chunks * self.stages - 1

    @property
    def phases(self) -> tuple[range, range, range]:
        """The ticks of the three loops: forward only, both, backward only."""
        first, last = self.chunks * self.stages - 1, self.items + self.stages - 1
        return range(first), range(first, last), range(last, last + first)

    @property
    def bubble(self) -> float:
        """The share of a step during which a stage idles."""
        return 1 - self.microbatches * self.chunks / (self.items + self.stages - 1)

    def forward(self, tick: Any, stage: Any) -> Item:
        """Returns the item that the stage runs forward."""
        number = tick - stage
        return self._item(number, (number // self.stages) % self.chunks)

    def backward(self, tick: Any, stage: Any) -> Item:
        """Returns the item that the stage runs backward: microbatches in order, chunks and stages in reverse order."""
        number = tick - (self.chunks * self.stages - 1) - (self.stages - 1 - stage)
        return self._item(number, self.chunks - 1 - (number // self.stages) % self.chunks)

    def _item(self, number: Any, chunk: Any) -> Item:
        group, place = number // (self.chunks * self.stages), number % self.stages
        microbatch = group * self.stages + place
        exists = (number >= 0) & (number < self.items) & (microbatch < self.microbatches)
        return Item(exists, microbatch, chunk, (group * self.chunks + chunk) * self.stages + place)


class Parts(NamedTuple):
    """The functions that the pipeline runs for each microbatch."""

    enter: Callable[[Any, Any], Array]  # (shared, microbatch) -> the first chunk's input, in full on every device
    run: Callable[[Any, Array, Any], Array]  # (a chunk's parameters, its input, microbatch) -> its output, same shape
    # (shared, the last chunk's output, microbatch) -> the value to minimise, and sums to add up; the same on all stages
    leave: Callable[[Any, Array, Any], tuple[Any, Any]]


def by_stage(stacked: Tree, stages: int, chunks: int) -> Tree:
    """Reshapes stacked arrays [L, ...] to [v, P, L/(vP), ...]; axis 1 is split over the stages."""
    return jax.tree.map(lambda x: x.reshape(chunks, stages, -1, *x.shape[1:]), stacked)


def stacked(staged: Tree) -> Tree:
    """Undoes `by_stage`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), staged)


def losses(parts: Parts, schedule: Schedule, shared: Any, chunks: Any, microbatches: Any) -> tuple[Array, Any]:
    """Returns the sums over all microbatches of what `leave` returns. Only inside `per_device`.

    `chunks` are this stage's parameters [v, L/(vP), ...], `microbatches` arrays [M, ...].
    """
    stage = _Stage(parts, schedule, shared, chunks, microbatches)
    if schedule.stages == 1:
        return _sum_over(lambda number: stage.straight(shared, chunks, number), schedule.microbatches)

    def tick(carry: tuple[Array, Any], t: Array, leaves: bool) -> tuple[tuple[Array, Any], None]:
        received, total = carry
        _, y = stage.forward(received, t)
        if leaves:
            total = jax.tree.map(jnp.add, total, stage.leave(stage.parts.leave, y, t))
        return (collectives.send_forward(y, schedule.is_ring), total), None

    entering, both, _ = schedule.phases
    carry = jnp.zeros(stage.x.shape, stage.x.dtype), stage.no_losses
    for ticks, leaves in ((entering, False), (both, True)):
        body = jax.checkpoint(functools.partial(tick, leaves=leaves), prevent_cse=False)
        carry, _ = lax.scan(body, carry, jnp.arange(ticks.start, ticks.stop))
    return carry[1]


def outputs(parts: Parts, schedule: Schedule, shared: Any, chunks: Any, microbatches: Any) -> Any:
    """Returns the first result of `leave`, here any arrays, for each microbatch [M, ...]. Only inside `per_device`.

    Each stage has one chunk.
    """
    assert schedule.chunks == 1, schedule
    stage = _Stage(parts, schedule, shared, chunks, microbatches)
    if schedule.stages == 1:
        return lax.map(lambda number: stage.straight(shared, chunks, number)[0], jnp.arange(schedule.microbatches))

    def tick(received: Array, t: Array, leaves: bool) -> tuple[Array, Any]:
        _, y = stage.forward(received, t)
        found = stage.leave(stage.parts.leave, y, t)[0] if leaves else None
        return collectives.send_forward(y, schedule.is_ring), found

    entering, both, _ = schedule.phases
    nothing = jnp.zeros(stage.x.shape, stage.x.dtype)
    received, _ = lax.scan(functools.partial(tick, leaves=False), nothing, jnp.arange(entering.start, entering.stop))
    # With one chunk per stage a microbatch is due in each of these ticks, in order.
    _, found = lax.scan(functools.partial(tick, leaves=True), received, jnp.arange(both.start, both.stop))
    return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """What a device carries from tick to tick."""

    x: Array  # the next item's input
    x_ct: Array  # the cotangent of the next backward item's output
    inputs: Array  # [ring, ...]
    shared_ct: Any
    chunks_ct: Any
    sums: Any


def gradients(parts: Parts, schedule: Schedule, shared: Any, chunks: Any, microbatches: Any) -> tuple[Any, Any, Any]:
    """Returns the gradients of `losses`' first result by `shared` and by `chunks`, and its second result, the sums.

    Gradients are accumulated in float32. Those of `shared` are the same on all stages, except for parameters that are
    split over the vocabulary. Only inside `per_device`.
    """
    stage = _Stage(parts, schedule, shared, chunks, microbatches)
    if schedule.stages == 1:  # a microbatch's two passes follow each other, so nothing is recomputed
        differentiate = jax.grad(stage.straight, argnums=(0, 1), has_aux=True)
        (shared_ct, chunks_ct), sums = _sum_over(
            lambda number: _to_float32(differentiate(shared, chunks, number)), schedule.microbatches
        )
        return shared_ct, chunks_ct, sums

    def tick(carry: _Carry, t: Array, goes_forward: bool, goes_backward: bool) -> tuple[_Carry, None]:
        y_ct = jnp.zeros_like(carry.x)
        if goes_forward:
            x, y = stage.forward(carry.x, t)
            number = schedule.forward(t, stage.index).number
            inputs = lax.dynamic_update_index_in_dim(carry.inputs, x, number % schedule.ring, 0)
            carry = dataclasses.replace(carry, x=collectives.send_forward(y, schedule.is_ring), inputs=inputs)
        if goes_forward and goes_backward:
            (shared_ct, y_ct), sums = stage.leave(stage.differentiated_leave, y, t)
            carry = dataclasses.replace(
                carry, shared_ct=_add(carry.shared_ct, shared_ct), sums=jax.tree.map(jnp.add, carry.sums, sums)
            )
        if goes_backward:
            carry = stage.backward(carry, y_ct, t)
        return carry, None

    nothing = jnp.zeros(stage.x.shape, stage.x.dtype)
    inputs = jnp.zeros((schedule.ring, *nothing.shape), nothing.dtype)
    carry = _Carry(nothing, nothing, inputs, _zeros(shared), _zeros(chunks), stage.no_losses[1])
    ways = ((True, False), (True, True), (False, True))
    for ticks, (goes_forward, goes_backward) in zip(schedule.phases, ways, strict=True):
        body = functools.partial(tick, goes_forward=goes_forward, goes_backward=goes_backward)
        carry, _ = lax.scan(body, carry, jnp.arange(ticks.start, ticks.stop))
    return carry.shared_ct, carry.chunks_ct, carry.sums


def gpipe_gradients(
    parts: Parts, schedule: Schedule, shared: Any, chunks: Any, microbatches: Any
) -> tuple[Any, Any, Any]:
    """Returns what `gradients` returns, by differentiating `losses`: a simpler program, and the test oracle."""

    def objective(shared: Any, chunks: Any) -> tuple[Array, Any]:
        return losses(parts, schedule, shared, chunks, microbatches)

    # float32 from the start, because JAX accumulates gradients in the dtype of the parameters.
    (shared_ct, chunks_ct), sums = jax.grad(objective, argnums=(0, 1), has_aux=True)(
        _to_float32(shared), _to_float32(chunks)
    )
    return shared_ct, chunks_ct, sums


@dataclasses.dataclass(frozen=True)
class _Stage:
    """One device's part of a tick."""

    parts: Parts
    schedule: Schedule
    shared: Any
    chunks: Any  # [v, L/(vP), ...]
    microbatches: Any  # [M, ...]

    @property
    def index(self) -> Array:
        return collectives.stage_index()

    @functools.cached_property
    def x(self) -> Any:
        """Shape and dtype of what passes from chunk to chunk."""
        return jax.eval_shape(self.parts.enter, self.shared, self._microbatch(0))

    @functools.cached_property
    def no_losses(self) -> tuple[Array, Any]:
        shapes = jax.eval_shape(self.parts.leave, self.shared, self.x, self._microbatch(0))
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def straight(self, shared: Any, chunks: Any, number: Any) -> tuple[Array, Any]:
        """Returns the result of `leave` for a microbatch, without a pipeline."""
        microbatch = self._microbatch(number)
        x = self.parts.enter(shared, microbatch)
        for chunk in range(self.schedule.chunks):
            x = self.parts.run(jax.tree.map(lambda c, chunk=chunk: c[chunk], chunks), x, microbatch)
        return self.parts.leave(shared, x, microbatch)

    def forward(self, received: Array, t: Array) -> tuple[Array, Array]:
        """Runs the tick's item forward; returns its input and output."""
        item, first = self.schedule.forward(t, self.index), self.schedule.forward(t, 0)
        entered = self._when(first.chunk == 0, self._enter, self.shared, first.microbatch)
        x = jnp.where((self.index == 0) & (item.chunk == 0), entered, received)
        return x, self.parts.run(self._chunk(item.chunk), x, self._microbatch(item.microbatch))

    def leave(self, leave: Callable[[Any, Array, Any], Tree], y: Array, t: Array) -> Tree:
        """Runs `leave` on the item that the last chunk finishes in this tick; returns zeros if there is none."""
        item = self.schedule.forward(t, self.schedule.stages - 1)
        due = (item.chunk == self.schedule.chunks - 1) & item.exists
        microbatch = self._microbatch(item.microbatch)
        return self._when(
            due, lambda shared, y: leave(shared, collectives.from_last_stage(y), microbatch), self.shared, y
        )

    def differentiated_leave(self, shared: Any, y: Array, microbatch: Any) -> tuple[tuple[Any, Array], Any]:
        """Returns the cotangents of `shared` and `y`, and the sums."""
        return jax.grad(self.parts.leave, argnums=(0, 1), has_aux=True)(shared, y, microbatch)

    def backward(self, carry: _Carry, y_ct: Array, t: Array) -> _Carry:
        """Runs the tick's item backward; `y_ct` is the cotangent of the last chunk's output."""
        v, last = self.schedule.chunks, self.schedule.stages - 1
        item, first = self.schedule.backward(t, self.index), self.schedule.backward(t, 0)
        ct = jnp.where((self.index == last) & (item.chunk == v - 1), y_ct, carry.x_ct)
        ct = jnp.where(item.exists, ct, 0)  # makes all gradients below zero
        x = lax.dynamic_index_in_dim(carry.inputs, item.number % self.schedule.ring, keepdims=False)
        microbatch = self._microbatch(item.microbatch)
        _, back = jax.vjp(lambda chunk, x: self.parts.run(chunk, x, microbatch), self._chunk(item.chunk), x)
        chunk_ct, x_ct = back(ct)
        entered_ct = jnp.where((self.index == 0) & (item.chunk == 0), x_ct, 0)
        shared_ct = self._when(first.chunk == 0, self._enter_ct, entered_ct, first.microbatch)
        return dataclasses.replace(
            carry,
            x_ct=collectives.send_backward(x_ct, self.schedule.is_ring),
            shared_ct=_add(carry.shared_ct, shared_ct),
            chunks_ct=self._add_to_chunk(carry.chunks_ct, chunk_ct, item.chunk),
        )

    def _enter(self, shared: Any, microbatch: Array) -> Array:
        return collectives.copy_to_stages(self.parts.enter(shared, self._microbatch(microbatch)))

    def _enter_ct(self, entered_ct: Array, microbatch: Array) -> Any:
        return jax.vjp(lambda shared: self._enter(shared, microbatch), self.shared)[1](entered_ct)[0]

    def _when(self, due: Any, f: Callable[..., Tree], *args: Any) -> Tree:
        """Returns f(*args) if due, else zeros. `due` is the same on all devices, so f may communicate.

        With one chunk per stage, f is due in almost every tick, so it always runs.
        """
        if self.schedule.chunks == 1:
            return f(*args)
        return lax.cond(due, f, lambda *args: jax.tree.map(jnp.zeros_like, jax.eval_shape(f, *args)), *args)

    def _chunk(self, chunk: Any) -> Any:
        if self.schedule.chunks == 1:
            return jax.tree.map(lambda x: x[0], self.chunks)
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, chunk, keepdims=False), self.chunks)

    def _add_to_chunk(self, total: Any, ct: Any, chunk: Any) -> Any:
        chunk = 0 if self.schedule.chunks == 1 else chunk
        return jax.tree.map(lambda total, x: total.at[chunk].add(x.astype(total.dtype)), total, ct)

    def _microbatch(self, number: Any) -> Any:
        """Returns the microbatch with that number, clipped to those that exist."""
        number = jnp.clip(number, 0, self.schedule.microbatches - 1)
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, keepdims=False), self.microbatches)


def _sum_over(f: Callable[[Array], Tree], count: int) -> Tree:
    """Returns the sum of f(i) over i = 0 .. count-1, with one result in memory at a time."""
    total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(f, jnp.int32(0)))
    return lax.scan(lambda total, i: (jax.tree.map(jnp.add, total, f(i)), None), total, jnp.arange(count))[0]


def _to_float32(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _add(total: Tree, ct: Tree) -> Tree:
    return jax.tree.map(lambda total, x: total + x.astype(total.dtype), total, ct)
