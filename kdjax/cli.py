"""What the commands share: the `kdjax` dispatcher, exit codes, logging and the progress bar."""

import argparse
import importlib
import logging
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from tqdm import tqdm

COMMANDS = {  # name: module with `main(argv)`, and what it does
    "train": ("kdjax.train", "distil a student from cached teacher logits"),
    "plan": ("kdjax.plan.__main__", "memory, communication and step time of a run, before it is queued"),
    "convert": ("kdjax.convert.__main__", "Megatron, NeMo, Hugging Face and GGUF checkpoints in and out"),
    "cache": ("kdjax.cache.__main__", "build, import, check and describe caches of teacher targets"),
    "launch": ("kdjax.launch", "start several processes of a command on this machine"),
}


def main() -> None:
    """Runs `kdjax COMMAND ...`, the console script: the same as `python -m kdjax.COMMAND ...`."""
    command, *argv = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        run(lambda: importlib.import_module(COMMANDS[command][0]).main(argv))
    if command not in ("-h", "--help"):
        print(f"error: there is no command {command!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    print("usage: kdjax COMMAND ...; each command has its own --help\n")
    print("\n".join(f"  {name:10}{what}" for name, (_, what) in COMMANDS.items()))


def run(main: Callable[[], int]) -> None:
    """Exits with main's code; on a UserError prints it without a traceback and exits with 2."""
    from kdjax.types import UserError  # here, because it imports JAX, which `kdjax --help` does not need

    # By force: some libraries set logging up when they are imported, and theirs would stay.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("kdjax").setLevel(logging.INFO)
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def run_subcommand(
    commands: Mapping[str, str],
    compute: Collection[str],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
) -> int:
    """Runs the command that argv names, and returns its exit code.

    `commands` gives each command's module, which has `add_arguments(parser)` and `run(arguments)`; its docstring is the
    command's help. All but those in `compute` leave accelerators alone. Raises UserError for the user's mistakes.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=raw)
    parsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module_name in commands.items():
        module = importlib.import_module(module_name)
        text = (module.__doc__ or "").strip()
        command = parsers.add_parser(
            name,
            help=text.splitlines()[0],
            description=text.replace("%", "%%"),
            formatter_class=raw,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, computes=name in compute)
    arguments = parser.parse_args(argv)
    if not arguments.computes:
        stay_on_host()
    return arguments.run(arguments) or 0


def stay_on_host() -> None:
    """Makes JAX use the CPU and take no accelerator, for commands that compute nothing. Call it before JAX runs."""
    import jax  # here, because `kdjax --help` does not need it

    if not jax.config.jax_platforms:  # type: ignore[attr-defined]  # JAX makes its options at run time
        jax.config.update("jax_platforms", "cpu")


PICTURE_SUFFIXES = (".svg", ".png")


def check_picture_path(path: Path) -> None:
    """Raises UserError when no picture can be written there. Call it before spending time on the contents."""
    from kdjax.types import UserError

    if path.suffix not in PICTURE_SUFFIXES:
        raise UserError(f"--picture {path}: give a file name that ends in {' or '.join(PICTURE_SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--picture {path}: there is no directory {path.absolute().parent}")
    pyplot()


def pyplot() -> Any:
    """Returns matplotlib.pyplot, which draws into files. Raises UserError if matplotlib is not installed."""
    from kdjax.types import UserError

    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--picture draws with matplotlib: pip install 'kdjax[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text that can be searched, and read aloud
    import matplotlib.pyplot

    return matplotlib.pyplot


class Progress:
    """A bar with the time left on a terminal, a plain line every ten seconds elsewhere. A context manager.

    Args:
        doing: what is being done, such as "checking records"; it starts the bar and each line.
        total: how much there is to do, in `unit`s; `start` of it is done already.
        unit: "B" is shown with prefixes (kB, MB).
        lines_to: where plain lines go; None: stderr, as the bar.
        delay_s: nothing is shown for work that is done sooner.
    """

    LINE_EVERY_S = 10.0

    def __init__(
        self,
        doing: str,
        total: int,
        unit: str,
        *,
        start: int = 0,
        lines_to: TextIO | None = None,
        delay_s: float = 0.0,
        quiet: bool = False,
    ):
        self._doing, self._total, self._unit, self._done = doing, total, unit, start
        self._lines_to, self._quiet = lines_to, quiet
        self._line_due = time.monotonic() + delay_s
        self._first: tuple[int, float] | None = None  # amount and time of the first `add`, before which JAX compiles
        self._bar: tqdm | None = None
        if sys.stderr.isatty() and not quiet:
            options = {"unit": unit, "unit_scale": unit == "B", "delay": delay_s, "dynamic_ncols": True}
            self._bar = tqdm(desc=doing, total=total, initial=start, leave=not delay_s, **options)

    def add(self, amount: int, text: str = "") -> None:
        """`amount` more is done; `text` is shown beside it."""
        self._done += amount
        now = time.monotonic()
        first, began = self._first = self._first or (self._done, now)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(amount)
        elif now >= self._line_due or (self._done == self._total and text):
            self._line_due = now + self.LINE_EVERY_S
            left = (now - began) / (self._done - first) * (self._total - self._done) if self._done > first else None
            parts = [f"{self._doing} {self._amount(self._done)}/{self._amount(self._total)}{self._suffix}", text]
            self.say("  ".join(part for part in [*parts, "" if left is None else f"{left:.0f} s left"] if part))

    def say(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif not self._quiet:
            print(line, file=self._lines_to or sys.stderr, flush=True)

    def close(self) -> None:
        """Removes or completes the bar."""
        if self._bar is not None:
            self._bar.close()

    def _amount(self, amount: int) -> str:
        return tqdm.format_sizeof(amount) if self._unit == "B" else str(amount)

    @property
    def _suffix(self) -> str:
        return "B" if self._unit == "B" else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
