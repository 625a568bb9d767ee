"""The pickle reader refuses every name that could run something, and keeps bookkeeping as inert records."""

import collections
import io
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kdjax.convert.pytorch.pickle_reader import INERT_NAMES, INERT_PACKAGES, Inert, numpy_dtype, unpickle
from kdjax.types import UserError


class Calls:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Calls(os.system, "touch was_run"), f"{os.system.__module__}.system"),
        (Calls(eval, "1"), "builtins.eval"),
        (Calls(getattr, "", "join"), "builtins.getattr"),
        (Calls(io.open, "was_run", "w"), "(_io|io).open"),
        (Calls(pickle.loads, b""), "_?pickle.loads"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_names_that_could_run_something(
    call: Calls, name: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"some.pt: its pickle uses {name}, which is not on the list of harmless"):
        unpickle(pickle.dumps({"args": call}, protocol=protocol), "some.pt")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("module", ["torch.hub", "torch", "torch.distributed.checkpoint", "subprocess", "megatronx"])
def test_modules_that_are_not_listed(module: str) -> None:
    with pytest.raises(UserError, match=rf"uses {re.escape(module)}.load"):
        unpickle(f"c{module}\nload\n.".encode(), "some.pt")


@pytest.mark.parametrize(
    "name", [*(f"{package}.anything.system" for package in sorted(INERT_PACKAGES)), *sorted(INERT_NAMES)]
)
def test_bookkeeping_is_kept_as_it_was_written(name: str) -> None:
    """A call, then attributes: they are recorded, and nothing is called."""
    module, _, kind = name.rpartition(".")
    stream = f"c{module}\n{kind}\n(S'touch was_run'\ntR}}S'a'\nI1\nsb.".encode()
    found = unpickle(stream, "some.pt")
    assert isinstance(found, Inert)
    assert (found.arguments, found.attributes) == (("touch was_run",), {"a": 1})
    assert repr(found) == f"{name}('touch was_run')"


def test_an_inert_object_that_is_a_container_or_has_another_state() -> None:
    """Subclasses of list and dict append and set items; a state need not be a dict."""
    start = b"cmegatron.x\nThing\n)R"
    appended = unpickle(start + b"(I5\nI6\ne" + b"I7\na.", "some.pt")
    assert appended.items == {0: 5, 1: 6, 2: 7}
    assert unpickle(start + b"(S'a'\nI5\nu.", "some.pt").items == {"a": 5}
    other = unpickle(start + b"(I1\nI2\ntb.", "some.pt")
    assert (other.state, other.attributes, other.items) == ((1, 2), {}, {})


def test_containers_and_the_stand_ins() -> None:
    content = {"a": [1, (2.5, None)], "b": {3}, "c": collections.OrderedDict(d=b"\xff\x00"), "e": slice(1, 2)}
    for protocol in (0, 2, 4):
        assert unpickle(pickle.dumps(content, protocol=protocol), "some.pt") == content
    assert unpickle(pickle.dumps(collections.defaultdict(list, a=1)), "some.pt") == {"a": 1}
    assert unpickle(b"ctorch\nSize\n((I2\nI3\ntt" + b"R.", "some.pt") == (2, 3)
    assert unpickle(b"ctorch\nbfloat16\n.", "some.pt") == "bfloat16"
    assert unpickle(b"ctorch\nHalfStorage\n.", "some.pt") == "float16"
    assert unpickle(b"ctorch._utils\n_rebuild_parameter\n(I7\nI1\nNtR.", "some.pt") == 7
    assert unpickle(b"ctorch._tensor\n_rebuild_from_type_v2\n(c__builtin__\nint\nN(S'12'\ntNtR.", "some.pt") == 12


def test_text_encoded_by_codecs() -> None:
    """Protocol 2 writes bytes so, in either encoding."""
    assert unpickle(b"c_codecs\nencode\n(V\\u00e9\nS'latin1'\ntR.", "some.pt") == b"\xe9"
    assert unpickle(b"c_codecs\nencode\n(V\\u00e9\nS'utf-8'\ntR.", "some.pt") == b"\xc3\xa9"


def test_damaged_pickles() -> None:
    with pytest.raises(UserError, match=r"some.pt: its pickle cannot be read \(.*\); copy it again"):
        unpickle(pickle.dumps([1, 2, 3])[:-4], "some.pt")
    with pytest.raises(UserError, match=r"some.pt: its pickle refers to tensors, but it is not a torch.save file"):
        unpickle(b"P7\n.", "some.pt")
    with pytest.raises(UserError, match=r"uses torch._utils._rebuild_tensor_v2"):
        unpickle(b"ctorch._utils\n_rebuild_tensor_v2\n.", "some.pt")


def test_the_classes_that_are_handed_out_cannot_be_changed() -> None:
    """BUILD on such a class would change it for every later pickle."""
    before = dict(vars(Inert))
    stream = b"cargparse\nNamespace\n(N}S'__init__'\nI1\nstb."  # setattr(argparse.Namespace, "__init__", 1)
    with pytest.raises(UserError, match="cannot be read"):
        unpickle(stream, "some.pt")
    assert dict(vars(Inert)) == before


def test_dtypes() -> None:
    assert numpy_dtype("bfloat16", "x") == np.dtype(ml_dtypes.bfloat16)
    assert [numpy_dtype(name, "x") for name in ("float32", "int64", "bool")] == [np.float32, np.int64, np.bool_]
    with pytest.raises(UserError, match=r"x.pt: tensors of dtype complex64 cannot be read; known are float64, .*bool"):
        numpy_dtype("complex64", "x.pt")
