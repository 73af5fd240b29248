"""Python objects that a settings file names, with options that are checked against their signatures."""

import difflib
import importlib
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

from iqareward.optional import require

Parser: TypeAlias = Callable[[Any, str], Any]
"""Called with a value of the file and its key; returns the option."""

IN_FILE = ".py:"


def object_of(spec: str, key: str, choices: Mapping[str, Any], *, also: str = "") -> Any:
    """The object that `spec` names: one of `choices`, "my_file.py:name" or "package.module.name".

    A file is imported as a module, which runs it.

    Raises:
        ValueError: There is no such object; what is known is listed.
    """
    if spec in choices:
        return choices[spec]
    if IN_FILE in spec:
        return _in_file(spec, key)
    if "." in spec:
        try:
            return pkgutil.resolve_name(spec)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"key `{key}` names {spec}, which cannot be imported: {error}.") from error
    near = difflib.get_close_matches(spec, choices, n=1)
    raise ValueError(
        f"key `{key}` expected one of {', '.join(choices)}, {also}or a name such as my_file.py:name, got {spec!r}."
        + (f" Did you mean {near[0]}?" if near else "")
    )


def _in_file(spec: str, key: str) -> Any:
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"key `{key}` expected a Python file, got {file}, which is not there.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # so that processes that read images find what is sent to them
    module = importlib.import_module(path.stem)
    if not (module.__file__ and path.samefile(module.__file__)):
        raise ValueError(f"key `{key}`: {file} has the name of the module {module.__file__}. Rename the file.")
    if not hasattr(module, name):
        raise ValueError(f"key `{key}`: {file} has no {name!r}.")
    return getattr(module, name)


@dataclass(frozen=True)
class Option:
    """A parameter of a signature."""

    hint: Any
    required: bool


def options_of(function: Any) -> tuple[dict[str, Option], bool]:
    """The options of a callable by name, those that its `**options` reach included; and whether any other is taken.

    A class passes its own on to its bases, a class method to the constructor, and an object with `then` to that.
    """
    found: dict[str, Option] = {}
    for place, part in enumerate(_reached(function)):
        signature = inspect.signature(part)
        hints = _hints(part)
        for name, parameter in signature.parameters.items():
            required = parameter.default is parameter.empty
            positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            # Beyond the first signature, what is required comes from the function that passes its options on.
            usable = (positional and place == 0) or (
                parameter.kind is parameter.KEYWORD_ONLY and not (place and required)
            )
            if usable and name not in ("self", "cls"):
                _ = found.setdefault(name, Option(hints.get(name, Any), required))
        if not any(each.kind is each.VAR_KEYWORD for each in signature.parameters.values()):
            return found, False
    return found, True


def _reached(function: Any) -> list[Any]:
    if isinstance(function, type):
        return [vars(base)["__init__"] for base in function.__mro__[:-1] if "__init__" in vars(base)]
    owner = getattr(function, "__self__", None)
    if isinstance(owner, type):
        name = function.__name__
        return [vars(base)[name].__func__ for base in owner.__mro__ if name in vars(base)] + _reached(owner)
    then = getattr(function, "then", None)
    return [function] if then is None else [type(function).__call__, *_reached(then)]


def _hints(function: Any) -> dict[str, Any]:
    while isinstance(function, partial):
        function = function.func
    try:
        return get_type_hints(function)
    except Exception:  # hints of other packages may name what is not imported: then types are not checked
        return {}


@dataclass(frozen=True)
class Reader:
    """Turns values of a settings file into options of Python.

    Args:
        parsers: Pairs of a type hint and what makes its values, for types that TOML does not have.
    """

    parsers: Sequence[tuple[Any, Parser]]

    def call(
        self,
        spec: Any,
        key: str,
        choices: Mapping[str, Any],
        *,
        given: Sequence[str] = (),
        extra: Mapping[str, Any] | None = None,
        also: str = "",
    ) -> partial[Any]:
        """The call of a named object: `spec` is a name, or a table with `name` and options.

        Args:
            spec: The value in the file.
            key: Its key.
            choices: Objects by name.
            given: Parameters that the caller gives.
            extra: More options, with their types.
            also: Other values that are allowed, for the message.
        """
        options = {"name": spec} if isinstance(spec, str) else spec
        if not isinstance(options, dict) or not isinstance(options.get("name"), str):
            raise ValueError(f"key `{key}` expected a name or a table with `name`, got {spec!r}.")
        function = object_of(options["name"], key, choices, also=also)
        if not callable(function):
            raise ValueError(f"key `{key}` expected a class or a function, got {options['name']}, which is neither.")
        options = {name: value for name, value in options.items() if name != "name"}
        return extended(function, **self.options(function, options, key, given=given, extra=extra))

    def options(
        self,
        function: Any,
        table: Mapping[str, Any],
        key: str,
        *,
        given: Sequence[str] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The options of a table, checked against the signature of `function`.

        Raises:
            ValueError: A key is unknown, missing or has another type; it is named.
        """
        if not isinstance(table, Mapping):
            raise ValueError(f"key `{key}` expected a table, got {table!r}.")
        known, takes_others = options_of(function)
        known |= {name: Option(hint, required=False) for name, hint in (extra or {}).items()}
        known = {name: option for name, option in known.items() if name not in given}
        prefix = f"{key}." if key else ""
        found: dict[str, Any] = {}
        for name, value in table.items():
            if name not in known and (not takes_others or name in given):
                near = difflib.get_close_matches(name, known, n=1)
                raise ValueError(
                    f"unknown key `{prefix}{name}`; "
                    + (f"did you mean `{prefix}{near[0]}`? " if near else "")
                    + f"Known are {', '.join(known) or 'none'}."
                )
            found[name] = self.value(value, known[name].hint if name in known else Any, f"{prefix}{name}")
        for name, option in known.items():
            if option.required and name not in found:
                raise ValueError(f"missing key `{prefix}{name}`; `iqareward train --example` shows every key.")
        return found

    def value(self, value: Any, hint: Any, key: str) -> Any:
        """The value as its type hint wants it."""
        kinds = [each for each in get_args(hint) if each is not NoneType]
        if get_origin(hint) in (Union, UnionType) and len(kinds) == 1:
            hint = kinds[0]
        for kind, parser in self.parsers:
            if kind == hint:
                return parser(value, key)
        if hint is Any and isinstance(value, str) and IN_FILE in value:
            return _in_file(value, key)
        if isinstance(hint, type) and is_dataclass(hint):
            table: Any = value
            return made(partial(hint, **self.options(hint, table, key)), key)
        return _checked(value, hint, key)


def extended(function: Callable[..., Any], **options: Any) -> partial[Any]:
    """`partial(function, **options)` whose `func` is no `partial` itself.

    functools merges the two as well, but not once anything has read the `__dict__` of the inner one.
    """
    if isinstance(function, partial):
        return partial(function.func, *function.args, **(function.keywords | options))
    return partial(function, **options)


def made(call: partial[Any], key: str) -> Any:
    """What the call gives; a ValueError names its key.

    Raises:
        ValueError: The options do not fit each other.
    """
    try:
        return call()
    except (ValueError, TypeError) as error:
        raise ValueError(f"key `{key}`: {error}" if key else str(error)) from error


def _checked(value: Any, hint: Any, key: str) -> Any:
    pydantic: Any = require("pydantic", extra="diffusers", purpose="iqareward train")
    try:
        adapter = pydantic.TypeAdapter(hint, config={"strict": True, "arbitrary_types_allowed": True})
    except pydantic.errors.PydanticUserError:  # a type of another package
        adapter = pydantic.TypeAdapter(Any)
    try:
        # As JSON, because strict types accept lists as tuples and strings as paths there only.
        return adapter.validate_json(json.dumps(value, default=str))
    except pydantic.ValidationError as error:
        if isinstance(value, str) and IN_FILE in value:  # for instance a loss
            return _in_file(value, key)
        errors = [each for each in error.errors() if each["type"] not in ("needs_python_object", "is_instance_of")]
        messages = [each["msg"].removeprefix("Input should be ") for each in errors]
        expected = " or ".join(messages).replace("array", "list").replace("an object", "a table")
        raise ValueError(f"key `{key}` expected {expected or 'my_file.py:name'}, got {value!r}.") from None
