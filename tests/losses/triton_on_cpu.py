"""Runs `jax_triton.triton_call` without a GPU: in Triton's interpreter, on NumPy arrays instead of torch tensors.

`TRITON_INTERPRET=1` must be in the environment when triton is imported.
"""

from typing import Any

import jax
import jax_triton
import numpy as np
import pytest
import triton.runtime.interpreter as interpreter

TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32"}


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes jax-triton call Triton's interpreter."""
    monkeypatch.setattr(jax_triton, "triton_call", _triton_call)
    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        """Lets an array [1] bound a loop, as Triton 3.9 does; before, int() was called on it, which NumPy rejects."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)


class Memory:
    """A NumPy array with the part of a torch tensor's interface that the interpreter uses to read and write memory."""

    def __init__(self, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.array, self.dtype = array, TYPES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def itself(self, *_: Any, **__: Any) -> "Memory":
        """Stands in for copies to and from the host, where the array already is."""
        return self

    untyped_storage = cpu = new_empty = set_ = storage_offset = size = stride = copy_ = itself


def _triton_call(
    *arrays: jax.Array,
    kernel: Any,
    out_shape: list[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    input_output_aliases: dict[int, int],
    name: str,
    num_warps: int,
    compute_capability: int,
    **settings: Any,
) -> list[jax.Array]:
    """Runs the programs of the grid in turn, one NumPy operation per instruction. Outputs start as garbage."""

    def run(*inputs: Any) -> list[np.ndarray]:
        inputs = [np.array(x) for x in inputs]
        outputs = [np.full(out.shape, 77, out.dtype) for out in out_shape]
        for i, o in input_output_aliases.items():
            outputs[o] = inputs[i]
        kernel[grid](*map(Memory, [*inputs, *outputs]), **settings)
        return outputs

    return list(jax.pure_callback(run, out_shape, *arrays))
