"""Tensors must match an architecture exactly; one error lists all that do not."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from kdjax.config import ModelConfig
from kdjax.convert.conversion import MOST_PROBLEMS, Conversion, match_tensors
from kdjax.convert.megatron.rules import megatron_rules
from kdjax.convert.rules import Rule, copy
from kdjax.convert.tensors import LazyTensor, tensor_in_memory
from kdjax.model import named_shapes
from kdjax.types import UserError

CONFIG = ModelConfig(layers=2, d_model=8, n_heads=2, n_groups=1, head_dim=4, d_ff=5, vocab_size=7, padded_vocab_size=9)
SKIP = {"buffers": r".*\.buffer", "other things": r"other.*"}
NORM = "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
Tensors = dict[str, LazyTensor]


def tensors(dtype: type = np.float32) -> Tensors:
    """Returns the tensors that the rules ask for, each element with another value."""
    shapes, found = named_shapes(CONFIG), {}
    for rule in megatron_rules(CONFIG):
        for layer in rule.layers(CONFIG):
            for name, shape in zip(rule.source_names(layer), rule.source_shapes(CONFIG, shapes), strict=True):
                array = np.arange(np.prod(shape)).reshape(shape) + 1000 * len(found)
                found[name] = tensor_in_memory(array.astype(dtype), "a.pt", name)
    return found


def match(found: Tensors, rules: list[Rule] | None = None) -> Conversion:
    return match_tensors(rules or megatron_rules(CONFIG), found, CONFIG, SKIP, "the checkpoint")


def test_a_checkpoint_that_fits() -> None:
    found = tensors(ml_dtypes.bfloat16)
    for name in ("x.buffer", "y.buffer", "others"):
        found[name] = tensor_in_memory(np.zeros(3))
    conversion = match(found)
    assert conversion.shapes == named_shapes(CONFIG)
    assert conversion.skipped == {"buffers": 2, "other things": 1}
    assert set(conversion.dtypes.values()) == {np.dtype(ml_dtypes.bfloat16)}
    assert conversion.nbytes == 2 * sum(int(np.prod(shape)) for shape in named_shapes(CONFIG).values())
    pieces = list(conversion)
    assert [piece.layer for piece in pieces if piece.parameter == "layers/attn/q/kernel"] == [0, 1]
    assert [piece.layer for piece in pieces if piece.parameter == "embed"] == [None]
    for piece in pieces:
        assert piece.array.shape == conversion.shapes[piece.parameter][0 if piece.layer is None else 1 :]
    (second,) = [piece for piece in pieces if piece.parameter == "layers/mlp_norm/scale" and piece.layer == 1]
    np.testing.assert_array_equal(second.array, found[NORM].read())


def drop(found: Tensors) -> None:
    del found[NORM]


def add(found: Tensors) -> None:
    found["decoder.layers.2.x"] = tensor_in_memory(np.zeros((9, 8), np.float32), "a.pt", "module.x")


def reshape(found: Tensors) -> None:
    found[NORM] = tensor_in_memory(np.zeros(9, np.float32), "b.pt", NORM)


def integers(found: Tensors) -> None:
    found[NORM] = tensor_in_memory(np.zeros(8, np.int32), "b.pt", NORM)


def another_dtype(found: Tensors) -> None:
    found[NORM] = tensor_in_memory(np.zeros(8, np.float16), "b.pt")


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (drop, [f"  {NORM} (8,): missing; needed for layers/mlp_norm/scale"]),
        (
            add,
            ["  decoder.layers.2.x (9, 8) float32 in a.pt, stored as module.x: no rule of this architecture uses it"],
        ),
        (reshape, [f"  {NORM} (9,) float32 in b.pt: layers/mlp_norm/scale needs (8,)"]),
        (
            integers,
            [
                f"  {NORM} (8,) int32 in b.pt: its dtype must be one of float32, bfloat16, float16",
                "  decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight: stored as float32, int32; a parameter can have "
                "one dtype only",
            ],
        ),
        (
            another_dtype,
            [
                "  decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight: stored as float16, float32; a parameter can "
                "have one dtype only"
            ],
        ),
    ],
)
def test_tensors_that_do_not_fit(change: Callable[[Tensors], None], lines: list[str]) -> None:
    found = tensors()
    change(found)
    with pytest.raises(UserError) as raised:
        match(found)
    first, *rest = str(raised.value).splitlines()
    assert first == (
        "the checkpoint does not fit the architecture printed above (layers 2, d_model 8, heads 2/1, d_ff 5, "
        "vocabulary 9); if the architecture is wrong, correct it with --arch key=value:"
    )
    assert rest == lines


@pytest.mark.parametrize("count", [MOST_PROBLEMS, MOST_PROBLEMS + 3])
def test_a_long_list_is_cut(count: int) -> None:
    extra = {f"x{number}": tensor_in_memory(np.zeros(1)) for number in range(count)}
    with pytest.raises(UserError) as raised:
        match(tensors() | extra)
    lines = str(raised.value).splitlines()
    assert len([line for line in lines if "no rule" in line]) == MOST_PROBLEMS
    assert lines[-1] == ("  and 3 more" if count > MOST_PROBLEMS else lines[MOST_PROBLEMS])


def test_tables_of_rules_that_are_wrong() -> None:
    """These are mistakes of the program: a parameter that no rule fills, or a tensor that two rules use."""
    rules = megatron_rules(CONFIG)
    with pytest.raises(AssertionError, match="the rules fill"):
        match(tensors(), rules[1:])
    with pytest.raises(AssertionError, match="the rules fill"):
        match(tensors(), [*rules, rules[0]])
    twice = [rule for rule in rules if rule.targets != ("final_norm/scale",)]
    with pytest.raises(AssertionError, match="used twice"):
        match(tensors(), [*twice, copy(NORM, "final_norm/scale")])
