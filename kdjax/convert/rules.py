"""Rules: which tensors of another format become which parameters of kdjax, and how their axes change, both ways.

A rule converts some tensors of one layer, or of the whole model, to some parameters. Parameters have the names that
`kdjax.model.param_name` gives; in a rule a name below "layers/" stands for one layer's array, without the axis L.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kdjax.config import ModelConfig

Arrays = tuple[np.ndarray, ...]
Transform = Callable[..., Arrays]  # (config, *arrays) -> arrays


@dataclasses.dataclass(frozen=True)
class Rule:
    """Converts `sources` (tensor names, with {i} for the layer) to `targets` (parameter names) and back."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    to_kdjax: Transform
    from_kdjax: Transform

    @property
    def per_layer(self) -> bool:
        return self.targets[0].startswith("layers/")

    def layers(self, config: ModelConfig) -> Sequence[int | None]:
        """Returns the layers that the rule applies to: all of them, or [None] for what lies outside the layers."""
        return range(config.layers) if self.per_layer else [None]

    def source_names(self, layer: int | None) -> tuple[str, ...]:
        """Returns the names of the rule's tensors for a layer."""
        return tuple(name.replace("{i}", str(layer)) for name in self.sources)

    def source_shapes(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Returns the shapes that the sources must have, which follow from the parameters' through `from_kdjax`."""
        axes = 1 if self.per_layer else 0
        targets = [np.broadcast_to(np.False_, shapes[name][axes:]) for name in self.targets]  # takes no memory
        return [array.shape for array in self.from_kdjax(config, *targets)]


def copy(source: str, target: str) -> Rule:
    """Returns the rule for an array that both sides store alike: an embedding, a norm or a bias."""
    return Rule((source,), (target,), unchanged, unchanged)


def linear(source: str, target: str) -> Rule:
    """Returns the rule for a linear map that the source stores as [out, in]."""
    return Rule((source,), (target,), transpose, transpose)


def head_projection(source: str, target: str) -> Rule:
    """Returns the rule for a query, key or value projection that the source stores as [N * H, D]."""
    return Rule((source,), (target,), split_heads, join_heads)


def head_bias(source: str, target: str) -> Rule:
    """Returns the rule for a query, key or value bias that the source stores as [N * H]."""
    return Rule((source,), (target,), split_head_bias, join_head_bias)


def output_projection(source: str, target: str) -> Rule:
    """Returns the rule for the attention's output projection that the source stores as [D, N * H]."""
    return Rule((source,), (target,), split_output_heads, join_output_heads)


# Transforms of a rule, in pairs that undo each other. N is the number of heads, or of query groups for keys and values.


def unchanged(config: ModelConfig, *arrays: np.ndarray) -> Arrays:
    """Returns the arrays as they are."""
    return arrays


def transpose(config: ModelConfig, kernel: np.ndarray) -> Arrays:
    """[out, in] <-> [in, out]."""
    return (kernel.T,)


def split_heads(config: ModelConfig, kernel: np.ndarray) -> Arrays:
    """A query, key or value projection [N * H, D] -> [D, N, H]."""
    return (kernel.T.reshape(kernel.shape[1], -1, config.head_width),)


def join_heads(config: ModelConfig, kernel_DxNxH: np.ndarray) -> Arrays:
    """Undoes `split_heads`."""
    return (kernel_DxNxH.reshape(kernel_DxNxH.shape[0], -1).T,)


def split_head_bias(config: ModelConfig, bias: np.ndarray) -> Arrays:
    """A query, key or value bias [N * H] -> [N, H]."""
    return (bias.reshape(-1, config.head_width),)


def join_head_bias(config: ModelConfig, bias_NxH: np.ndarray) -> Arrays:
    """Undoes `split_head_bias`."""
    return (bias_NxH.reshape(-1),)


def split_output_heads(config: ModelConfig, kernel: np.ndarray) -> Arrays:
    """The attention's output projection [D, N * H] -> [N, H, D]."""
    return (kernel.T.reshape(config.n_heads, config.head_width, -1),)


def join_output_heads(config: ModelConfig, kernel_NxHxD: np.ndarray) -> Arrays:
    """Undoes `split_output_heads`."""
    return (kernel_NxHxD.reshape(-1, kernel_NxHxD.shape[-1]).T,)
