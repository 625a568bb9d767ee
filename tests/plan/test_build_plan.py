"""Plans of building a cache."""

import pytest

from kdjax.plan import build
from kdjax.types import UserError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiler", "uncached")]


def test_a_large_teacher_fits_only_when_it_is_split(capsys: pytest.CaptureFixture[str]) -> None:
    """70 billion parameters in bfloat16 are 131 GiB; a shard of 1/8 is 16.4 GiB."""
    shape = ["--teacher", "llama70b_512xh100", "--sequence-length", "2048", "--microbatch-size", "1", "--tokens", "1e9"]
    assert build.main([*shape, "--mesh", "tensor=8"]) == 0
    split = capsys.readouterr().out
    assert "parameters                           16.43 GiB" in split
    assert "1,000,000,000 tokens take" in split
    assert build.main([*shape, "--mesh", "data=8"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(UserError, match=r"neither model_config.json"):
        build.main(["--teacher", "nowhere"])
    with pytest.raises(UserError, match=r"mesh.tensor = 3"):
        build.main(["--teacher", "llama70b_512xh100", "--mesh", "tensor=3,data=1", "--devices", "3"])
