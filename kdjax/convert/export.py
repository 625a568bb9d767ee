"""A kdjax model as the tensors of another format, made one layer at a time for the commands that write it."""

import argparse
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from kdjax.checkpoint import params_directory
from kdjax.checkpoint.arrays import StoredArray, open_arrays
from kdjax.checkpoint.model_directory import VOCABULARY_LEAVES
from kdjax.cli import Progress
from kdjax.config import ModelConfig
from kdjax.convert.conversion import FLOATS
from kdjax.convert.rules import Rule
from kdjax.model import named_shapes
from kdjax.types import UserError

DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in FLOATS}


def add_export_arguments(parser: argparse.ArgumentParser, format_name: str) -> None:
    """Adds the arguments of every command that writes a model in another format."""
    parser.add_argument("model", metavar="IN", type=Path, help="model directory, run directory or step of a run")
    parser.add_argument("out", metavar="OUT", type=Path, help=f"the {format_name} to write")
    parser.add_argument("--force", action="store_true", help=f"replace OUT if it is a {format_name}")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="dtype of the tensors; default: as stored")


@dataclasses.dataclass(frozen=True)
class Export:
    """The tensors that rules make of a model's stored parameters, in the order in which they are written.

    `config.padded_vocab_size` vocabulary rows are written: more stored rows are dropped, missing ones are zeros.
    """

    config: ModelConfig
    rules: Sequence[Rule]
    stored: Mapping[str, StoredArray]
    dtype: np.dtype | None  # None: as stored

    @classmethod
    def open(cls, model: Path, config: ModelConfig, rules: Sequence[Rule], dtype: str | None) -> "Export":
        """Opens a model directory, run directory or step of a run. Reads no array yet."""
        return cls(config, rules, open_arrays(params_directory(model)), DTYPES.get(dtype or ""))

    def _rules_in_order(self) -> list[tuple[Rule, int | None]]:
        """Returns rules and layers: the embeddings, layer after layer, the final norm and the unembedding."""
        before = [rule for rule in self.rules if rule.targets[0] in ("embed", "positions")]
        stacked = [rule for rule in self.rules if rule.per_layer]
        after = [rule for rule in self.rules if rule not in before and rule not in stacked]
        return [
            *((rule, None) for rule in before),
            *((rule, layer) for layer in range(self.config.layers) for rule in stacked),
            *((rule, None) for rule in after),
        ]

    @functools.cached_property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Each tensor's shape and dtype, in the order of `arrays`. Raises UserError when a parameter does not fit."""
        shapes, found = named_shapes(self.config), dict[str, tuple[tuple[int, ...], np.dtype]]()
        for name, shape in shapes.items():
            stored = self.stored[name].shape if name in self.stored else None
            fits = stored == shape
            if stored is not None and name in VOCABULARY_LEAVES:
                fits = stored[0] >= self.config.vocab_size and stored[1:] == shape[1:]
            if not fits:
                raise UserError(
                    f"{name}: {stored or 'nothing'} is stored, but the architecture beside it needs {shape}"
                )
        for rule, layer in self._rules_in_order():
            dtype = self.dtype or self.stored[rule.targets[0]].dtype
            source_shapes = rule.source_shapes(self.config, shapes)
            found |= {name: (shape, dtype) for name, shape in zip(rule.source_names(layer), source_shapes, strict=True)}
        return found

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.tensors.values())

    @property
    def dtype_name(self) -> str:
        """The embedding's dtype, for formats that state one dtype for the whole model."""
        return str(self.dtype or self.stored["embed"].dtype)

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields each tensor's name and array, and shows the progress of writing them."""
        shapes = named_shapes(self.config)
        with Progress("writing", self.nbytes, "B", delay_s=2.0) as progress:
            for rule, layer in self._rules_in_order():
                parameters = [self._read(name, shapes[name], layer) for name in rule.targets]
                arrays = rule.from_kdjax(self.config, *parameters)
                del parameters
                for name, array in zip(rule.source_names(layer), arrays, strict=True):
                    array = array if self.dtype is None else array.astype(self.dtype, copy=False)
                    yield name, array
                    progress.add(array.nbytes)
                    del array
                del arrays

    def _read(self, name: str, shape: tuple[int, ...], layer: int | None) -> np.ndarray:
        """Returns a parameter of this shape, or one layer of it."""
        stored = self.stored[name]
        if layer is not None:
            return stored.read((slice(layer, layer + 1),))[0]
        rows = stored.read((slice(0, min(shape[0], stored.shape[0])),))
        return rows if len(rows) == shape[0] else np.pad(rows, [(0, shape[0] - len(rows)), (0, 0)])
