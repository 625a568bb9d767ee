"""Rules from a format's names and layouts to kdjax's and back, and the strict check that a checkpoint fits them.

A rule takes some arrays of one layer (or of the model) to some kdjax leaves. kdjax's leaf paths are those of
`kdjax.model.param_shapes`, joined by "/"; a path below "layers/" stands for one layer's array, without the axis L.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from kdjax.config import ModelConfig
from kdjax.convert.tensors import Source, StoredTensor
from kdjax.model import param_shapes
from kdjax.types import UserError

Arrays = tuple[np.ndarray, ...]
FLOATS = ("float32", "bfloat16", "float16")
Transform = Callable[..., Arrays]  # (config, *arrays) -> arrays


@dataclasses.dataclass(frozen=True)
class Rule:
    """`sources` (names with {i} for the layer) become `targets` (kdjax leaf paths), and `from_kdjax` undoes it."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    to_kdjax: Transform
    from_kdjax: Transform

    @property
    def per_layer(self) -> bool:
        return self.targets[0].startswith("layers/")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A leaf, or one layer of a stacked leaf."""

    path: str
    layer: int | None
    array: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found to be in order: the leaves to be written and a way to read them, one layer at a time."""

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]  # of each leaf, with the axis L
    dtypes: Mapping[str, np.dtype]
    skipped: Mapping[str, int]  # kind of entry -> how many were left out
    source: Source
    rules: Sequence[Rule]

    def __iter__(self) -> Iterator[Piece]:
        """The pieces; those of one leaf come in the order of the layers."""
        for rule in self.rules:
            for layer in range(self.config.layers) if rule.per_layer else [None]:
                arrays = rule.to_kdjax(self.config, *(self.source[name].read() for name in names(rule, layer)))
                yield from (Piece(path, layer, array) for path, array in zip(rule.targets, arrays, strict=True))
                del arrays  # before the next ones are read

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * self.dtypes[path].itemsize for path, shape in self.shapes.items())


def names(rule: Rule, layer: int | None) -> tuple[str, ...]:
    """The rule's source names for a layer."""
    return tuple(name.replace("{i}", str(layer)) for name in rule.sources)


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """kdjax's leaf paths and shapes; those below "layers/" with the axis L."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    return {"/".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def source_shapes(rule: Rule, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The shapes that the rule's sources must have: those that its inverse makes of the leaves."""
    skip = 1 if rule.per_layer else 0
    leaves = [np.broadcast_to(np.False_, shapes[path][skip:]) for path in rule.targets]  # strides of 0: no memory
    return [array.shape for array in rule.from_kdjax(config, *leaves)]


def plan(rules: Sequence[Rule], source: Source, config: ModelConfig, skip: Mapping[str, str], what: str) -> Plan:
    """Checks that each source is used exactly once (or skipped) and each leaf filled exactly once, shapes and all.

    `skip` maps a kind of entry to the pattern of its names, `what` names the checkpoint in messages.
    Raises one UserError that lists every name that is missing, left over or of another shape.
    """
    shapes, dtypes = leaf_shapes(config), dict[str, np.dtype]()
    filled = Counter(path for rule in rules for path in rule.targets)
    assert filled == dict.fromkeys(shapes, 1), f"the rules fill {filled}, the model has {list(shapes)}"
    used, problems = Counter[str](), list[str]()
    for rule in rules:
        wanted = source_shapes(rule, config, shapes)
        tensors = []
        for layer in range(config.layers) if rule.per_layer else [None]:
            for name, shape in zip(names(rule, layer), wanted, strict=True):
                used[name] += 1
                tensors += [source[name]] if name in source else []
                problems += _misfit(name, shape, source.get(name), rule)
        kinds = {tensor.dtype for tensor in tensors}
        if len(kinds) > 1:
            told = ", ".join(sorted(map(str, kinds)))
            problems.append(f"  {', '.join(rule.sources)}: stored as {told}; a leaf can be of one dtype only")
        dtypes.update(dict.fromkeys(rule.targets, next(iter(kinds), np.dtype(np.float32))))
    assert not used or max(used.values()) == 1, f"used twice: {used.most_common(1)}"
    left_over = {name: _kind(name, skip) for name in source if name not in used}
    for name, kind in left_over.items():
        if kind is None:
            problems.append(f"  {_told(name, source[name])}: no rule of this architecture takes it")
    if problems:
        raise UserError(_report(what, config, problems))
    return Plan(config, shapes, dtypes, Counter(kind for kind in left_over.values() if kind), source, rules)


MOST_PROBLEMS = 24  # lines of a report; more would not be read


def _report(what: str, config: ModelConfig, problems: Sequence[str]) -> str:
    more = [f"  and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    lines = [*problems[:MOST_PROBLEMS], *more]
    return (
        f"{what} does not fit the architecture printed above (layers {config.layers}, d_model {config.d_model}, "
        f"heads {config.n_heads}/{config.n_groups}, d_ff {config.d_ff}, vocabulary {config.padded_vocab_size}); "
        "where the architecture is at fault, correct it with --arch key=value:\n" + "\n".join(lines)
    )


def _misfit(name: str, shape: tuple[int, ...], found: StoredTensor | None, rule: Rule) -> list[str]:
    if found is None:
        return [f"  {name} {shape}: missing; {', '.join(rule.targets)} needs it"]
    if found.shape != shape:
        return [f"  {_told(name, found)}: {', '.join(rule.targets)} needs {shape}"]
    if str(found.dtype) not in FLOATS:
        return [f"  {_told(name, found)}: its dtype is none of {', '.join(FLOATS)}"]
    return []


def _told(name: str, tensor: StoredTensor) -> str:
    alias = f", stored as {tensor.name}" if tensor.name not in ("", name) else ""
    return f"{name} {tensor.shape} {tensor.dtype} in {tensor.where}{alias}"


def _kind(name: str, skip: Mapping[str, str]) -> str | None:
    return next((kind for kind, pattern in skip.items() if re.fullmatch(pattern, name)), None)


# Array layouts. Each pair undoes itself; kdjax's side is the second of the pair's names.


def same(config: ModelConfig, *arrays: np.ndarray) -> Arrays:
    """Nothing to change: norms, embeddings, biases."""
    return arrays


def transposed(config: ModelConfig, kernel: np.ndarray) -> Arrays:
    """[out, in] <-> [in, out]."""
    return (kernel.T,)


def heads_out(config: ModelConfig, kernel: np.ndarray) -> Arrays:
    """A query, key or value map [heads * H, D] -> [D, heads, H]."""
    return (kernel.T.reshape(kernel.shape[1], -1, config.head_width),)


def heads_out_inverse(config: ModelConfig, kernel_DxNxH: np.ndarray) -> Arrays:
    return (kernel_DxNxH.reshape(kernel_DxNxH.shape[0], -1).T,)


def head_bias(config: ModelConfig, bias: np.ndarray) -> Arrays:
    """[heads * H] -> [heads, H]."""
    return (bias.reshape(-1, config.head_width),)


def head_bias_inverse(config: ModelConfig, bias_NxH: np.ndarray) -> Arrays:
    return (bias_NxH.reshape(-1),)


def heads_in(config: ModelConfig, kernel: np.ndarray) -> Arrays:
    """The attention's output map [D, N * H] -> [N, H, D]."""
    return (kernel.T.reshape(config.n_heads, config.head_width, -1),)


def heads_in_inverse(config: ModelConfig, kernel_NxHxD: np.ndarray) -> Arrays:
    return (kernel_NxHxD.reshape(-1, kernel_NxHxD.shape[-1]).T,)


def linear(source: str, target: str) -> Rule:
    """A rule for a plain linear map stored [out, in]."""
    return Rule((source,), (target,), transposed, transposed)


def copy(source: str, target: str) -> Rule:
    """A rule for an array that both sides store alike."""
    return Rule((source,), (target,), same, same)
