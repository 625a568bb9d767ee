"""Reads pickles without running them: a short list of harmless names is accepted, and every other name is refused.

A pickle is a program that may call anything it can import. This unpickler imports nothing: plain containers are built
as usual, tensors become `LazyTensor`s, and objects of Megatron, NumPy or Transformer Engine become `Inert` records of
what they were given. Any other name raises a UserError that quotes it.
"""

import collections
import io
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from kdjax.types import UserError

DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint16", "uint8", "bool",
    )
}  # fmt: skip
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip
# Packages whose objects become inert records: a training run's bookkeeping.
INERT_PACKAGES = {
    "megatron", "transformer_engine", "apex", "nemo", "lightning", "pytorch_lightning", "omegaconf",
    "signal", "pathlib", "numpy",
}  # fmt: skip
INERT_NAMES = {
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    *(f"torch.distributed.checkpoint.planner.{name}" for name in (
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
    )),
    "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.device",
    "torch.Tensor", "torch.nn.parameter.Parameter", "argparse.Namespace", "types.SimpleNamespace", "io.BytesIO",
    "_io.BytesIO", "datetime.timedelta",
}  # fmt: skip

REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")


class Inert:
    """Stands for an object whose class is not run: the arguments it was called with, then its state and items."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Inert":
        self = super().__new__(cls)
        self.arguments, self.state, self.items = arguments, None, {}
        return self

    def __init__(self, *arguments: Any, **keywords: Any):
        pass

    arguments: tuple[Any, ...]
    state: Any
    items: dict[Any, Any]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.items[len(self.items)] = value

    def extend(self, values: Any) -> None:
        for value in values:
            self.append(value)

    @property
    def attributes(self) -> dict[str, Any]:
        """The object's attributes; empty if its state is not a dict of them."""
        return self.state if isinstance(self.state, dict) else {}

    def __repr__(self) -> str:
        arguments = ", ".join(map(repr, self.arguments))
        return f"{type(self).__name__}({arguments})"


class DtypeName(str):
    """The name of a torch dtype, such as "bfloat16"."""


def numpy_dtype(name: str, label: str) -> np.dtype:
    """Returns the NumPy dtype of a torch dtype's name. Raises UserError, naming the file `label`, if there is none."""
    if name not in DTYPES:
        raise UserError(f"{label}: tensors of dtype {name} cannot be read; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def _size(values: Any = ()) -> tuple[int, ...]:
    return tuple(values)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Returns the bytes that protocol 2 writes as a call of `_codecs.encode`."""
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


def _default_dict(factory: Any = None, *rest: Any) -> dict[Any, Any]:
    return {}


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _from_type(rebuild: Callable[..., Any], kind: Any, arguments: Any, state: Any) -> Any:
    """Returns a tensor that had attributes. `rebuild` is one of this module's stand-ins, so calling it is harmless."""
    return rebuild(*arguments)


HARMLESS: dict[str, Any] = {
    **{f"builtins.{kind.__name__}": kind for kind in (dict, list, set, frozenset, tuple, int, float, complex, slice)},
    "collections.OrderedDict": collections.OrderedDict,
    "collections.defaultdict": _default_dict,
    "_codecs.encode": _encode,
    "torch.Size": _size,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    **{f"torch.{name}": DtypeName(name) for name in (*DTYPES, "complex64", "complex128", "half", "float8_e8m0fnu")},
    **{f"torch.{name}": DtypeName(dtype) for name, dtype in STORAGES.items()},
    **{f"torch.storage.{name}": DtypeName(dtype) for name, dtype in STORAGES.items()},
}  # fmt: skip


class SafeUnpickler(pickle.Unpickler):
    """An unpickler that imports nothing.

    `rebuild_tensor` is called in place of the functions in `REBUILD`, `resolve_storage` with a storage's reference.
    """

    def __init__(
        self,
        data: bytes,
        label: str,
        rebuild_tensor: Callable[..., Any] | None = None,
        resolve_storage: Callable[[Any], Any] | None = None,
    ):
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._label, self._rebuild_tensor, self._resolve_storage = label, rebuild_tensor, resolve_storage

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        if full in HARMLESS:
            return HARMLESS[full]
        if full in REBUILD and self._rebuild_tensor is not None:
            return self._rebuild_tensor
        if full in INERT_NAMES or module.split(".")[0] in INERT_PACKAGES:
            return type(full, (Inert,), {})
        raise UserError(
            f"{self._label}: its pickle uses {full}, which is not on the list of harmless names. A model's weights do "
            "not need it: do not trust this file, and do not load it with a program that runs pickles"
        )

    def persistent_load(self, pid: Any) -> Any:
        if self._resolve_storage is None:
            raise UserError(f"{self._label}: its pickle refers to tensors, but it is not a torch.save file")
        return self._resolve_storage(pid)


def unpickle(
    data: bytes,
    label: str,
    rebuild_tensor: Callable[..., Any] | None = None,
    resolve_storage: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns the pickled object. Raises UserError, naming the file `label`, for damage and for unknown names."""
    try:
        return SafeUnpickler(data, label, rebuild_tensor, resolve_storage).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise UserError(
            f"{label}: its pickle cannot be read ({type(error).__name__}: {error}); copy it again"
        ) from error
