"""A plan as a picture."""

import builtins
from pathlib import Path
from typing import Any

import pytest
from example_plans import config, imagined

from kdjax import cli
from kdjax.plan import plot
from kdjax.plan.hlo import Collective, Work
from kdjax.types import UserError


@pytest.mark.parametrize(
    "changes", [{}, {"mesh__pipe": 4, "model__layers": 4}, {"mesh__pipe": 2, "mesh__schedule": "gpipe"}]
)
def test_a_picture(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Its words are text; a pipeline's microbatches are in their cells, forward and backward on every stage."""
    sent = [Collective("all-reduce", 2**30, 3, ((0, 1),), True, Work(0, 10**9))]
    plan = imagined(config(**changes, mesh__data=2), collectives=sent)
    path = tmp_path / "a.svg"
    cli.check_picture_path(path)
    plot.draw(plan, "gpt2b", path)
    text = path.read_text()
    for words in ("gpt2b on", "memory per device: 1.0 GiB, fits", "limit: 90%", "exposed communication"):
        assert words in text
    stages = plan.schedule.stages
    assert ("bubble" in text) == (stages > 1)
    if stages > 1:
        for microbatch in range(8):
            assert text.count(f">{microbatch}</text>") >= 2 * stages


def test_a_picture_in_pixels(tmp_path: Path) -> None:
    cli.check_picture_path(tmp_path / "a.png")
    plot.draw(imagined(config(), nbytes=2**37), "gpt2b", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"a\.gif: give a file name that ends in \.svg or \.png"):
        cli.check_picture_path(tmp_path / "a.gif")
    with pytest.raises(UserError, match=r"there is no directory .*/nowhere"):
        cli.check_picture_path(tmp_path / "nowhere" / "a.svg")
    really = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return really(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'kdjax\[plot\]'"):
        cli.check_picture_path(tmp_path / "a.svg")
