"""Every reward that has a name, in one literal table; `load` builds them and their weighted sums."""

import difflib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from iqareward.functional import gmsd, haarpsi, ms_ssim, niqe, piqe, psnr, ssim
from iqareward.functional._chunks import FORMULA_BYTES_PER_PIXEL
from iqareward.functional.gmsd import MIN_SIDE as GMSD_MIN_SIDE
from iqareward.functional.haarpsi import MIN_SIDE as HAARPSI_MIN_SIDE
from iqareward.functional.ms_ssim import MIN_SIDE as MS_SSIM_MIN_SIDE
from iqareward.functional.niqe import MIN_SIDE as NIQE_MIN_SIDE
from iqareward.functional.piqe import MIN_SIDE as PIQE_MIN_SIDE
from iqareward.functional.ssim import WINDOW_SIZE as SSIM_MIN_SIDE
from iqareward.rewards.combine import AffineMap, Calibrated, WeightedSum, exact
from iqareward.rewards.lpips_dists import DISTSReward, LPIPSReward
from iqareward.rewards.metric import FullReference, NoReference
from iqareward.rewards.owl2.rewards import DeQAReward, QAlignReward
from iqareward.rewards.piq_metrics import PIQReward
from iqareward.rewards.pyiqa import PyIQAReward
from iqareward.rewards.pyiqa_facts import METRICS, NO_GRADIENT, REFUSED, bounds_of
from iqareward.rewards.vlm.presets import Q_INSIGHT_MODEL, Q_REALIGN_MODELS, VISUALQUALITY_R1_MODEL
from iqareward.rewards.vlm.rewards import QInsightReward, QReAlignReward, VisualQualityR1Reward
from iqareward.types import Bounds, Reward


class Entry(NamedTuple):
    """A row of the catalogue.

    Attributes:
        build: gives the reward; takes `differentiable` if that can be chosen, and `device` if the reward has weights.
        summary: what a score says.
        needs_references: whether it compares with references.
        differentiable: whether `differentiable=True` can be asked for.
        weights: where its weights come from, a hub id, "torchvision:<backbone>" or "pyiqa"; "" = it has none.
        licence: of code and weights as used here.
        extra: the extra of this package that it needs; "" = none.
        usual: the scores between which most photographs lie, from bad to best.
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
    usual: tuple[float, float] = (0.0, 1.0)
    bounds: Bounds = (0.0, 1.0)
    higher_is_better: bool = True
    published_range: tuple[float, float] = (0.0, 1.0)


def _metric(
    metric: Callable[..., Tensor],
    summary: str,
    *,
    bounds: Bounds = (0.0, 1.0),
    usual: tuple[float, float] = (0.0, 1.0),
    higher_is_better: bool = True,
    references: bool = True,
    differentiable: bool = True,
    min_side: int = 1,
    name: str = "",
) -> Entry:
    form = FullReference if references else NoReference
    build = partial(
        form, metric, higher_is_better=higher_is_better, bounds=bounds, min_side=min_side, name=name,
        bytes_per_pixel=FORMULA_BYTES_PER_PIXEL,
    )  # fmt: skip
    return Entry(
        build, summary, references, differentiable, usual=usual, bounds=bounds, higher_is_better=higher_is_better
    )


# fmt: off
CATALOG: dict[str, Entry] = {
    "psnr": _metric(psnr, "pixel error in dB; 100 = identical", bounds=(None, 100.0), usual=(10.0, 50.0)),
    "psnr_y": _metric(partial(psnr, color="y"), "pixel error of Y as restoration papers report it",
                      bounds=(None, 100.0), usual=(10.0, 50.0), name="psnr_y"),
    "ssim": _metric(ssim, "local structure of luma; 1 = identical", bounds=(-1.0, 1.0), min_side=SSIM_MIN_SIDE),
    "ms_ssim": _metric(ms_ssim, "structure at five scales; 1 = identical", min_side=MS_SSIM_MIN_SIDE),
    "gmsd": _metric(gmsd, "evenness of edge errors; 0 = identical", bounds=(None, 0.0), usual=(-0.35, 0.0),
                    higher_is_better=False, min_side=GMSD_MIN_SIDE),
    "haarpsi": _metric(haarpsi, "wavelet similarity in colour; 1 = identical", min_side=HAARPSI_MIN_SIDE),
    "piqe": _metric(piqe, "blockwise distortion; 0 = none; light noise raises the score", bounds=(-100.0, 0.0),
                    usual=(-100.0, 0.0), higher_is_better=False, references=False, differentiable=False,
                    min_side=PIQE_MIN_SIDE),
    "niqe": _metric(niqe, "distance from natural statistics; best at sides >= 256; latent autoencoders raise it",
                    bounds=(None, 0.0), usual=(-12.0, 0.0), higher_is_better=False, references=False,
                    differentiable=False, min_side=NIQE_MIN_SIDE),
    # name           reward, what a score says, needs references, can be differentiable, weights, licence, extra
    "qalign": Entry(QAlignReward, "quality level by one-align, in [0, 1]",
                    False, True, "q-future/one-align", "MIT, LLaMA-2", published_range=(1.0, 5.0)),
    "deqa": Entry(DeQAReward, "quality level by DeQA-Score, in [0, 1]",
                  False, True, "zhiyuanyou/DeQA-Score-Mix3", "MIT, LLaMA-2", published_range=(1.0, 5.0)),
    "qrealign": Entry(QReAlignReward, "quality level by Q-ReAlign-Mini, in [0, 1]",
                      False, True, Q_REALIGN_MODELS["mini"], "MIT", "vlm"),
    "qrealign_lite": Entry(partial(QReAlignReward, "lite"), "quality level by Q-ReAlign-Lite, in [0, 1]",
                           False, True, Q_REALIGN_MODELS["lite"], "MIT", "vlm"),
    "qrealign_pro": Entry(partial(QReAlignReward, "pro"), "quality level by Q-ReAlign-Pro, in [0, 1]",
                          False, True, Q_REALIGN_MODELS["pro"], "MIT", "vlm"),
    "visualquality_r1": Entry(VisualQualityR1Reward, "expected rating by VisualQuality-R1, in [0, 1]",
                              False, True, VISUALQUALITY_R1_MODEL, "MIT", "vlm", published_range=(1.0, 5.0)),
    "qinsight": Entry(QInsightReward, "expected rating by Q-Insight, in [0, 1]",
                      False, True, Q_INSIGHT_MODEL, "Apache-2.0", "vlm", published_range=(1.0, 5.0)),
    "lpips": Entry(partial(LPIPSReward, "alex"), "AlexNet feature distance; 0 = identical",
                   True, True, "torchvision:alex", "BSD-2", "perceptual", (-1.0, 0.0), (None, 0.0), False),
    "lpips_vgg": Entry(partial(LPIPSReward, "vgg"), "VGG feature distance; 0 = identical",
                       True, True, "torchvision:vgg", "BSD-2", "perceptual", (-1.0, 0.0), (None, 0.0), False),
    "dists": Entry(DISTSReward, "structure and texture distance; 0 = identical",
                   True, True, "torchvision:vgg", "MIT", "perceptual", (-1.0, 0.0), (None, 0.0), False),
    "fsim": Entry(partial(PIQReward, "fsim"), "phase and gradient similarity; 1 = identical",
                  True, False, extra="perceptual"),
    "vsi": Entry(partial(PIQReward, "vsi"), "saliency-weighted similarity; 1 = identical",
                 True, False, extra="perceptual"),
    "mdsi": Entry(partial(PIQReward, "mdsi"), "gradient and chroma deviation; 0 = identical",
                  True, False, extra="perceptual", usual=(-0.5, 0.0), bounds=(None, 0.0), higher_is_better=False),
    "srsim": Entry(partial(PIQReward, "srsim"), "spectral-residual similarity; 1 = identical",
                   True, False, extra="perceptual"),
    "dss": Entry(partial(PIQReward, "dss"), "DCT subband similarity; 1 = identical",
                 True, False, extra="perceptual"),
    "iwssim": Entry(partial(PIQReward, "iwssim"), "information-weighted structure; 1 = identical",
                    True, False, extra="perceptual"),
}
# fmt: on
PYIQA_PREFIX = "pyiqa:"
PYIQA = {
    PYIQA_PREFIX + name: Entry(
        partial(PyIQAReward, name), "", metric.needs_references, name not in NO_GRADIENT,
        "pyiqa", "PolyForm Noncommercial", "pyiqa", metric.usual, bounds_of(name), metric.higher_is_better,
    )
    for name, metric in METRICS.items()
}  # fmt: skip

_NUMBER = r"\d*\.?\d+(?:[eE][+-]?\d+)?"
_TERM = re.compile(
    rf"(?:(?P<weight>{_NUMBER})\s*\*\s*)?(?P<name>[A-Za-z](?:[^\s*\[\]]*[^\s*\[\]_-])?)"
    rf"(?:\[\s*(?P<low>-?{_NUMBER})\s*,\s*(?P<high>-?{_NUMBER})\s*\])?"
)


def load(spec: str, *, device: torch.device | str | None = None, differentiable: bool = False) -> Reward:
    """The reward behind a name, or behind a weighted sum of names.

    A sum adds the scores as they are, so its parts must share a scale: each must lie in [-1, 1]. Write
    `"psnr[10, 50]"` for a reward that does not: a score of 10 becomes 0, one of 50 becomes 1, linear between and
    constant beyond.

    Args:
        spec: a name of the catalogue (`iqareward list`), `"pyiqa:<metric>"`, or a sum such as
            `"0.7*qalign + 0.3*ssim"`; `[low, high]` may follow each name. Case, hyphens and underscores in names do not
            count: `"MS-SSIM"` is `"ms_ssim"`.
        device: where rewards that have weights keep them; None = their default. Others run where the images are.
        differentiable: keep the graph from scores to pixels.

    Returns:
        A reward: `[B]` float32 scores, higher is better, NaN = not scored.

    Raises:
        ValueError: an unknown name (near ones are listed), a sum that can be read in two ways for want of spaces, parts
            that do not share a scale (the message has the line to write), or `differentiable` where there is none.
        ImportError: the reward needs an extra that is not installed.

    Example:
        >>> load("0.7*haarpsi + 0.3*psnr[10, 50]").bounds
        (0.0, 1.0)
        >>> load("0.7*haarpsi + 0.3*psnr")
        Traceback (most recent call last):
        ValueError: '0.7*haarpsi + 0.3*psnr' adds scores of different scales: psnr may leave [-1, 1]. Write
        '0.7*haarpsi + 0.3*psnr[10, 50]': the first score in brackets becomes 0, the second 1.
        >>> load("nique")
        Traceback (most recent call last):
        ValueError: unknown reward 'nique'; did you mean niqe, piqe, pyiqa:unique? `iqareward list` shows all,
        `iqareward list --pyiqa` pyiqa's.
    """
    readings = list(_readings(spec))
    if not readings:
        raise _unreadable(spec)
    if len(readings) > 1:
        forms = (" ".join(f"{sign} {term[0]}" for sign, term in reading)[2:] for reading in readings)
        raise ValueError(f"{spec!r} can be read as {' or '.join(map(repr, forms))}; put spaces around the operators.")
    signs, texts = [sign for sign, _ in readings[0]], [term[0] for _, term in readings[0]]
    terms: list[tuple[float, Reward]] = []
    for sign, match in readings[0]:
        reward = _build(_known_names()[_key(match["name"])], device, differentiable)
        if match["low"] is not None:
            low, high = float(match["low"]), float(match["high"])
            reward = Calibrated(reward, AffineMap(low, high), name=f"{reward.name}[{exact(low)}, {exact(high)}]")
        if len(texts) == 1 and match["weight"] is None:
            return reward
        terms.append((float(match["weight"] or 1.0) * (1 if sign == "+" else -1), reward))
    if len(texts) > 1:
        parts = [on_unit_scale(text, reward) for text, (_, reward) in zip(texts, terms, strict=True)]
        if parts != texts:
            line = parts[0] + "".join(f" {sign} {part}" for sign, part in zip(signs[1:], parts[1:], strict=True))
            wide = ", ".join(r.name for text, part, (_, r) in zip(texts, parts, terms, strict=True) if part != text)
            # Of a metric known as a distance the reward is the negative already; people subtract it once more.
            twice = [reward.name for weight, reward in terms if weight < 0 and reward.bounds[1] == 0]
            hint = f" {', '.join(twice)}: higher is better here already; did you mean + instead of -?" if twice else ""
            raise ValueError(
                f"{spec!r} adds scores of different scales: {wide} may leave [-1, 1]. "
                f"Write {line!r}: the first score in brackets becomes 0, the second 1.{hint}"
            )
    return WeightedSum(terms)


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
    match = _known_term(spec)
    if match is None:
        raise ValueError(f"on_unit_scale expected the spec of {reward.name!r}, got {spec!r}.")
    low, high = (CATALOG | PYIQA)[_known_names()[_key(match["name"])]].usual
    return f"{spec}[{exact(low)}, {exact(high)}]"


def _key(name: str) -> str:
    """What counts in a name: neither case nor hyphens and underscores."""
    return re.sub("[-_]", "", name).lower()


def _known_names() -> dict[str, str]:
    """Key -> name, of the table and of pyiqa."""
    names = (*CATALOG, *PYIQA, *(PYIQA_PREFIX + metric for metric in REFUSED))
    return {_key(name): name for name in names}


def _known_term(text: str) -> re.Match[str] | None:
    match = _TERM.fullmatch(text.strip())
    return match if match and _key(match["name"]) in _known_names() else None


def _readings(text: str, sign: str = "+") -> Iterator[list[tuple[str, re.Match[str]]]]:
    """Every way to read a sum of known names: + and - are operators or, within a word, may belong to a name."""
    if term := _known_term(text):
        yield [(sign, term)]
    for operator in re.finditer("[+-]", text):
        if term := _known_term(text[: operator.start()]):
            yield from ([(sign, term), *rest] for rest in _readings(text[operator.end() :], operator[0]))


def _unreadable(spec: str) -> ValueError:
    """The first part of a spec that is not known, and what may have been meant."""
    rest = spec.strip()
    while ends := [found.end() for found in re.finditer("[+-]", rest) if _known_term(rest[: found.start()])]:
        rest = rest[ends[-1] :].strip()
    text = re.split(r"\s+[+-]\s+", rest)[0]
    match = _TERM.fullmatch(text)
    if match is None:
        return ValueError(
            f"{spec!r} is no reward: expected names or a sum such as '0.7*haarpsi + 0.3*psnr[10, 50]', could not read "
            f"{text!r}."
        )
    name = match["name"].partition("+")[0]
    wanted = _key(name.removeprefix(PYIQA_PREFIX))
    ours = {} if name.startswith(PYIQA_PREFIX) else {_key(known): known for known in CATALOG}
    theirs = {_key(known.removeprefix(PYIQA_PREFIX)): known for known in PYIQA}
    near = [known[key] for known in (ours, theirs) for key in difflib.get_close_matches(wanted, known)]
    if wanted in theirs:
        near = [theirs[wanted]]
    hint = f"did you mean {', '.join(near[:3])}? " if near else ""
    return ValueError(f"unknown reward {name!r}; {hint}`iqareward list` shows all, `iqareward list --pyiqa` pyiqa's.")


def _build(name: str, device: torch.device | str | None, differentiable: bool) -> Reward:
    if name.startswith(PYIQA_PREFIX):
        return PyIQAReward(name.removeprefix(PYIQA_PREFIX), device=device, differentiable=differentiable)
    entry = CATALOG[name]
    if differentiable and not entry.differentiable:
        graphs = ", ".join(known for known, other in CATALOG.items() if other.differentiable)
        raise ValueError(f"{name} has no useful gradient to the pixels. Differentiable rewards: {graphs}.")
    options: dict[str, object] = {"differentiable": True} if differentiable else {}
    if entry.weights:
        options["device"] = device
    return entry.build(**options)


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
    match = _known_term(spec)
    if match is None or match["weight"] or match["low"]:
        return None
    facts = (CATALOG | PYIQA)[_known_names()[_key(match["name"])]]
    if not facts.higher_is_better:
        return (-1.0, 0.0)
    low, high = facts.published_range
    return (high - low, low)
