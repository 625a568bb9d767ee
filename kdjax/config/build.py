"""Builds a `Config` from a recipe or JSON and from words of the command line; nothing else reads a `ConfigDict`."""

import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from kdjax.config.schema import GROUPS, KNOBS, TYPES, Config
from kdjax.types import UserError


def build(settings: Mapping[str, Any] | ConfigDict, overrides: Mapping[str, str] | None = None) -> Config:
    """Returns the configuration of a nested mapping or `ConfigDict`, with overrides as typed on the command line.

    Raises UserError for an unknown key (with the nearest known one) and for a value of the wrong type.
    """
    settings = settings.to_dict() if isinstance(settings, ConfigDict) else settings
    values: dict[str, Any] = {}
    for group in settings:
        _require_known(group, GROUPS, "group")
        if not isinstance(settings[group], Mapping):
            raise UserError(
                f"config group {group!r} holds {settings[group]!r}; it must hold keys, as in {group}.key = value"
            )
        for key, value in settings[group].items():
            dotted = f"{group}.{key}"
            _require_known(dotted, KNOBS, "key")
            if value is not None or type(None) in _options(TYPES[dotted]):  # else an empty placeholder
                values[dotted] = _typed(dotted, value)
    for dotted, text in (overrides or {}).items():
        _require_known(dotted, KNOBS, "key")
        values[dotted] = _typed(dotted, _parsed(text, _options(TYPES[dotted])))
    return Config(
        **{
            group: cls(**{k.partition(".")[2]: v for k, v in values.items() if k.startswith(f"{group}.")})
            for group, cls in GROUPS.items()
        }
    )


def from_json(text: str) -> Config:
    """Returns the configuration that `to_json` wrote."""
    return build(json.loads(text))


def _require_known(name: str, known: Mapping[str, Any], what: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    same_key = [k for k in known if k.partition(".")[2] == name.rpartition(".")[2]]
    group = [k.partition(".")[2] for k in known if k.startswith(name.partition(".")[0] + ".")]
    listed = f"{name.partition('.')[0]} has {', '.join(group)}" if group else f"the groups are {', '.join(GROUPS)}"
    hint = f"did you mean {(same_key or near)[0]!r}? " if same_key or near else ""
    raise UserError(f"unknown config {what} {name!r}: {hint}{listed}")


def _options(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _typed(dotted: str, value: Any) -> Any:
    """Returns the value as the first of the knob's types that takes it. Raises UserError if none does."""
    for kind in _options(TYPES[dotted]):
        try:
            return _cast(value, kind)
        except TypeError:
            continue
    wanted = str(TYPES[dotted]) if isinstance(TYPES[dotted], types.UnionType) else TYPES[dotted].__name__
    raise UserError(f"{dotted} = {value!r} is a {type(value).__name__}; it must be {wanted.replace(' |', ' or')}")


def _cast(value: Any, kind: Any) -> Any:
    """Widens ints to float, narrows integral floats to int, makes one item a tuple. Raises TypeError for the rest."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in (bool, str, type(None)) and isinstance(value, kind):
        return value
    if (kind is float and number) or (kind is int and number and value == int(value)):
        return kind(value)
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(_cast(item, typing.get_args(kind)[0]) for item in items)
    raise TypeError(f"{value!r} is not {kind}")


def _parsed(text: str, options: tuple[Any, ...]) -> Any:
    """Returns the value that a word of the command line stands for; the word itself if it fits none of the types."""
    if type(None) in options and text.lower() == "none":
        return None
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    items = next((typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple), None)
    if items is not None:
        words = [word.strip() for word in text.split(",") if word.strip()]
        return tuple(words) if items is str else tuple(number for word in words for number in _numbers(word))
    return _numbers(text)[0] if int in options or float in options else text


def _numbers(word: str) -> list[Any]:
    """Returns the number that a word states, or the range: 0-3 is 0, 1, 2, 3. Returns other words as they are."""
    first, dash, last = word.partition("-")
    if dash and first.isdecimal() and last.isdecimal():
        return list(range(int(first), int(last) + 1))
    try:
        return [float(word)]
    except ValueError:
        return [word]
