"""The command line: each command has its help, and only `verify` may use an accelerator."""

import importlib

import pytest

from kdjax import cli
from kdjax.convert.__main__ import COMMANDS, main


def test_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, module in COMMANDS.items():
        assert f"{name} {importlib.import_module(module).__doc__.strip().splitlines()[0][:20]}" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert importlib.import_module(COMMANDS[name]).__doc__.strip().splitlines()[0] in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["from-nowhere"], ["inspect"], ["from-hf", "a", "b", "--forc"]])
def test_words_that_are_no_command(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("code", [None, 0, 1])
def test_who_uses_the_accelerator_and_the_exit_code(
    name: str, code: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stayed: list[bool] = []
    monkeypatch.setattr(cli, "stay_on_host", lambda: stayed.append(True))
    monkeypatch.setattr(importlib.import_module(COMMANDS[name]), "run", lambda arguments: code)
    words = {"verify": ["a", "--logits", "b"], "inspect": ["a"]}.get(name, ["a", "b"])
    assert main([name, *words]) == (code or 0)
    assert stayed == ([] if name == "verify" else [True])
