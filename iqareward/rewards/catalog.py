"""The table of all named rewards; `load` builds them and their weighted sums."""

import ast
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iqareward.functional import brisque, gmsd, haarpsi, ms_ssim, niqe, piqe, psnr, ssim
from iqareward.functional._chunks import FORMULA_BYTES_PER_PIXEL
from iqareward.functional.brisque import MIN_SIDE as BRISQUE_MIN_SIDE
from iqareward.functional.gmsd import MIN_SIDE as GMSD_MIN_SIDE
from iqareward.functional.haarpsi import MIN_SIDE as HAARPSI_MIN_SIDE
from iqareward.functional.ms_ssim import MIN_SIDE as MS_SSIM_MIN_SIDE
from iqareward.functional.niqe import MIN_SIDE as NIQE_MIN_SIDE
from iqareward.functional.piqe import MIN_SIDE as PIQE_MIN_SIDE
from iqareward.functional.ssim import WINDOW_SIZE as SSIM_MIN_SIDE
from iqareward.rewards.combine import AffineMap, Calibrated, WeightedSum, exact
from iqareward.rewards.metric import FullReference, NoReference
from iqareward.rewards.pyiqa import NO_GRADIENT, REFUSED, pyiqa_bounds, pyiqa_configs, pyiqa_facts
from iqareward.rewards.vlm.presets import Q_INSIGHT_MODEL, Q_REALIGN_MODELS, VISUALQUALITY_R1_MODEL
from iqareward.types import Bounds, Reward


class Entry(NamedTuple):
    """A row of the catalogue.

    Attributes:
        build: gives the reward; takes `differentiable` if that can be chosen, and `device` if the reward has weights.
        summary: what a score says.
        needs_references: whether it compares with references.
        differentiable: whether `differentiable=True` can be asked for.
        weights: where its weights come from: a hub id, "torchvision:<backbone>", "package:<a package of the extra>" or
            "pyiqa"; "" = it has none.
        licence: The licences of code and weights as used here.
        extra: the extra of this package that it needs; "" = none.
        usual: the scores between which most photographs lie, from bad to best; None = unknown.
        bounds: (low, high) that no score can leave; None = unbounded.
        higher_is_better: direction of the published metric; if False the reward is its negative.
        published_range: what papers print for the scores 0 and 1 of a reward whose direction they share.
    """

    build: Callable[..., Reward]
    summary: str
    needs_references: bool
    differentiable: bool
    weights: str = ""
    licence: str = "Apache-2.0"
    extra: str = ""
    usual: tuple[float, float] | None = (0.0, 1.0)
    bounds: Bounds = (0.0, 1.0)
    higher_is_better: bool = True
    published_range: tuple[float, float] = (0.0, 1.0)


def _formula(
    metric: Callable[..., Tensor],
    summary: str,
    *,
    bounds: Bounds = (0.0, 1.0),
    usual: tuple[float, float] = (0.0, 1.0),
    higher_is_better: bool = True,
    references: bool = True,
    differentiable: bool = True,
    min_side: int = 1,
    color: str = "",
    licence: str = "Apache-2.0",
) -> Entry:
    facts = {"higher_is_better": higher_is_better, "bounds": bounds, "min_side": min_side}
    if color:
        facts |= {"name": f"{metric.__name__}_{color}", "color": color}
    build = partial(_of_metric, FullReference if references else NoReference, metric, **facts)
    return Entry(
        build, summary, references, differentiable, licence=licence, usual=usual, bounds=bounds,
        higher_is_better=higher_is_better,
    )  # fmt: skip


def _of_metric(
    form: Callable[..., Reward], metric: Callable[..., Tensor], *, color: str = "", name: str = "", **options: Any
) -> Reward:
    name = name or metric.__name__
    if color:
        if "color" not in inspect.signature(metric).parameters:
            raise TypeError(f"{name} got an unexpected keyword argument 'color'")
        name = name if name.endswith(f"_{color}") else f"{name}(color={color})"
        metric = partial(metric, color=color)
    return form(metric, name=name, bytes_per_pixel=FORMULA_BYTES_PER_PIXEL, **options)


def _public(name: str, **options: Any) -> Reward:
    """A reward of a public class, which is imported only now."""
    return _class(name)(**options)


def _class(name: str) -> Any:
    """A class of `iqareward`, or of `iqareward.rewards`."""
    package = importlib.import_module("iqareward")
    return getattr(package if name in package.__all__ else importlib.import_module("iqareward.rewards"), name)


# fmt: off
CATALOG: dict[str, Entry] = {
    "psnr": _formula(psnr, "pixel error in dB; 100 = identical", bounds=(None, 100.0), usual=(10.0, 50.0)),
    "psnr_y": _formula(psnr, "pixel error of Y as restoration papers report it", bounds=(None, 100.0),
                       usual=(10.0, 50.0), color="y"),
    "ssim": _formula(ssim, "local structure of luma; 1 = identical", bounds=(-1.0, 1.0), min_side=SSIM_MIN_SIDE),
    "ms_ssim": _formula(ms_ssim, "structure at five scales; 1 = identical", min_side=MS_SSIM_MIN_SIDE),
    "gmsd": _formula(gmsd, "evenness of edge errors; 0 = identical", bounds=(None, 0.0), usual=(-0.35, 0.0),
                    higher_is_better=False, min_side=GMSD_MIN_SIDE),
    "haarpsi": _formula(haarpsi, "wavelet similarity in colour; 1 = identical", min_side=HAARPSI_MIN_SIDE),
    "piqe": _formula(piqe, "blockwise distortion; 0 = none; light noise raises the score", bounds=(-100.0, 0.0),
                    usual=(-100.0, 0.0), higher_is_better=False, references=False, differentiable=False,
                    min_side=PIQE_MIN_SIDE),
    "niqe": _formula(niqe, "distance from natural statistics; best at sides >= 256; latent autoencoders raise it",
                    bounds=(None, 0.0), usual=(-12.0, 0.0), higher_is_better=False, references=False,
                    differentiable=False, min_side=NIQE_MIN_SIDE),
    "brisque": _formula(brisque, "opinion predicted from luminance statistics; best at sides >= 256",
                       licence="Apache-2.0, UT Austin", bounds=(None, None), usual=(-100.0, 10.0),
                       higher_is_better=False, references=False, differentiable=False, min_side=BRISQUE_MIN_SIDE),
    # name           reward, what a score says, needs references, can be differentiable, weights, licence, extra
    "qalign": Entry(partial(_public, "QAlignReward"), "quality level by one-align, in [0, 1]",
                    False, True, "q-future/one-align", "MIT, LLaMA-2", published_range=(1.0, 5.0)),
    "deqa": Entry(partial(_public, "DeQAReward"), "quality level by DeQA-Score, in [0, 1]",
                  False, True, "zhiyuanyou/DeQA-Score-Mix3", "MIT, LLaMA-2", published_range=(1.0, 5.0)),
    "qrealign": Entry(partial(_public, "QReAlignReward"), "quality level by Q-ReAlign-Mini, in [0, 1]",
                      False, True, Q_REALIGN_MODELS["mini"], "MIT", "vlm"),
    "qrealign_lite": Entry(partial(_public, "QReAlignReward", size="lite"),
                           "quality level by Q-ReAlign-Lite, in [0, 1]",
                           False, True, Q_REALIGN_MODELS["lite"], "MIT", "vlm"),
    "qrealign_pro": Entry(partial(_public, "QReAlignReward", size="pro"),
                          "quality level by Q-ReAlign-Pro, in [0, 1]",
                          False, True, Q_REALIGN_MODELS["pro"], "MIT", "vlm"),
    "visualquality_r1": Entry(partial(_public, "VisualQualityR1Reward"),
                              "expected rating by VisualQuality-R1, in [0, 1]",
                              False, True, VISUALQUALITY_R1_MODEL, "MIT", "vlm", published_range=(1.0, 5.0)),
    "qinsight": Entry(partial(_public, "QInsightReward"), "expected rating by Q-Insight, in [0, 1]",
                      False, True, Q_INSIGHT_MODEL, "Apache-2.0", "vlm", published_range=(1.0, 5.0)),
    "lpips": Entry(partial(_public, "LPIPSReward", net="alex"), "AlexNet feature distance; 0 = identical",
                   True, True, "torchvision:alex", "BSD-2", "perceptual", (-1.0, 0.0), (None, 0.0), False),
    "lpips_vgg": Entry(partial(_public, "LPIPSReward", net="vgg"), "VGG feature distance; 0 = identical",
                       True, True, "torchvision:vgg", "BSD-2", "perceptual", (-1.0, 0.0), (None, 0.0), False),
    "stlpips": Entry(partial(_public, "STLPIPSReward", net="alex"), "LPIPS that tolerates small shifts; 0 = identical",
                     True, True, "package:stlpips_pytorch", "BSD-2", "perceptual", (-1.0, 0.0), (None, 0.0), False),
    "stlpips_vgg": Entry(partial(_public, "STLPIPSReward", net="vgg"), "the same with VGG features; 0 = identical",
                         True, True, "package:stlpips_pytorch", "BSD-2", "perceptual", (-1.0, 0.0), (None, 0.0), False),
    "dists": Entry(partial(_public, "DISTSReward"), "structure and texture distance; 0 = identical",
                   True, True, "torchvision:vgg", "MIT", "perceptual", (-1.0, 0.0), (None, 0.0), False),
    "fsim": Entry(partial(_public, "PIQReward", metric="fsim"), "phase and gradient similarity; 1 = identical",
                  True, False, extra="perceptual"),
    "vsi": Entry(partial(_public, "PIQReward", metric="vsi"), "saliency-weighted similarity; 1 = identical",
                 True, False, extra="perceptual"),
    "mdsi": Entry(partial(_public, "PIQReward", metric="mdsi"), "gradient and chroma deviation; 0 = identical",
                  True, False, extra="perceptual", usual=(-0.5, 0.0), bounds=(None, 0.0), higher_is_better=False),
    "srsim": Entry(partial(_public, "PIQReward", metric="srsim"), "spectral-residual similarity; 1 = identical",
                   True, False, extra="perceptual"),
    "dss": Entry(partial(_public, "PIQReward", metric="dss"), "DCT subband similarity; 1 = identical",
                 True, False, extra="perceptual"),
    "iwssim": Entry(partial(_public, "PIQReward", metric="iwssim"), "information-weighted structure; 1 = identical",
                    True, False, extra="perceptual"),
}
# fmt: on
PYIQA_PREFIX = "pyiqa:"
_REFUSED = {PYIQA_PREFIX + metric for metric in REFUSED}

_NUMBER = r"\d*\.?\d+(?:[eE][+-]?\d+)?"
_TERM = re.compile(
    rf"(?:(?P<weight>{_NUMBER})\s*\*\s*)?(?P<name>[A-Za-z](?:[^\s*\[\]()]*[^\s*\[\]()_-])?)"
    rf"(?:\(\s*(?P<options>[^()]*)\))?"
    rf"(?:\[\s*(?P<low>-?{_NUMBER})\s*,\s*(?P<high>-?{_NUMBER})\s*\])?"
)
_WORDS = {"true": True, "false": False, "none": None, "null": None}


class _Term(NamedTuple):
    """A part of a sum as it is written, with the name in the catalogue that it means."""

    match: re.Match[str]
    name: str
    sign: str = "+"

    @property
    def weight(self) -> float:
        return float(self.match["weight"] or 1.0) * (1 if self.sign == "+" else -1)

    @property
    def is_plain(self) -> bool:
        return self.match["weight"] is None and self.sign == "+"


def load(
    spec: str | Mapping[str, float], *, device: torch.device | str | None = None, differentiable: bool = False
) -> Reward:
    """Make a reward from its name, or from a weighted sum of names.

    A sum adds the scores as they are, so its parts must share a scale: each must lie in [-1, 1]. Write
    `"psnr[10, 50]"` for a reward that does not: a score of 10 becomes 0, one of 50 becomes 1, linear between and
    constant beyond.

    Args:
        spec: A name of the catalogue (`iqareward list`), `"pyiqa:<metric>"`, a sum such as `"0.7*qalign + 0.3*ssim"`,
            or a mapping of names to weights, as YAML gives it. Options of a reward may follow its name, as in
            `"lpips(net=vgg)"`, and then `[low, high]`. Case, hyphens and underscores in names do not count:
            `"MS-SSIM"` is `"ms_ssim"`.
        device: where rewards that have weights keep them; None = their default. Others run where the images are.
        differentiable: keep the graph from scores to pixels.

    Returns:
        A reward: `[B]` float32 scores, higher is better, NaN = not scored.

    Raises:
        ValueError: an unknown name (near ones are listed) or option, a sum that can be read in two ways for want of
            spaces, parts that do not share a scale (the message has the line to write), or `differentiable` where there
            is none.
        TypeError: `spec` is neither text nor a mapping.
        ImportError: the reward needs an extra that is not installed.

    Example:
        >>> load("0.7*haarpsi + 0.3*psnr[10, 50]").bounds
        (0.0, 1.0)
        >>> load({"haarpsi": 0.7, "psnr(color=y)[10, 50]": 0.3}).name
        '0.7*haarpsi + 0.3*psnr(color=y)[10, 50]'
        >>> load("0.7*haarpsi + 0.3*psnr")
        Traceback (most recent call last):
        ValueError: '0.7*haarpsi + 0.3*psnr' adds scores of different scales: psnr may leave [-1, 1]. Write
        '0.7*haarpsi + 0.3*psnr[10, 50]': the first score in brackets becomes 0, the second 1.
        >>> load("nique")
        Traceback (most recent call last):
        ValueError: unknown reward 'nique'; did you mean niqe, piqe, brisque, pyiqa:unique? `iqareward list` shows all
        names, `iqareward list --pyiqa` those of pyiqa.
    """
    if isinstance(spec, Mapping):
        spec = " ".join(_part(name, weight) for name, weight in spec.items()).removeprefix("+ ")
    if not isinstance(spec, str):
        raise TypeError(
            "load expected a name such as 'ssim', a sum such as '0.7*qalign + 0.3*ssim', or a mapping of names to "
            f"weights, got {type(spec).__name__}. A reward object needs no loading."
        )
    terms = _parsed(spec)
    rewards = [_build(term, device, differentiable) for term in terms]
    if len(terms) == 1 and terms[0].is_plain:
        return rewards[0]
    if len(terms) > 1:
        _check_scales(spec, terms, rewards)
    return WeightedSum([(term.weight, reward) for term, reward in zip(terms, rewards, strict=True)])


def on_unit_scale(spec: str, reward: Reward) -> str:
    """The spec of a reward as a part of a sum.

    Args:
        spec: name or sum from which `load` built the reward.
        reward: that reward.

    Returns:
        `spec` if its scores lie in [-1, 1] or it is a sum itself, otherwise `spec` with a range that brings them there.

    Example:
        >>> on_unit_scale("piqe", load("piqe")), on_unit_scale("ssim", load("ssim"))
        ('piqe[-100, 0]', 'ssim')
    """
    low, high = reward.bounds
    if isinstance(reward, WeightedSum) or (low is not None and high is not None and -1 <= low < high <= 1):
        return spec
    usual = _entry_of(_parsed(spec)[0].name).usual
    return f"{spec}[{'low, high' if usual is None else ', '.join(map(exact, usual))}]"


def published(spec: str) -> tuple[float, float] | None:
    """How to turn scores of a reward into the numbers that papers print, often distances where lower is better.

    Args:
        spec: name or sum from which `load` built the reward.

    Returns:
        (scale, offset): papers print `scale * score + offset`. None for sums and ranges, which no paper prints.

    Example:
        >>> published("niqe"), published("qalign"), published("0.7*haarpsi + 0.3*ssim")
        ((-1.0, 0.0), (4.0, 1.0), None)
    """
    first, *others = _parsed(spec)
    if others or not first.is_plain or first.match["low"]:
        return None
    entry = _entry_of(first.name)
    if not entry.higher_is_better:
        return (-1.0, 0.0)
    low, high = entry.published_range
    return (high - low, low)


def _entry_of(name: str) -> Entry:
    """What is known of a name of the catalogue, or of `"pyiqa:<metric>"`.

    Raises:
        ImportError: pyiqa is not installed.
        ValueError: there is no such metric of pyiqa.
    """
    if not name.startswith(PYIQA_PREFIX):
        return CATALOG[name]
    metric = name.removeprefix(PYIQA_PREFIX)
    facts = pyiqa_facts(metric)
    return Entry(
        partial(_public, "PyIQAReward", metric=metric), "", facts.needs_references, metric not in NO_GRADIENT,
        "pyiqa", "PolyForm Noncommercial", "pyiqa", facts.usual, pyiqa_bounds(metric), facts.higher_is_better,
    )  # fmt: skip


def pyiqa_entries() -> dict[str, Entry]:
    """What is known of every metric of the installed pyiqa that scores single images.

    Raises:
        ImportError: pyiqa is not installed.
    """
    return {name: _entry_of(name) for name in map(PYIQA_PREFIX.__add__, pyiqa_configs()) if name not in _REFUSED}


def _part(name: str, weight: float) -> str:
    """A term of a sum, with its sign, from an item of a mapping."""
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise TypeError(f"load expected a mapping of names to weights, got {weight!r} for {name!r}.")
    terms = _parsed(name)
    if len(terms) > 1 or not terms[0].is_plain:
        raise ValueError(f"load expected the name of one reward for each weight, got {name!r} for {weight}.")
    return f"{'-' if weight < 0 else '+'} {abs(weight)!r}*{name}"


def _parsed(spec: str) -> list[_Term]:
    """The one way to read a spec."""
    sign = "-" if spec.lstrip().startswith("-") else "+"
    readings = list(_readings(spec.lstrip().removeprefix("-"), _known_names(spec), sign))
    if not readings:
        raise _unreadable(spec)
    if len(readings) > 1:
        forms = (" ".join(f"{term.sign} {term.match[0]}" for term in reading) for reading in readings)
        forms = " or ".join(repr(form.removeprefix("+ ")) for form in forms)
        raise ValueError(f"{spec!r} can be read as {forms}; put spaces around the operators.")
    return readings[0]


def _check_scales(spec: str, terms: list[_Term], rewards: list[Reward]) -> None:
    """Refuse parts of a sum that do not share a scale, with the line to write."""
    texts = [term.match[0] for term in terms]
    parts = [on_unit_scale(text, reward) for text, reward in zip(texts, rewards, strict=True)]
    if parts == texts:
        return
    line = " ".join(f"{term.sign} {part}" for term, part in zip(terms, parts, strict=True)).removeprefix("+ ")
    wide = ", ".join(each.name for text, part, each in zip(texts, parts, rewards, strict=True) if part != text)
    # Of a metric known as a distance the reward is the negative already; people subtract it once more.
    twice = [each.name for term, each in zip(terms, rewards, strict=True) if term.weight < 0 and each.bounds[1] == 0]
    hint = f" {', '.join(twice)}: higher is better here already; did you mean + instead of -?" if twice else ""
    raise ValueError(
        f"{spec!r} adds scores of different scales: {wide} may leave [-1, 1]. "
        f"Write {line!r}: the first score in brackets becomes 0, the second 1.{hint}"
    )


def _build(term: _Term, device: torch.device | str | None, differentiable: bool) -> Reward:
    entry, options = _entry_of(term.name), _options(term.match["options"] or "")
    differentiable = options.pop("differentiable", differentiable)
    if differentiable and not entry.differentiable and term.name in CATALOG:
        graphs = ", ".join(known for known, other in CATALOG.items() if other.differentiable)
        raise ValueError(f"{term.name} has no useful gradient to the pixels. Differentiable rewards: {graphs}.")
    if differentiable:
        options["differentiable"] = True
    if entry.weights:
        options.setdefault("device", device)
    try:
        reward = entry.build(**options)
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        known = _option_names(entry)
        if not (wrong := sorted(options.keys() - known)):
            raise
        raise ValueError(
            f"{term.match[0]!r} has an option that {term.name} does not have: {', '.join(wrong)}. It has "
            f"{', '.join(sorted(known))}."
        ) from error
    if term.match["low"] is None:
        return reward
    low, high = float(term.match["low"]), float(term.match["high"])
    return Calibrated(reward, AffineMap(low, high), name=f"{reward.name}[{exact(low)}, {exact(high)}]")


def _option_names(entry: Entry) -> set[str]:
    """What may follow a name in parentheses."""
    build: Any = entry.build
    if build.func is _public:
        return set(inspect.signature(_class(build.args[0])).parameters)
    color = {"color"} & inspect.signature(build.args[1]).parameters.keys()
    return {"batch_size", "name"} | color | ({"differentiable"} if entry.differentiable else set())


def _options(text: str) -> dict[str, Any]:
    """Options such as `net=vgg, batch_size=4`: numbers, true, false, none, quoted texts, and words as texts."""
    options: dict[str, Any] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key.isidentifier():
            raise ValueError(f"load expected options such as 'lpips(net=vgg, batch_size=4)', got {item!r}.")
        try:
            options[key] = _WORDS[value.lower()] if value.lower() in _WORDS else ast.literal_eval(value)
        except Exception:  # a decoder of Python raises anything
            options[key] = value
    return options


def _key(name: str) -> str:
    """What counts in a name: neither case nor hyphens and underscores."""
    return re.sub("[-_]", "", name).lower()


def _known_names(spec: str) -> dict[str, str]:
    """Key -> name, of the table and, if the spec names any, of pyiqa's metrics."""
    theirs = [PYIQA_PREFIX + metric for metric in pyiqa_configs()] if PYIQA_PREFIX in spec.lower() else []
    return {_key(name): name for name in (*CATALOG, *theirs)}


def _known_term(text: str, names: Mapping[str, str], sign: str = "+") -> _Term | None:
    match = _TERM.fullmatch(text.strip())
    name = match and names.get(_key(match["name"]))
    return _Term(match, name, sign) if match and name else None


def _readings(text: str, names: Mapping[str, str], sign: str = "+") -> Iterator[list[_Term]]:
    """Every way to read a sum of known names: + and - are operators or, within a word, may belong to a name."""
    if term := _known_term(text, names, sign):
        yield [term]
    for operator in re.finditer("[+-]", text):
        if term := _known_term(text[: operator.start()], names, sign):
            yield from ([term, *rest] for rest in _readings(text[operator.end() :], names, operator[0]))


def _unreadable(spec: str) -> ValueError:
    """The first part of a spec that is not known, and what may have been meant."""
    names, rest = _known_names(spec), spec.strip()
    while ends := [found.end() for found in re.finditer("[+-]", rest) if _known_term(rest[: found.start()], names)]:
        rest = rest[ends[-1] :].strip()
    text = re.split(r"\s+[+-]\s+", rest)[0]
    match = _TERM.fullmatch(text)
    if match is None:
        return ValueError(
            f"{spec!r} is not a reward: expected a name or a sum such as '0.7*haarpsi + 0.3*psnr[10, 50]', could not "
            f"read {text!r}."
        )
    name = match["name"].partition("+")[0]
    wanted = _key(name.removeprefix(PYIQA_PREFIX))
    ours = {} if name.startswith(PYIQA_PREFIX) else {_key(known): known for known in CATALOG}
    try:
        theirs = {_key(metric): PYIQA_PREFIX + metric for metric in pyiqa_configs()}
    except ImportError:  # then none of its names can be meant
        theirs = {}
    near = [known[key] for known in (ours, theirs) for key in difflib.get_close_matches(wanted, known)]
    if wanted in theirs:
        near = [theirs[wanted]]
    hint = f"did you mean {', '.join(near[:4])}? " if near else ""
    return ValueError(
        f"unknown reward {name!r}; {hint}`iqareward list` shows all names, `iqareward list --pyiqa` those of pyiqa."
    )
