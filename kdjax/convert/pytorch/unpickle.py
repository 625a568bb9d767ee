"""Reading pickles without running them: a short list of harmless names is known, every other is refused.

A pickle is a program that may call anything it can import. This unpickler imports nothing: plain containers are
themselves, tensors become `StoredTensor`s, and what belongs to Megatron, NumPy or Transformer Engine becomes an
`Inert` record of what it was given. A name outside the lists ends in a `UserError` that says which name it was.
"""

import collections
import io
import pickle
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from kdjax.types import UserError

DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "bool": np.bool_,
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
# Modules whose classes are kept as inert records: bookkeeping of a training run.
INERT_PACKAGES = (
    "megatron",
    "transformer_engine",
    "apex",
    "nemo",
    "lightning",
    "pytorch_lightning",
    "omegaconf",
    "signal",
    "pathlib",
    "numpy",
)
INERT_NAMES = {
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )),
    *(f"torch.distributed.checkpoint.planner.{name}" for name in (
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
    )),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "torch.device",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "io.BytesIO",
    "_io.BytesIO",
    "datetime.timedelta",
}  # fmt: skip

REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")


class Inert:
    """What a class that is not run was called with (`arguments`), and what it was then told (its attributes)."""

    def __new__(cls, *arguments: Any, **keywords: Any) -> "Inert":
        made = super().__new__(cls)
        made.arguments, made.state, made.items = arguments, None, {}
        return made

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
        """The attributes of the pickled object; none when it kept its state in another way."""
        return self.state if isinstance(self.state, dict) else {}

    def __repr__(self) -> str:
        told = ", ".join(map(repr, self.arguments))
        return f"{type(self).__name__}({told})"


class DtypeName(str):
    """A torch dtype, such as "bfloat16"."""


def dtype_of(name: str, where: str) -> np.dtype:
    """The NumPy dtype of a torch dtype's name."""
    if name not in DTYPES:
        raise UserError(f"{where}: tensors of dtype {name} cannot be read; known are {', '.join(DTYPES)}")
    return np.dtype(DTYPES[name])


def _size(values: Any = ()) -> tuple[int, ...]:
    return tuple(values)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Protocol 2 writes bytes as a call of `_codecs.encode`."""
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


def _default_dict(factory: Any = None, *rest: Any) -> dict[Any, Any]:
    return {}


def _parameter(data: Any, *rest: Any) -> Any:
    return data


def _from_type(rebuild: Callable[..., Any], kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes: `rebuild` is one of this module's stand-ins, so the call is harmless."""
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


class Reader(pickle.Unpickler):
    """The unpickler. `tensor` is called in place of the functions in `REBUILD`, `storage` for a storage's reference."""

    def __init__(
        self,
        data: bytes,
        label: str,
        tensor: Callable[..., Any] | None = None,
        storage: Callable[[Any], Any] | None = None,
    ):
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._label, self._tensor, self._storage = label, tensor, storage

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        if full in HARMLESS:
            return HARMLESS[full]
        if full in REBUILD and self._tensor is not None:
            return self._tensor
        if full in INERT_NAMES or module.split(".")[0] in INERT_PACKAGES:
            return type(full, (Inert,), {})
        raise UserError(
            f"{self._label}: its pickle asks for {full}, which is not among the harmless names that are read here. "
            "A model's weights do not need it: be wary of this file, and load it with nothing that trusts pickles"
        )

    def persistent_load(self, pid: Any) -> Any:
        if self._storage is None:
            raise UserError(f"{self._label}: a pickle with storages outside a torch.save file; it cannot be read")
        return self._storage(pid)


def unpickle(
    data: bytes, label: str, tensor: Callable[..., Any] | None = None, storage: Callable[[Any], Any] | None = None
) -> Any:
    """The pickled object. Raises UserError, naming `label`, when it is damaged or asks for an unknown name."""
    try:
        return Reader(data, label, tensor, storage).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(
            f"{label}: its pickle cannot be read ({type(error).__name__}: {error}); copy it again"
        ) from error
