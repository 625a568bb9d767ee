"""Counts the operations of a program as JAX traced it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend


def matmul_flops(f: Callable[..., Any], *arguments: Any) -> int:
    """Returns the multiplications and additions of all matmuls in `f(*arguments)`, of arrays or their shapes.

    They are counted on the jaxpr: a scan's body times its length (XLA's own `cost_analysis` counts it once), both
    branches of a conditional, and one iteration of a `while` loop, whose length is unknown.
    """
    return _count(jax.make_jaxpr(f)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    flops = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            flops += 2 * depth * equation.outvars[0].aval.size
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            flops += times * _count(inner)
    return flops
