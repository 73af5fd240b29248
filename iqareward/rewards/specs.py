"""Read what `load` accepts, such as "0.7*a + 0.3*b(net=vgg)[0, 1]", into the parts of a sum, and write them as text."""

import difflib
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from iqareward.rewards.combine import exact
from iqareward.rewards.options import closing, read_options, write_options
from iqareward.rewards.pyiqa import pyiqa_configs

PYIQA_PREFIX = "pyiqa:"

_NUMBER = r"\d*\.?\d+(?:[eE][+-]?\d+)?"
_TERM = re.compile(
    rf"(?:(?P<weight>{_NUMBER})\s*\*\s*)?(?P<name>[A-Za-z](?:[^\s*\[\]()]*[^\s*\[\]()_-])?)"
    rf"(?:\((?P<options>\d+)\))?"  # the place of the options in a list; see _masked
    rf"(?:\[\s*(?:(?P<low>-?{_NUMBER})\s*,\s*(?P<high>-?{_NUMBER})|(?P<calibrated>calibrated))\s*\])?"
)

Spec: TypeAlias = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
"""The description of a reward that `load` accepts: text, or a mapping or list such as those read from YAML and TOML."""


class Term(NamedTuple):
    """A part of a sum, with the name in the catalogue that it means.

    Attributes:
        text: The part as text, without its sign.
        range: The scores that become 0 and 1, or "calibrated" for the map that ships.
        weight: None = not given.
    """

    name: str
    text: str
    options: Mapping[str, Any] = {}
    range: tuple[float, float] | str | None = None
    weight: float | None = None


def terms_of(spec: Any, names: Collection[str]) -> list[Term]:
    """The parts of a sum, of which one is a reward alone.

    Args:
        spec: What `load` was given.
        names: Those of the catalogue; the metrics of pyiqa are known besides.
    """
    if isinstance(spec, str):
        return _parsed(spec, names)
    if isinstance(spec, Mapping) and "name" in spec:
        return [_named(spec, names)]
    if isinstance(spec, Mapping) and spec:
        return [_item(name, value, names) for name, value in spec.items()]
    if isinstance(spec, Sequence) and spec and all(isinstance(each, str | Mapping) for each in spec):
        return [term for each in spec for term in terms_of(each, names)]
    raise TypeError(
        "load expected a name such as 'ssim', a sum such as '0.7*qalign + 0.3*ssim', a list of names, or a mapping of "
        f"names to weights, got {type(spec).__name__}. A reward object needs no loading."
    )


def _item(name: Any, value: Any, names: Collection[str]) -> Term:
    """A part from an item of a mapping: a weight, or options with `weight` and `range` among them."""
    if isinstance(value, Mapping) and "name" not in value:
        return _named({**value, "name": name}, names)
    if not _is_number(value):
        raise TypeError(
            "load expected a mapping of names to weights, got "
            f"{value!r} for {name!r}. One reward is {{'name': {name!r}, ...}}, several of one name are a list of these."
        )
    return _named({"name": name, "weight": value}, names)


def _named(entry: Mapping[str, Any], names: Collection[str]) -> Term:
    """A part from a mapping with `name`, perhaps `weight` and `range`, and options."""
    options = dict(entry)
    name, weight, limits = options.pop("name"), options.pop("weight", None), options.pop("range", None)
    terms = _parsed(name, names) if isinstance(name, str) else []
    if len(terms) != 1 or terms[0].weight is not None:
        raise ValueError(f"load expected the name of one reward for each weight, got {name!r} in {dict(entry)}.")
    if weight is not None and not _is_number(weight):
        raise TypeError(f"load expected a number as `weight` of {name!r}, got {weight!r}.")
    term = with_options(terms[0]._replace(weight=weight), options)
    if limits is not None:
        if limits != "calibrated":
            if isinstance(limits, str) or not isinstance(limits, Sequence) or not all(map(_is_number, limits)):
                raise ValueError(f"load expected `range` of {name!r} as [low, high] or 'calibrated', got {limits!r}.")
            if term.range is not None or len(limits) != 2:
                raise ValueError(f"load expected one `range` of two numbers for {name!r}, got {limits!r}.")
            limits = (float(limits[0]), float(limits[1]))
        term = term._replace(range=limits)
    return term._replace(text=_written(term))


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= sys.float_info.max  # of YAML, which has integers that are no float
    return isinstance(value, float)


def with_options(term: Term, options: Mapping[str, Any]) -> Term:
    """The part with further options."""
    if wrong := [key for key in options if not isinstance(key, str)]:
        raise ValueError(f"load expected the names of the options of {term.text!r} as text, got {wrong}.")
    if twice := sorted(term.options.keys() & options.keys()):
        raise ValueError(f"load got {', '.join(twice)} of {term.text!r} twice: {write_options(options)[1:-1]}.")
    if not options:
        return term
    term = term._replace(options={**term.options, **options})
    return term._replace(text=_written(term))


def _written(term: Term) -> str:
    """The part as text, without its sign."""
    weight = "" if term.weight is None else f"{abs(term.weight)!r}*"
    limits = term.range if isinstance(term.range, str | None) else ", ".join(map(exact, term.range))
    return f"{weight}{term.name}{write_options(term.options)}{f'[{limits}]' if limits else ''}"


def sum_of(terms: Iterable[Term], texts: Iterable[str] | None = None) -> str:
    """The parts as one text, with their signs."""
    texts = [term.text for term in terms] if texts is None else texts
    signed = (f"{sign_of(term)} {text}" for term, text in zip(terms, texts, strict=True))
    return " ".join(signed).removeprefix("+ ")


def sign_of(term: Term) -> str:
    """What stands before the part in a sum: "+", or "-" if its weight is negative."""
    return "-" if term.weight is not None and term.weight < 0 else "+"


def _parsed(spec: str, names: Collection[str]) -> list[Term]:
    """The one way to read a text."""
    masked, options = _masked(spec)
    sign = "-" if masked.lstrip().startswith("-") else "+"
    try:
        readings = list(_readings(masked.lstrip().removeprefix("-"), _known_names(masked, names), options, sign))
    except RecursionError:
        raise ValueError(f"load expected fewer parts and brackets than in {spec[:60]!r}...") from None
    if not readings:
        raise _unreadable(spec, masked, options, names)
    if len(readings) > 1:
        forms = " or ".join(repr(sum_of(reading)) for reading in readings)
        raise ValueError(f"{spec!r} can be read as {forms}; put spaces around the operators.")
    return readings[0]


def _masked(spec: str) -> tuple[str, list[str]]:
    """The text with numbers in place of the options in parentheses, which may hold anything, and these options."""
    parts, options, rest = list[str](), list[str](), spec
    while (start := rest.find("(")) >= 0:
        end = closing(rest, start)
        parts += rest[:start], f"({len(options)})"
        options.append(rest[start + 1 : end - 1])
        rest = rest[end:]
    return "".join((*parts, rest)), options


def _unmasked(text: str, options: Sequence[str]) -> str:
    return re.sub(r"\((\d+)\)", lambda match: f"({options[int(match[1])]})", text)


def _key(name: str) -> str:
    """What counts in a name: neither case nor hyphens and underscores."""
    return re.sub("[-_]", "", name).lower()


def _known_names(spec: str, names: Collection[str]) -> dict[str, str]:
    """Key -> name, of the catalogue and, if the spec names any, of pyiqa's metrics."""
    theirs = [PYIQA_PREFIX + metric for metric in pyiqa_configs()] if PYIQA_PREFIX in spec.lower() else []
    return {_key(name): name for name in (*names, *theirs)}


def _known_term(text: str, names: Mapping[str, str], options: Sequence[str], sign: str = "+") -> Term | None:
    match = _TERM.fullmatch(text.strip())
    name = match and names.get(_key(match["name"]))
    if not match or not name:
        return None
    weight = None if match["weight"] is None and sign == "+" else float(f"{sign}{match['weight'] or 1}")
    return Term(
        name,
        _unmasked(match[0], options),
        read_options(options[int(match["options"])]) if match["options"] else {},
        (float(match["low"]), float(match["high"])) if match["low"] else match["calibrated"],
        weight,
    )


def _readings(text: str, names: Mapping[str, str], options: Sequence[str], sign: str = "+") -> Iterator[list[Term]]:
    """Every way to read a sum of known names: + and - are operators or, within a word, may belong to a name."""
    if term := _known_term(text, names, options, sign):
        yield [term]
    for operator in re.finditer("[+-]", text):
        if term := _known_term(text[: operator.start()], names, options, sign):
            yield from ([term, *rest] for rest in _readings(text[operator.end() :], names, options, operator[0]))


def _unreadable(spec: str, masked: str, options: Sequence[str], names: Collection[str]) -> ValueError:
    """The first part of a spec that is not known, and what may have been meant."""
    known_names, rest = _known_names(masked, names), masked.strip()
    # a hyphen of a misspelt "pyiqa:musiq-koniq" is no minus, though there is a "pyiqa:musiq"
    theirs = re.compile(rf"(?:{_NUMBER}\s*\*\s*)?{PYIQA_PREFIX}", re.IGNORECASE)
    while ends := [
        found.end()
        for found in re.finditer(r"\s[+-]\s" if theirs.match(rest) else "[+-]", rest)
        if _known_term(rest[: found.start()], known_names, options)
    ]:
        rest = rest[ends[-1] :].strip()
    text = re.split(r"\s+[+-]\s+", rest)[0]
    match = _TERM.fullmatch(text)
    if match is None:
        return ValueError(
            f"{spec!r} is not a reward: expected a name or a sum such as '0.7*haarpsi + 0.3*psnr[10, 50]', could not "
            f"read {_unmasked(text, options)!r}."
        )
    name = match["name"].partition("+")[0]
    wanted = _key(name.removeprefix(PYIQA_PREFIX))
    ours = {} if name.startswith(PYIQA_PREFIX) else {_key(known): known for known in names}
    try:
        metrics = {_key(metric): PYIQA_PREFIX + metric for metric in pyiqa_configs()}
    except ImportError:  # then none of its names can be meant
        metrics = {}
    near = [known[key] for known in (ours, metrics) for key in difflib.get_close_matches(wanted, known)]
    if wanted in metrics:
        near = [metrics[wanted]]
    hint = f"did you mean {', '.join(near[:4])}? " if near else ""
    return ValueError(
        f"unknown reward {name!r}; {hint}`iqareward list` shows all names, `iqareward list --pyiqa` those of pyiqa."
    )
