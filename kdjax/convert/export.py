"""A model in another format's names and layouts, read a layer at a time: what the commands that write it share."""

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from kdjax.checkpoint.arrays import Leaf
from kdjax.checkpoint.model_directory import VOCABULARY_LEAVES
from kdjax.config import ModelConfig
from kdjax.convert.model_writer import Progress
from kdjax.convert.rules import Rule, leaf_shapes, names, source_shapes
from kdjax.types import UserError

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def add_export_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds the arguments of every command that writes `what`."""
    parser.add_argument("model", metavar="IN", type=Path, help="model directory, run directory or step of a run")
    parser.add_argument("out", metavar="OUT", type=Path, help=f"{what} to be written")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is such a checkpoint")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the tensors written; default: as stored")


@dataclasses.dataclass(frozen=True)
class Export:
    """The tensors that the rules make of a model's leaves, in the order in which they are to be written.

    `config.padded_vocab_size` says how many rows of the vocabulary go out: stored ones are left out, or zeros added.
    """

    config: ModelConfig
    rules: Sequence[Rule]
    leaves: Mapping[str, Leaf]
    dtype: np.dtype | None  # None: as stored

    def _steps(self) -> list[tuple[Rule, int | None]]:
        """The embeddings, layer after layer, the last norm and the head."""
        before = [rule for rule in self.rules if rule.targets[0] in ("embed", "positions")]
        stacked = [rule for rule in self.rules if rule.per_layer]
        after = [rule for rule in self.rules if rule not in before and rule not in stacked]
        return [
            *((rule, None) for rule in before),
            *((rule, layer) for layer in range(self.config.layers) for rule in stacked),
            *((rule, None) for rule in after),
        ]

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> shape and dtype, in the order in which `arrays` gives them. Raises UserError where leaves misfit."""
        shapes, found = leaf_shapes(self.config), {}
        for path, shape in shapes.items():
            stored = self.leaves[path].shape if path in self.leaves else None
            fits = stored == shape
            if stored is not None and path in VOCABULARY_LEAVES:
                fits = stored[0] >= self.config.vocab_size and stored[1:] == shape[1:]
            if not fits:
                raise UserError(f"{path}: {stored or 'nothing'} stored, {shape} wanted by the architecture beside it")
        for rule, layer in self._steps():
            kind = self.dtype or self.leaves[rule.targets[0]].dtype
            for name, shape in zip(names(rule, layer), source_shapes(rule, self.config, shapes), strict=True):
                found[name] = (shape, kind)
        return found

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in self.tensors.values())

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors themselves, and how far the writing of them is."""
        shapes, progress = leaf_shapes(self.config), Progress(self.nbytes)
        for rule, layer in self._steps():
            pieces = [self._piece(path, shapes[path], layer) for path in rule.targets]
            for name, array in zip(names(rule, layer), rule.from_kdjax(self.config, *pieces), strict=True):
                array = array if self.dtype is None else array.astype(self.dtype, copy=False)
                yield name, array
                progress.add(array.nbytes)
                del array
            del pieces
        progress.close()

    def _piece(self, path: str, shape: tuple[int, ...], layer: int | None) -> np.ndarray:
        if layer is not None:
            return self.leaves[path].read((slice(layer, layer + 1),))[0]
        leaf = self.leaves[path]
        piece = leaf.read((slice(0, min(shape[0], leaf.shape[0])),))
        return piece if len(piece) == shape[0] else np.pad(piece, [(0, shape[0] - len(piece)), (0, 0)])

    @property
    def dtype_name(self) -> str:
        """Of the embedding, which formats that state one dtype give for all."""
        return str(self.dtype or self.leaves["embed"].dtype)
