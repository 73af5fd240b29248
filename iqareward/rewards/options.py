"""Options of rewards: their form as text, and the check against the signature that takes them."""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import torch

_WORDS = {"true": True, "false": False, "none": None, "null": None}
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"]|"")*\"""", re.DOTALL)
_PLAIN = re.compile(r"""[^\s,=()\[\]'"]+""")
_INTEGER = re.compile(r"-?\d{1,4000}")  # Python refuses to convert more digits
_FLOAT = re.compile(r"-?\d*\.?\d+(?:[eE][+-]?\d+)?")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}


def read_options(text: str) -> dict[str, Any]:
    """Options such as `net=vgg, weights='a, b.pth'`.

    Numbers, true, false and none are values of Python, lists are in brackets or parentheses, and anything else is text.
    Text with commas, brackets or quotes stands in quotes, of which one inside is written twice. Backslashes mean
    themselves.

    Raises:
        ValueError: an item is no option, or an option is given twice.

    Example:
        >>> read_options("net=vgg, batch_size=4, weights='C:\\\\new, (1).pth', task=(quality, aesthetics)")
        {'net': 'vgg', 'batch_size': 4, 'weights': 'C:\\\\new, (1).pth', 'task': ('quality', 'aesthetics')}
    """
    options: dict[str, Any] = {}
    for item in _items(text):
        key, _, value = (part.strip() for part in item.partition("="))
        if not key.isidentifier() or not value:
            raise ValueError(f"load expected options such as 'lpips(net=vgg, batch_size=4)', got {item!r}.")
        if key in options:
            raise ValueError(f"load got the option {key!r} twice: {text!r}.")
        options[key] = _read(value)
    return options


def write_options(options: Mapping[str, Any]) -> str:
    """The text of options, with parentheses, from which `read_options` makes them; "" if there are none.

    Example:
        >>> write_options({"weights": "my file, 2.pth", "batch_size": 4}), write_options({})
        ("(weights='my file, 2.pth', batch_size=4)", '')
    """
    return f"({', '.join(f'{key}={_written(value)}' for key, value in options.items())})" if options else ""


def closing(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`.

    Raises:
        ValueError: there is none.
    """
    depth = 0
    for place, char in _outside_quotes(text, start):
        depth += (char in "([") - (char in ")]")
        if depth == 0:
            return place + 1
    raise ValueError(
        f"{text!r} has a bracket or a quote that is not closed. Put values that hold brackets or quotes in quotes."
    )


def name_with(reward: object, name: str, **options: Any) -> str:
    """The name of a reward, followed by those options that differ from the defaults of its class.

    Names tell rewards apart in logs, so every option that changes scores belongs there. Objects are left out.

    Args:
        reward: The reward that is being made.
        name: Its name without options.
        options: Values by the names that the constructor gives them.

    Example:
        >>> from iqareward import LPIPSReward
        >>> LPIPSReward("vgg", weights="vgg16.pth").name
        'lpips_vgg(weights=vgg16.pth)'
    """
    parameters = inspect.signature(type(reward)).parameters
    changed = {
        key: value
        for key, value in options.items()
        if _has_text(value) and (key not in parameters or value != parameters[key].default)
    }
    return name + write_options(changed)


def _has_text(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_has_text, value))
    return isinstance(value, str | int | float | Path | torch.dtype | NoneType)


def checked(
    who: str, text: str, options: Mapping[str, Any], known: Mapping[str, Any], *, others: bool = False
) -> dict[str, Any]:
    """Options as their type hints want them: words become dtypes, lists tuples.

    Args:
        who: The reward's name in the catalogue.
        text: What the user wrote, for the message.
        options: Values by name.
        known: Type hints by name.
        others: Whether unknown options are passed on, to be checked by who takes them.

    Raises:
        ValueError: an option is unknown, or its value is of another kind.
    """
    if not others and (wrong := sorted(options.keys() - known.keys())):
        raise ValueError(
            f"{text!r} has an option that {who} does not have: {', '.join(wrong)}. It has {', '.join(sorted(known))}."
        )
    fitted: dict[str, Any] = {}
    for key, value in options.items():
        try:
            fitted[key] = _fit(value, known.get(key, Any))
        except TypeError:
            raise ValueError(f"{who} expected {kind_of(known[key])} as option {key!r}, got {value!r}.") from None
    return fitted


def _outside_quotes(text: str, start: int = 0) -> Iterator[tuple[int, str]]:
    """Characters that are not in quotes; a quote begins where a value does."""
    quote, before = "", "="
    for place in range(start, len(text)):
        char = text[place]
        if quote:
            if char == quote:
                quote, before = "", char
        elif char in "'\"" and (before in "=,([" or (before == char == text[place - 1])):
            quote = char
        else:
            before = before if char.isspace() else char
            yield place, char


def _items(text: str) -> list[str]:
    """Cut at commas that are neither in quotes nor in brackets."""
    start, depth, items = 0, 0, list[str]()
    for place, char in _outside_quotes(text):
        depth += (char in "([") - (char in ")]")
        if char == "," and depth == 0:
            items.append(text[start:place])
            start = place + 1
    return [item.strip() for item in (*items, text[start:]) if item.strip()]


def _read(text: str) -> Any:
    if _QUOTED.fullmatch(text):
        return text[1:-1].replace(2 * text[0], text[0])
    if text[0] in "([" and text[-1] in ")]" and closing(text, 0) == len(text):
        values = [_read(item) for item in _items(text[1:-1])]
        return tuple(values) if text[0] == "(" else values
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _written(value: Any) -> str:
    if isinstance(value, bool | NoneType):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        items = ", ".join(map(_written, value))
        return f"({items})" if isinstance(value, tuple) else f"[{items}]"
    text = str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)
    if _PLAIN.fullmatch(text) and _read(text) == text:
        return text
    quote = '"' if "'" in text and '"' not in text else "'"
    return f"{quote}{text.replace(quote, 2 * quote)}{quote}"


def _fit(value: Any, hint: Any) -> Any:
    """The value as the type hint wants it; a TypeError if it is of another kind."""
    origin, kinds = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for kind in kinds:
            if not (kind is str and torch.device in kinds):  # whose text must be that of a device
                with suppress(TypeError):
                    return _fit(value, kind)
        raise TypeError
    if origin is Literal:
        if not any(value == word and type(value) is type(word) for word in kinds):
            raise TypeError
    elif hint is torch.dtype and isinstance(value, str):
        word = value.lower().removeprefix("torch.")
        value = getattr(torch, _DTYPES.get(word, word), None)
        if not isinstance(value, torch.dtype):
            raise TypeError
    elif hint is torch.device and isinstance(value, str):
        try:
            torch.device(value)
        except RuntimeError:
            raise TypeError from None
    elif hint is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:
            raise TypeError from None
    elif hint is Path and isinstance(value, str):
        value = Path(value)
    elif origin is tuple and isinstance(value, list | tuple):
        wanted = kinds[:1] * len(value) if kinds[1:] == (...,) else kinds
        if len(wanted) != len(value):
            raise TypeError
        value = tuple(_fit(each, kind) for each, kind in zip(value, wanted, strict=True))
    else:
        kind = NoneType if hint is None else origin or hint
        if isinstance(kind, type) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise TypeError
    return value


def kind_of(hint: Any) -> str:
    """A type hint in words."""
    origin, kinds = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(
            dict.fromkeys(kind_of(kind) for kind in kinds if not (kind is str and torch.device in kinds))
        )
    if origin is Literal:
        return " or ".join(map(_written, kinds))
    if origin is tuple:
        return f"a list of {kind_of(kinds[0])}"
    words = {
        int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path", NoneType: "none",
        Any: "anything", torch.dtype: "a dtype such as bfloat16", torch.device: "a device such as cuda:0",
    }  # fmt: skip
    return words.get(hint, f"an object of type {getattr(hint, '__name__', hint)}")
