"""What the pickle writer writes, Python's own unpickler reads."""

import argparse
import io
import pickle
from fractions import Fraction
from typing import Any

import pytest

from kdjax.convert.pytorch.pickle_writer import Construct, Global, Instance, Persistent, dumps


@pytest.mark.parametrize(
    "content",
    [
        None,
        [True, False, 0, 1, -1, 255, 2**31 - 1, -(2**31), 2**31, -(2**31) - 1, -(2**63), 2**64 + 1, -(2**200)],
        {"a": 1.5, "\u00e9\n": (), 3: [], (1, "2"): {}},
        ((1,), (1, 2), (1, (2, [3, {"4": 5e-324}])), ["x" * 300]),
    ],
)
def test_containers_and_numbers(content: Any) -> None:
    pickled = dumps(content)
    found = pickle.loads(pickled)
    assert (found, repr(found)) == (content, repr(content))
    assert pickled[:2] == b"\x80\x02"  # protocol 2, which every torch reads


def test_names() -> None:
    """Python imports and calls them and sets attributes."""
    fraction = Construct(Global("fractions", "Fraction"), (3, 4))
    namespace = Instance(Global("argparse", "Namespace"), {"share": fraction})
    expected = [argparse.Namespace(share=Fraction(3, 4)), Fraction(3, 4)]
    assert pickle.loads(dumps([namespace, fraction])) == expected
    assert len({namespace, Instance(namespace.kind, namespace.state)}) == 2  # as keys of a dict they are told apart


def test_other_objects() -> None:
    with pytest.raises(TypeError, match=r"Fraction Fraction\(1, 2\) cannot be pickled"):
        dumps([Fraction(1, 2)])
    assert pickle.loads(dumps([Fraction(1, 2)], str)) == ["1/2"]


def test_references_that_the_reader_resolves() -> None:
    class Reader(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return "resolved", pid

    assert Reader(io.BytesIO(dumps([Persistent(("storage", 1))]))).load() == [("resolved", ("storage", 1))]
