"""`import kdjax`: the public names, and that JAX is imported only when one of them is used."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdjax


def test_each_name_is_the_one_of_its_module() -> None:
    """And the imports that type checkers see are those that happen."""
    source = ast.parse(Path(kdjax.__file__).read_text())
    block = next(node for node in source.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(seen) == sorted(kdjax.__all__)
    for name, module in seen.items():
        assert getattr(kdjax, name) is getattr(importlib.import_module(module), name)
        assert name in dir(kdjax)


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'kdjax' has no attribute 'nothing'"):
        _ = kdjax.nothing
    assert re.fullmatch(r"\d+\.\d+\.\d+", kdjax.__version__)


def test_help_does_not_import_jax() -> None:
    script = """
import sys
import kdjax, kdjax.cli
assert "topk_kd_loss" in dir(kdjax) and kdjax.__version__
sys.argv = ["kdjax", "--help"]
kdjax.cli.main()
assert "jax" not in sys.modules
kdjax.topk_kd_loss
assert "jax" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "distil a student" in done.stdout
