"""The strict check that a checkpoint fits an architecture, and the conversion that results from it.

Every tensor must be used exactly once, or be of a kind that may be skipped, and every parameter must be filled exactly
once. Names, shapes and dtypes are compared before the first byte of a tensor is read.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from kdjax.config import ModelConfig
from kdjax.convert.rules import Rule
from kdjax.convert.tensors import LazyTensor, Tensors
from kdjax.model import named_shapes
from kdjax.types import UserError

FLOATS = ("float32", "bfloat16", "float16")  # dtypes that parameters can have
MOST_PROBLEMS = 24  # lines of an error message


@dataclasses.dataclass(frozen=True)
class Piece:
    """A converted parameter, or one layer of a stacked parameter."""

    parameter: str
    layer: int | None
    array: np.ndarray


@dataclasses.dataclass(frozen=True)
class Conversion:
    """Tensors that fit the rules, ready to be converted by iterating: one layer is in memory at a time."""

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]  # by parameter, with the axis L
    dtypes: Mapping[str, np.dtype]
    skipped: Mapping[str, int]  # kind of tensor -> how many were skipped
    tensors: Tensors
    rules: Sequence[Rule]

    def __iter__(self) -> Iterator[Piece]:
        """Yields the pieces, those of each parameter in the order of the layers."""
        for rule in self.rules:
            for layer in rule.layers(self.config):
                sources = (self.tensors[name].read() for name in rule.source_names(layer))
                arrays = rule.to_kdjax(self.config, *sources)
                yield from (Piece(name, layer, array) for name, array in zip(rule.targets, arrays, strict=True))
                del arrays  # before the next ones are read

    @property
    def nbytes(self) -> int:
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items())


def match_tensors(
    rules: Sequence[Rule], tensors: Tensors, config: ModelConfig, skip: Mapping[str, str], checkpoint: str
) -> Conversion:
    """Matches a checkpoint's tensors with an architecture's parameters.

    Args:
        skip: kind of tensor -> regular expression of the names that may be skipped.
        checkpoint: what error messages call the checkpoint.

    Raises one UserError that lists every tensor that is missing, left over, or has another shape or dtype.
    """
    shapes, dtypes = named_shapes(config), dict[str, np.dtype]()
    filled = Counter(name for rule in rules for name in rule.targets)
    assert filled == dict.fromkeys(shapes, 1), f"the rules fill {filled}, the model has {list(shapes)}"
    used, problems = Counter[str](), list[str]()
    for rule in rules:
        source_shapes = rule.source_shapes(config, shapes)
        found = set[np.dtype]()
        for layer in rule.layers(config):
            for name, shape in zip(rule.source_names(layer), source_shapes, strict=True):
                used[name] += 1
                if name in tensors:
                    found.add(tensors[name].dtype)
                problems += _problems(name, shape, tensors.get(name), rule)
        if len(found) > 1:
            listed = ", ".join(sorted(map(str, found)))
            problems.append(f"  {', '.join(rule.sources)}: stored as {listed}; a parameter can have one dtype only")
        dtypes.update(dict.fromkeys(rule.targets, next(iter(found), np.dtype(np.float32))))
    assert not used or max(used.values()) == 1, f"used twice: {used.most_common(1)}"
    unused = {name: _kind(name, skip) for name in tensors if name not in used}
    for name, kind in unused.items():
        if kind is None:
            problems.append(f"  {_description(name, tensors[name])}: no rule of this architecture uses it")
    if problems:
        raise UserError(_report(checkpoint, config, problems))
    return Conversion(config, shapes, dtypes, Counter(kind for kind in unused.values() if kind), tensors, rules)


def _report(checkpoint: str, config: ModelConfig, problems: Sequence[str]) -> str:
    more = [f"  and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    return (
        f"{checkpoint} does not fit the architecture printed above (layers {config.layers}, d_model {config.d_model}, "
        f"heads {config.n_heads}/{config.n_groups}, d_ff {config.d_ff}, vocabulary {config.padded_vocab_size}); "
        "if the architecture is wrong, correct it with --arch key=value:\n"
        + "\n".join([*problems[:MOST_PROBLEMS], *more])
    )


def _problems(name: str, shape: tuple[int, ...], tensor: LazyTensor | None, rule: Rule) -> list[str]:
    targets = ", ".join(rule.targets)
    if tensor is None:
        return [f"  {name} {shape}: missing; needed for {targets}"]
    if tensor.shape != shape:
        return [f"  {_description(name, tensor)}: {targets} needs {shape}"]
    if str(tensor.dtype) not in FLOATS:
        return [f"  {_description(name, tensor)}: its dtype must be one of {', '.join(FLOATS)}"]
    return []


def _description(name: str, tensor: LazyTensor) -> str:
    alias = f", stored as {tensor.name}" if tensor.name not in ("", name) else ""
    return f"{name} {tensor.shape} {tensor.dtype} in {tensor.label}{alias}"


def _kind(name: str, skip: Mapping[str, str]) -> str | None:
    return next((kind for kind, pattern in skip.items() if re.fullmatch(pattern, name)), None)
