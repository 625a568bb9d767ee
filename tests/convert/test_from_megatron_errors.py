"""Damaged and unsuitable checkpoints: each is an error that names the cause, and nothing is left at OUT."""

import errno
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import megatron_goldens as megatron
import numpy as np
import pytest
import torch_writer as writer

from kdjax import cli
from kdjax.checkpoint import read_model_config
from kdjax.convert import model_writer
from kdjax.convert.__main__ import main
from kdjax.convert.from_megatron import convert
from kdjax.types import UserError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of a torch_dist checkpoint, to be spoiled."""
    shutil.copytree(megatron.unpacked("llamaish") / "torch_dist_tp2pp2", tmp_path / "in" / "source")
    return tmp_path / "in" / "source"


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where the model should go; fails the test if anything is there afterwards."""
    (tmp_path / "out").mkdir()
    yield tmp_path / "out" / "model"
    assert os.listdir(tmp_path / "out") == []


def rewritten(source: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    """Writes the plainest checkpoint again with changed arrays."""
    arrays, args = megatron.tensors("llamaish"), megatron.args("llamaish")
    change(arrays)
    shutil.rmtree(source)
    writer.save_distributed(source, arrays, {"args": writer.namespace(**args), "iteration": 100})
    return source


def test_a_missing_key(source: Path, out: Path) -> None:
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    with pytest.raises(
        UserError, match=rf"{source} does not fit .*(\n.*)*{name} \(64, 160\): missing; needed for layers/mlp/down"
    ):
        convert(rewritten(source, lambda arrays: arrays.pop(name)), out)


def test_an_extra_key(source: Path, out: Path) -> None:
    name = "decoder.layers.2.mlp.linear_fc2.bias"
    with pytest.raises(UserError, match=rf"{name} \(64,\) float32 in .*__0_0.distcp: no rule of this architecture"):
        convert(rewritten(source, lambda arrays: arrays.update({name: np.zeros(64, np.float32)})), out)


def test_a_wrong_shape(source: Path, out: Path) -> None:
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    message = rf"{name} \(64, 158\) float32 in .*__0_0.distcp: layers/mlp/down/kernel needs \(64, 160\)"
    with pytest.raises(UserError, match=message):
        convert(rewritten(source, lambda arrays: arrays.update({name: arrays[name][:, :158]})), out)


def test_a_wrong_dtype(source: Path, out: Path) -> None:
    name = "decoder.final_layernorm.weight"
    with pytest.raises(UserError, match=rf"{name} \(64,\) int32 in .*: its dtype must be one of float32, bfloat16"):
        convert(rewritten(source, lambda arrays: arrays.update({name: np.zeros(64, np.int32)})), out)


def test_one_error_lists_everything(source: Path, out: Path) -> None:
    with pytest.raises(UserError) as raised:
        convert(source, out, ["layers=5", "d_ff=128"])
    lines = str(raised.value).splitlines()
    assert re.match(r".*layers 5, d_model 64, heads 4/2, d_ff 128, vocabulary 512\).*--arch key=value:$", lines[0])
    assert any("decoder.layers.4.mlp.linear_fc1.weight (256, 64): missing" in line for line in lines)
    assert any("decoder.layers.0.mlp.linear_fc2.weight (64, 160)" in line and "(64, 128)" in line for line in lines)


def test_a_truncated_shard(source: Path, out: Path) -> None:
    shard = source / "iter_0000100" / "__2_1.distcp"
    os.truncate(shard, shard.stat().st_size - 700)
    with pytest.raises(
        UserError, match=r"__2_1.distcp has \d+ bytes and should hold an entry of \d+ bytes at byte \d+: .*truncated"
    ):
        convert(source, out)


def test_a_missing_shard(source: Path, out: Path) -> None:
    (source / "iter_0000100" / "__2_1.distcp").unlink()
    with pytest.raises(UserError, match=r"__2_1.distcp, which holds .*, is missing beside .*\.metadata"):
        convert(source, out)


def test_a_truncated_metadata(source: Path, out: Path) -> None:
    os.truncate(source / "iter_0000100" / ".metadata", 3000)
    with pytest.raises(UserError, match=r"\.metadata: its pickle cannot be read"):
        convert(source, out)


def test_metadata_of_something_else(source: Path, out: Path) -> None:
    (source / "iter_0000100" / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"\.metadata does not describe tensors \(AttributeError"):
        convert(source, out)


def test_a_truncated_rank_file_and_nemo_file(tmp_path: Path, out: Path) -> None:
    shutil.copytree(megatron.unpacked("llamaish") / "torch_tp2pp1_bf16", tmp_path / "ranks")
    file = tmp_path / "ranks" / "iter_0000100" / "mp_rank_01" / "model_optim_rng.pt"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=r"mp_rank_01/model_optim_rng.pt is not a complete torch.save file"):
        convert(tmp_path / "ranks", out)
    shutil.copy(megatron.unpacked("llamaish") / "legacy_tp1_swiglu.nemo", tmp_path / "cut.nemo")
    os.truncate(tmp_path / "cut.nemo", 300000)
    with pytest.raises(UserError, match=r"cut.nemo is not a complete, uncompressed tar"):
        convert(tmp_path / "cut.nemo", out)


def test_a_missing_rank(tmp_path: Path, out: Path) -> None:
    shutil.copytree(megatron.unpacked("llamaish") / "torch_tp2pp2", tmp_path / "ranks")
    shutil.rmtree(tmp_path / "ranks" / "iter_0000100" / "mp_rank_01_000")
    with pytest.raises(UserError, match=r"the file of tensor rank 1 of pipeline rank 0 is missing"):
        convert(tmp_path / "ranks", out)
    shutil.rmtree(tmp_path / "ranks" / "iter_0000100" / "mp_rank_01_001")
    with pytest.raises(UserError, match=r"args.tensor_model_parallel_size is 2, but there are files of 1 such ranks"):
        convert(tmp_path / "ranks", out)


def test_ranks_of_experts(tmp_path: Path, out: Path) -> None:
    shutil.copytree(megatron.unpacked("llamaish") / "torch_tp2pp2", tmp_path / "ranks")
    for rank in sorted((tmp_path / "ranks" / "iter_0000100").iterdir()):
        rank.rename(rank.with_name(f"{rank.name}_003"))
    with pytest.raises(
        UserError, match=r"mp_rank_00_000_003/model_optim_rng.pt: belongs to an expert-parallel rank; .*mixture"
    ):
        convert(tmp_path / "ranks", out)


class RunsACommand:
    """Pickles to a call of os.system."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("file", ["common.pt", ".metadata"])
def test_a_pickle_that_asks_for_os_system(file: str, source: Path, out: Path, tmp_path: Path) -> None:
    evil = {"args": RunsACommand(tmp_path / "was_run")}
    path = source / "iter_0000100" / file
    if file == ".metadata":
        path.write_bytes(pickle.dumps(evil))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(evil, protocol=2))
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: its pickle uses (posix|nt).system"):
        convert(source, out)
    assert not (tmp_path / "was_run").exists()


def test_a_disk_without_room(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(out.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"out has 0.0 MB free and the model may need 1.0 MB; free some"):
        convert(source, out)


def test_a_disk_that_fills_up(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes
    written = []

    def until_full(path: Path, data: bytes) -> int:
        written.append(path)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", until_full)
    with pytest.raises(
        UserError, match=r"out filled up before model was complete \(.*No space left .*nothing was left"
    ):
        convert(source, out)
    assert len(written) == 6


def test_a_conversion_that_is_interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, data: bytes) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out)


def test_a_file_that_shrinks_while_it_is_converted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that fails in the middle, such as of a network disk: nothing looks complete."""
    lay_out = model_writer._create_orbax_checkpoint

    def shrink(*arguments: Any) -> None:
        lay_out(*arguments)
        os.truncate(source / "iter_0000100" / "__3_0.distcp", 5000)

    monkeypatch.setattr(model_writer, "_create_orbax_checkpoint", shrink)
    with pytest.raises(UserError, match=r"__3_0.distcp"):
        convert(source, out)


def test_an_existing_out(source: Path, tmp_path: Path) -> None:
    """Refused; with --force replaced, if it is a model directory, and kept when the conversion fails."""
    out = tmp_path / "model"
    convert(source, out, ["vocab_size=512"])
    before = (out / "provenance.json").read_bytes()
    with pytest.raises(UserError, match=r"model exists already; name another directory, or pass --force"):
        convert(source, out)
    with pytest.raises(UserError, match="does not fit"):
        convert(source, out, ["d_ff=128"], force=True)
    assert (out / "provenance.json").read_bytes() == before
    convert(source, out, ["vocab_size=500"], force=True)
    assert json.loads((out / "provenance.json").read_text())["vocab_size"] == 500
    assert read_model_config(out).vocab_size == 500
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=r"only directories that hold model_config.json, and .*mine does not"):
        convert(source, tmp_path / "mine", force=True)
    assert sorted(os.listdir(tmp_path)) == ["in", "mine", "model"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda source: (source / "latest_checkpointed_iteration.txt").write_text("7"),
            r"points to iter_0000007, which",
        ),
        (
            lambda source: (source / "latest_checkpointed_iteration.txt").write_text("x"),
            r"holds 'x'; it must hold the",
        ),
        (
            lambda source: (
                (source / "latest_checkpointed_iteration.txt").unlink(),
                (source / "iter_0000007" / "x").mkdir(parents=True),
                (source / "iter_0000007" / "x" / "y").touch(),
            ),
            r"holds iter_0000007, iter_0000100 and no latest_checkpointed_iteration.txt; name one",
        ),
        (lambda source: shutil.rmtree(source), r"there is no such file or directory"),
        (lambda source: (shutil.rmtree(source), source.mkdir()), r"no Megatron checkpoint was found in it; looked for"),
        (
            lambda source: (shutil.rmtree(source), source.write_bytes(b"\x1f\x8b" * 99)),
            r"is not a complete, uncompressed tar",
        ),
        (
            lambda source: (source / "iter_0000100" / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
            r"metadata.json: the tensors are stored as 'zarr'; only 'torch_dist' can be read",
        ),
    ],
)
def test_places_without_a_checkpoint(spoil: Callable[[Path], object], message: str, source: Path, out: Path) -> None:
    spoil(source)
    with pytest.raises(UserError, match=message):
        convert(source, out)


def test_the_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["from-megatron", str(source), str(tmp_path / "out"), "--arch", "vocab_size=499"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"vocab_size +499 +--arch vocab_size=499", shown)
    assert "skipped: 16 x Transformer Engine's _extra_state\nskipped: 4 x random number" in shown
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: main(["from-megatron", str(source), str(tmp_path / "out")]))
    assert ended.value.code != 0
    assert "error: " in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["from-megatron", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for word in (".nemo", "torch_dist", "--arch", "vocab_size", "load_model", "--force"):
        assert word in shown
