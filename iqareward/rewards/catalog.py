"""The table of all named rewards; `load` builds them and their weighted sums."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from iqareward.rewards.calibrations import calibrated, calibrations
from iqareward.rewards.clip.checkpoints import CLIP_B16, CLIP_B32, CLIP_L14, HPSV2, PICKSCORE
from iqareward.rewards.combine import AffineMap, Calibrated, WeightedSum, exact
from iqareward.rewards.metric import FullReference, NoReference
from iqareward.rewards.options import checked, kind_of, write_options
from iqareward.rewards.pyiqa import NO_GRADIENT, REFUSED, pyiqa_bounds, pyiqa_configs, pyiqa_facts
from iqareward.rewards.specs import PYIQA_PREFIX, Spec, Term, sign_of, sum_of, terms_of, with_options
from iqareward.rewards.vlm.presets import HPSV3_MODEL, Q_INSIGHT_MODEL, Q_REALIGN_MODELS, VISUALQUALITY_R1_MODEL
from iqareward.types import Bounds, Reward


class Entry(NamedTuple):
    """A row of the catalogue.

    Attributes:
        build: gives the reward; takes `differentiable` if that can be chosen, and `device` if the reward has weights.
        summary: what a score says.
        needs_references: whether it compares with references.
        differentiable: whether `differentiable=True` can be asked for.
        weights: where its weights come from: a hub id, "torchvision:<backbone>", "package:<an installed package>" or
            "pyiqa"; "" = it has none.
        licence: The licences of code and weights as used here.
        extra: the extra of this package that it needs; "" = none.
        usual: the scores between which most photographs lie, from bad to best; None = unknown.
        bounds: (low, high) that no score can leave; None = unbounded.
        higher_is_better: direction of the published metric; if False the reward is its negative.
        published_range: what papers print for the scores 0 and 1 of a reward whose direction they share; None = what
            they print is no linear function of the score.
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
    published_range: tuple[float, float] | None = (0.0, 1.0)


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
    build = partial(_of_metric, FullReference if references else NoReference, metric, facts)
    if color:
        build = partial(build, name=f"{metric.__name__}_{color}", color=color)
    return Entry(
        build, summary, references, differentiable, licence=licence, usual=usual, bounds=bounds,
        higher_is_better=higher_is_better,
    )  # fmt: skip


def _of_metric(
    form: Callable[..., Reward],
    metric: Callable[..., Tensor],
    facts: Mapping[str, Any],
    *,
    name: str = "",
    color: str = "",
    **options: Any,
) -> Reward:
    name = name or metric.__name__
    if color and color != inspect.signature(metric).parameters["color"].default:
        name = name if name.endswith(f"_{color}") else f"{name}(color={color})"
        metric = partial(metric, color=color)
    return form(metric, name=name, bytes_per_pixel=FORMULA_BYTES_PER_PIXEL, **facts, **options)


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
    "brisque": _formula(brisque, "opinion predicted from luminance statistics; light noise can raise the score",
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
    "hpsv3": Entry(partial(_public, "HPSv3Reward"), "preference for an image of a prompt by HPSv3, in [0, 1]",
                   False, True, HPSV3_MODEL, "Apache-2.0", "vlm", published_range=None),
    "clipscore": Entry(partial(_public, "CLIPScoreReward"), "what of the prompt an image shows, by CLIP ViT-B/32",
                       # the paper observed cosines of 0 to 0.4
                       False, True, CLIP_B32, "MIT", "vlm", (0.0, 1.0), (0.0, 2.5)),
    "pickscore": Entry(partial(_public, "PickScoreReward"), "which image of a prompt people pick, by PickScore",
                       # trainers divide by 26 to come near 1; no bounds and no statistics are published
                       False, True, PICKSCORE, "none stated", "vlm", (16.0, 26.0), (None, None)),
    "hpsv2": Entry(partial(_public, "HPSv2Reward"), "how people rank an image of a prompt, by HPSv2.1, a cosine",
                   # means of generators in the authors' table of version 2.1: 0.1451 (GLIDE) to 0.3134 (SDXL Refiner)
                   False, True, HPSV2, "Apache-2.0", "vlm", (0.15, 0.35), (-1.0, 1.0), published_range=(0.0, 100.0)),
    "laion_aesthetic": Entry(partial(_public, "LAIONAestheticReward"), "how people like the look, about 1 to 10",
                             # of 2.3 billion English images of LAION-5B 600 million score 5 or more, 12 million 6
                             False, True, CLIP_L14, "Apache-2.0, MIT", "vlm", (3.0, 7.0), (None, None)),
    "clipiqa": Entry(partial(_public, "CLIPIQAReward"), "nearer to 'Good photo.' than to 'Bad photo.', by CLIP",
                     False, True, CLIP_B16, "MIT", "vlm"),
    "rali": Entry(partial(_public, "RALIReward"), "quality by prototypes of Q-Insight's words, by CLIP ViT-L/14",
                  # neither bounds nor statistics are published
                  False, True, Q_INSIGHT_MODEL, "Apache-2.0", "vlm", None, (None, None)),
    "quick": Entry(partial(_public, "QuickReward"), "order of restorations by a small distilled network, in [0, 1]",
                   False, True, "package:iqareward", "Apache-2.0, BSD-3"),
    "lpips": Entry(partial(_public, "LPIPSReward"), "AlexNet feature distance; 0 = identical",
                   True, True, "torchvision:alex", "BSD-2", "perceptual", (-1.0, 0.0), (None, 0.0), False),
    "lpips_vgg": Entry(partial(_public, "LPIPSReward", net="vgg"), "VGG feature distance; 0 = identical",
                       True, True, "torchvision:vgg", "BSD-2", "perceptual", (-1.0, 0.0), (None, 0.0), False),
    "stlpips": Entry(partial(_public, "STLPIPSReward"), "LPIPS that tolerates small shifts; 0 = identical",
                     True, True, "package:stlpips_pytorch", "BSD-2", "perceptual", (-1.0, 0.0), (None, 0.0), False),
    "stlpips_vgg": Entry(partial(_public, "STLPIPSReward", net="vgg"), "the same with VGG features; 0 = identical",
                         True, True, "package:stlpips_pytorch", "BSD-2", "perceptual", (-1.0, 0.0), (None, 0.0), False),
    "cvvdp": Entry(partial(_public, "CVVDPReward"), "visible difference in JOD by ColorVideoVDP; 10 = identical",
                   True, True, "package:iqareward", "MIT", "", (4.0, 10.0), (None, 10.0)),
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
_REFUSED = {PYIQA_PREFIX + metric for metric in REFUSED}


def load(
    spec: Spec, *, device: torch.device | str | None = None, differentiable: bool = False, **options: Any
) -> Reward:
    """Make a reward from its name, or from a weighted sum of names.

    The parts of a sum must share a scale. Rewards whose scores may leave [-1, 1] are mapped to [0, 1] by a calibration
    that ships with the package, and are then named `"psnr[calibrated]"`; write that to get it for a reward alone. Write
    `"psnr[10, 50]"` for a range of your own: a score of 10 becomes 0, one of 50 becomes 1, linear between and constant
    beyond.

    Args:
        spec: A name of the catalogue (`iqareward list`), `"pyiqa:<metric>"`, or a sum such as `"0.7*qalign +
            0.3*ssim"`. Options may follow a name, as in `"lpips(net=vgg)"`, and then `[low, high]` or `[calibrated]`.
            Case, hyphens and underscores in names do not count: `"MS-SSIM"` is `"ms_ssim"`. Or, as YAML and TOML give
            it, a mapping of names to weights, or to options with `weight` and `range` among them; one reward as a
            mapping with `name`; or a list of such mappings and names, which is their sum.
        device: where rewards that have weights keep them; None = their default. Others run where the images are.
        differentiable: keep the graph from scores to pixels.
        **options: Options of the one reward that `spec` names, such as `weights` (`iqareward list NAME`).

    Returns:
        A reward: `[B]` float32 scores, higher is better, NaN = not scored.

    Raises:
        ValueError: an unknown name (near ones are listed), an unknown or wrong option, a sum that can be read in two
            ways for want of spaces, parts on another scale for which no calibration ships (the message has the line to
            write), a distance that is subtracted though its reward is negative already, or `differentiable` where there
            is none.
        TypeError: `spec` is neither text, nor a mapping, nor a list.
        ImportError: the reward needs an extra that is not installed.

    Example:
        >>> load("0.7*haarpsi + 0.3*psnr[10, 50]").bounds
        (0.0, 1.0)
        >>> load("ssim", color="y").name, load({"name": "ssim", "color": "y"}).name
        ('ssim(color=y)', 'ssim(color=y)')
        >>> load({"haarpsi": 0.7, "psnr": {"weight": 0.3, "range": [10, 50]}}).name
        '0.7*haarpsi + 0.3*psnr[10, 50]'
        >>> load("0.7*haarpsi + 0.3*psnr").name
        '0.7*haarpsi + 0.3*psnr[calibrated]'
        >>> load("0.7*ssim + 0.3*lpips")
        Traceback (most recent call last):
        ValueError: '0.7*ssim + 0.3*lpips' adds scores of different scales: lpips may leave [-1, 1], and no calibration
        of it ships. Write '0.7*ssim + 0.3*lpips[-1, 0]': the first score in brackets becomes 0, the second 1.
        >>> load("nique")
        Traceback (most recent call last):
        ValueError: unknown reward 'nique'; did you mean niqe, piqe, brisque, pyiqa:unique? `iqareward list` shows all
        names, `iqareward list --pyiqa` those of pyiqa.
    """
    terms = terms_of(spec, CATALOG)
    if options and len(terms) > 1:
        raise ValueError(
            f"load got {', '.join(options)} for a sum of {len(terms)} rewards. Write options behind the name of the "
            f"one that they belong to: 'ssim + {terms[-1].name}{write_options(options)}'."
        )
    terms[0] = with_options(terms[0], options)
    rewards = [_build(term, device, differentiable) for term in terms]
    if len(terms) == 1 and terms[0].weight is None:
        return rewards[0]
    if len(terms) > 1:
        rewards = _on_one_scale(spec, terms, rewards)
    elif distances := _subtracted(terms):
        raise _refused(spec, terms, distances)
    return WeightedSum([
        (1.0 if term.weight is None else term.weight, reward) for term, reward in zip(terms, rewards, strict=True)
    ])  # fmt: skip


def on_unit_scale(spec: Spec, reward: Reward, *, weight: float = 1.0) -> Reward:
    """A reward as a part of a sum.

    Args:
        spec: name or sum from which `load` built the reward.
        reward: that reward.
        weight: its weight there.

    Returns:
        The reward itself if its scores lie in [-1, 1] or it is a sum, otherwise with the calibration that ships.

    Raises:
        ValueError: no calibration of it ships, or it is a distance that the sum would subtract.

    Example:
        >>> on_unit_scale("piqe", load("piqe")).name, on_unit_scale("ssim", load("ssim")).name
        ('piqe[calibrated]', 'ssim')
    """
    if isinstance(reward, WeightedSum):
        return reward
    return _on_one_scale(spec, [terms_of(spec, CATALOG)[0]._replace(weight=weight)], [reward])[0]


def published(spec: Spec) -> tuple[float, float] | None:
    """How to turn scores of a reward into the numbers that papers print, often distances where lower is better.

    Args:
        spec: name or sum from which `load` built the reward.

    Returns:
        (scale, offset): papers print `scale * score + offset`. None for sums and ranges, which no paper prints, and for
        scores on a curve.

    Example:
        >>> published("niqe"), published("qalign"), published("0.7*haarpsi + 0.3*ssim")
        ((-1.0, 0.0), (4.0, 1.0), None)
    """
    first, *others = terms_of(spec, CATALOG)
    if others or first.weight is not None or first.range is not None:
        return None
    entry = _entry_of(first.name)
    if not entry.higher_is_better:
        return (-1.0, 0.0)
    if first.options.get("scale", "unit") != "unit":  # that of papers already
        return (1.0, 0.0)
    if entry.published_range is None:
        return None
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


def text_of(spec: Spec) -> str:
    """What `load` takes as text: a name, or a sum.

    Example:
        >>> text_of({"haarpsi": 0.7, "lpips": {"weight": 0.3, "range": [-1, 0], "net": "vgg"}})
        '0.7*haarpsi + 0.3*lpips(net=vgg)[-1, 0]'
    """
    return spec if isinstance(spec, str) else sum_of(terms_of(spec, CATALOG))


def _on_one_scale(spec: Spec, terms: list[Term], rewards: list[Reward]) -> list[Reward]:
    """The parts of a sum, calibrated where their scores may leave [-1, 1]; without a calibration, the line to write."""
    scaled = [_scaled(reward) for reward in rewards]
    texts = [term.text if part else _ranged(term) for term, part in zip(terms, scaled, strict=True)]
    wide = [reward.name for reward, part in zip(rewards, scaled, strict=True) if part is None]
    distances = _subtracted(terms)
    if wide:
        raise ValueError(
            f"{text_of(spec)!r} adds scores of different scales: {', '.join(wide)} may leave [-1, 1], and no "
            f"calibration of {'it' if len(wide) == 1 else 'them'} ships. Write {sum_of(terms, texts)!r}: the first "
            f"score in brackets becomes 0, the second 1.{f' {_hint(distances)}' if distances else ''}"
        )
    if distances:
        raise _refused(spec, terms, distances)
    return [part for part in scaled if part is not None]


def _subtracted(terms: Iterable[Term]) -> list[Term]:
    """Subtracted distances, whose rewards are their negatives already: people subtract them once more."""
    return [
        term
        for term in terms
        if sign_of(term) == "-" and term.range is None and not _entry_of(term.name).higher_is_better
    ]


def _hint(distances: Iterable[Term]) -> str:
    names = ", ".join(term.name for term in distances)
    return f"{names}: higher is better here already; did you mean + instead of -?"


def _refused(spec: Spec, terms: Iterable[Term], distances: Sequence[Term]) -> ValueError:
    texts = [
        term.text if term not in distances
        else f"{term.text}[calibrated]" if term.name in calibrations()
        else _ranged(term)
        for term in terms
    ]  # fmt: skip
    return ValueError(
        f"{text_of(spec)!r} subtracts {_hint(distances)} To subtract it all the same, write {sum_of(terms, texts)!r}."
    )


def _scaled(reward: Reward) -> Reward | None:
    """The reward, or if its scores may leave [-1, 1] its calibrated form; None if no calibration ships."""
    low, high = reward.bounds
    if low is not None and high is not None and -1 <= low < high <= 1:
        return reward
    return calibrated(reward) if reward.name in calibrations() else None


def _ranged(term: Term) -> str:
    usual = _entry_of(term.name).usual
    return f"{term.text}[{'low, high' if usual is None else ', '.join(map(exact, usual))}]"


def _build(term: Term, device: torch.device | str | None, differentiable: bool) -> Reward:
    entry = _entry_of(term.name)
    known, others = known_options(term.name)
    hints = {key: parameter.annotation for key, parameter in known.items()}
    options = checked(term.name, term.text, term.options, hints, others=others)
    if (batch_size := options.get("batch_size")) is not None and batch_size < 1:
        raise ValueError(f"{term.name} expected `batch_size` >= 1, got {batch_size}.")
    differentiable = options.pop("differentiable", differentiable)
    if differentiable and not entry.differentiable and term.name in CATALOG:
        graphs = ", ".join(known for known, other in CATALOG.items() if other.differentiable)
        raise ValueError(f"{term.name} has no useful gradient to the pixels. Differentiable rewards: {graphs}.")
    if differentiable:
        options["differentiable"] = True
    if entry.weights:
        options.setdefault("device", device)
    reward = entry.build(**options)
    if term.range is None:
        return reward
    if isinstance(term.range, str):
        return calibrated(reward)
    low, high = term.range
    return Calibrated(reward, AffineMap(low, high), name=f"{reward.name}[{exact(low)}, {exact(high)}]")


def known_options(name: str) -> tuple[dict[str, inspect.Parameter], bool]:
    """The options that may follow a name of the catalogue, and whether its class takes others too."""
    build: Any = _entry_of(name).build
    kind = build.func if isinstance(build, partial) else None
    if kind is _of_metric:
        form, metric = (inspect.signature(each).parameters for each in build.args[:2])
        found = {key: form[key] for key in ("differentiable", "batch_size")}
        return found | ({"color": metric["color"]} if "color" in metric.keys() - build.keywords.keys() else {}), False
    others, fixed = False, build.keywords if kind is _public else {}
    found = {"differentiable": inspect.Parameter("differentiable", inspect.Parameter.KEYWORD_ONLY, annotation=bool)}
    for key, parameter in inspect.signature(_class(build.args[0]) if kind is _public else build).parameters.items():
        others |= parameter.kind is parameter.VAR_KEYWORD
        if parameter.kind is not parameter.VAR_KEYWORD and key not in fixed:
            found[key] = parameter
    return found, others


def options_of(name: str) -> Iterator[tuple[str, str, str]]:
    """Of each option of a reward its text with the default, the kinds of value, and the first sentence about it.

    Example:
        >>> next(options_of("SSIM"))
        ('batch_size=none', 'a whole number or none', 'images per call of the metric')
    """
    name = terms_of(name, CATALOG)[0].name
    build: Any = _entry_of(name).build
    owners = (_class(build.args[0]),) if build.func is _public else build.args[:2]
    text = "\n".join(inspect.getdoc(owner) or "" for owner in owners)
    for key, parameter in sorted(known_options(name)[0].items()):
        said = re.search(rf"^ +{key}: (.+(?:\n {{8,}}.+)*)", text, re.MULTILINE)
        sentence = re.split(r"[.;](?:\s|$)", " ".join(said[1].split()) if said else "")[0]
        default = False if key == "differentiable" else parameter.default
        written = key if default is parameter.empty else write_options({key: default})[1:-1]
        yield written, kind_of(parameter.annotation), sentence
