"""Every reward that has a name, in one literal table; `load` builds them and their weighted sums."""

import difflib
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from iqareward.functional import gmsd, haarpsi, ms_ssim, niqe, piqe, psnr, ssim
from iqareward.functional.gmsd import MIN_SIDE as GMSD_MIN_SIDE
from iqareward.functional.haarpsi import MIN_SIDE as HAARPSI_MIN_SIDE
from iqareward.functional.ms_ssim import MIN_SIDE as MS_SSIM_MIN_SIDE
from iqareward.functional.niqe import MIN_SIDE as NIQE_MIN_SIDE
from iqareward.functional.piqe import MIN_SIDE as PIQE_MIN_SIDE
from iqareward.functional.ssim import WINDOW_SIZE as SSIM_MIN_SIDE
from iqareward.rewards.compose import WeightedSum
from iqareward.rewards.lpips_dists import DISTSReward, LPIPSReward
from iqareward.rewards.metric import FullReference, NoReference
from iqareward.rewards.mllm.deqa import DeQAReward
from iqareward.rewards.mllm.qalign import QAlignReward
from iqareward.rewards.mllm.vlm.presets import Q_INSIGHT_MODEL, Q_REALIGN_MODELS, VISUALQUALITY_R1_MODEL
from iqareward.rewards.mllm.vlm.published import QInsightReward, QReAlignReward, VisualQualityR1Reward
from iqareward.rewards.piq_metrics import PIQReward
from iqareward.rewards.pyiqa import PyIQAReward
from iqareward.types import Reward


class Entry(NamedTuple):
    """A row of the catalogue.

    Attributes:
        build: gives the reward; takes `differentiable` if that can be chosen, and `device` if the reward has weights.
        summary: what a score says.
        needs_references: whether it compares with references.
        differentiable: whether `differentiable=True` can be asked for.
        weights: where its weights come from, a hub id or "torchvision:<backbone>"; "" = it has none.
        licence: of code and weights as used here.
        extra: the extra of this package that it needs; "" = none.
    """

    build: Callable[..., Reward]
    summary: str
    needs_references: bool
    differentiable: bool
    weights: str = ""
    licence: str = "Apache-2.0"
    extra: str = ""


_similarity = partial(FullReference, higher_is_better=True)
_distance = partial(FullReference, higher_is_better=False)
_flaws = partial(NoReference, higher_is_better=False)

# fmt: off
CATALOG: dict[str, Entry] = {
    # name           reward, what a score says, needs references, can be differentiable
    "psnr": Entry(partial(_similarity, psnr, bounds=(None, 100.0)),
                  "pixel error in dB; 100 = identical", True, True),
    "psnr_y": Entry(partial(_similarity, partial(psnr, color="y"), name="psnr_y", bounds=(None, 100.0)),
                    "pixel error of Y as restoration papers report it", True, True),
    "ssim": Entry(partial(_similarity, ssim, bounds=(-1.0, 1.0), min_side=SSIM_MIN_SIDE),
                  "local structure of luma; 1 = identical", True, True),
    "ms_ssim": Entry(partial(_similarity, ms_ssim, bounds=(0.0, 1.0), min_side=MS_SSIM_MIN_SIDE),
                     "structure at five scales; 1 = identical", True, True),
    "gmsd": Entry(partial(_distance, gmsd, bounds=(None, 0.0), min_side=GMSD_MIN_SIDE),
                  "evenness of edge errors; 0 = identical", True, True),
    "haarpsi": Entry(partial(_similarity, haarpsi, bounds=(0.0, 1.0), min_side=HAARPSI_MIN_SIDE),
                     "wavelet similarity in colour; 1 = identical", True, True),
    "piqe": Entry(partial(_flaws, piqe, bounds=(-100.0, 0.0), min_side=PIQE_MIN_SIDE),
                  "blockwise distortion; 0 = none", False, False),
    "niqe": Entry(partial(_flaws, niqe, bounds=(None, 0.0), min_side=NIQE_MIN_SIDE),
                  "distance from natural statistics; sides >= 256", False, False),
    "qalign": Entry(QAlignReward, "quality level by one-align, in [0, 1]",
                    False, True, "q-future/one-align", "MIT, LLaMA-2"),
    "deqa": Entry(DeQAReward, "quality level by DeQA-Score, in [0, 1]",
                  False, True, "zhiyuanyou/DeQA-Score-Mix3", "MIT, LLaMA-2"),
    "qrealign": Entry(QReAlignReward, "quality level by Q-ReAlign-Mini, in [0, 1]",
                      False, True, Q_REALIGN_MODELS["mini"], "MIT", "vlm"),
    "qrealign_lite": Entry(partial(QReAlignReward, "lite"), "quality level by Q-ReAlign-Lite, in [0, 1]",
                           False, True, Q_REALIGN_MODELS["lite"], "MIT", "vlm"),
    "qrealign_pro": Entry(partial(QReAlignReward, "pro"), "quality level by Q-ReAlign-Pro, in [0, 1]",
                          False, True, Q_REALIGN_MODELS["pro"], "MIT", "vlm"),
    "visualquality_r1": Entry(VisualQualityR1Reward, "expected rating by VisualQuality-R1, in [0, 1]",
                              False, True, VISUALQUALITY_R1_MODEL, "MIT", "vlm"),
    "qinsight": Entry(QInsightReward, "expected rating by Q-Insight, in [0, 1]",
                      False, True, Q_INSIGHT_MODEL, "Apache-2.0", "vlm"),
    "lpips": Entry(partial(LPIPSReward, "alex"), "AlexNet feature distance; 0 = identical",
                   True, True, "torchvision:alex", "BSD-2", "perceptual"),
    "lpips_vgg": Entry(partial(LPIPSReward, "vgg"), "VGG feature distance; 0 = identical",
                       True, True, "torchvision:vgg", "BSD-2", "perceptual"),
    "dists": Entry(DISTSReward, "structure and texture distance; 0 = identical",
                   True, True, "torchvision:vgg", "MIT", "perceptual"),
    "fsim": Entry(partial(PIQReward, "fsim"), "phase and gradient similarity; 1 = identical",
                  True, False, extra="perceptual"),
    "vsi": Entry(partial(PIQReward, "vsi"), "saliency-weighted similarity; 1 = identical",
                 True, False, extra="perceptual"),
    "mdsi": Entry(partial(PIQReward, "mdsi"), "gradient and chroma deviation; 0 = identical",
                  True, False, extra="perceptual"),
    "srsim": Entry(partial(PIQReward, "srsim"), "spectral-residual similarity; 1 = identical",
                   True, False, extra="perceptual"),
    "dss": Entry(partial(PIQReward, "dss"), "DCT subband similarity; 1 = identical",
                 True, False, extra="perceptual"),
    "iwssim": Entry(partial(PIQReward, "iwssim"), "information-weighted structure; 1 = identical",
                    True, False, extra="perceptual"),
}
# fmt: on
PYIQA_PREFIX = "pyiqa:"

# names may hold + and -, so operators need spaces around them
_TERM = re.compile(r"(?:(?P<weight>\d*\.?\d+(?:[eE][+-]?\d+)?)\s*\*\s*)?(?P<name>[A-Za-z][^\s*]*)")
_OPERATOR = re.compile(r"\s+([+-])\s+")


def load(spec: str, *, device: torch.device | str | None = None, differentiable: bool = False) -> Reward:
    """The reward behind a name, or behind a weighted sum of names.

    Args:
        spec: a name of the catalogue (`iqareward list`), `"pyiqa:<metric>"`, or a sum such as `"0.7*niqe + 0.3*ssim"`,
            with spaces around the operators.
        device: where rewards that have weights keep them; None = their default. Others run where the images are.
        differentiable: keep the graph from scores to pixels.

    Returns:
        A reward: `[B]` float32 scores, higher is better, NaN = not scored.

    Raises:
        ValueError: an unknown name (near ones are listed), or `differentiable` for a reward that cannot be.
        ImportError: the reward needs an extra that is not installed.

    Example:
        >>> load("0.7*niqe + 0.3*ssim").name
        '0.7*niqe + 0.3*ssim'
        >>> load("nique")
        Traceback (most recent call last):
        ValueError: unknown reward 'nique'; near names: niqe, piqe. `iqareward list` shows all.
    """
    first, *rest = _OPERATOR.split(spec.strip())
    signed = [("+", first), *zip(rest[::2], rest[1::2], strict=True)]
    terms = []
    for sign, text in signed:
        match = _TERM.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{spec!r} is no reward: expected names or a sum such as '0.7*niqe + 0.3*ssim' "
                f"(spaces around + and -), could not read {text.strip()!r}."
            )
        weight = float(match["weight"] or 1.0) * (1 if sign == "+" else -1)
        terms.append((weight, _build(match["name"], device, differentiable), match["weight"]))
    if len(terms) == 1 and terms[0][2] is None:
        return terms[0][1]
    return WeightedSum([(weight, reward) for weight, reward, _ in terms])


def _build(name: str, device: torch.device | str | None, differentiable: bool) -> Reward:
    if name.startswith(PYIQA_PREFIX):
        return PyIQAReward(name.removeprefix(PYIQA_PREFIX), device=device, differentiable=differentiable)
    entry = CATALOG.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, CATALOG, n=3)
        hint = f"near names: {', '.join(near)}" if near else f"known names: {', '.join(CATALOG)}"
        spaces = " Sums need spaces around + and -." if "+" in name else ""
        raise ValueError(f"unknown reward {name!r}; {hint}. `iqareward list` shows all.{spaces}")
    if differentiable and not entry.differentiable:
        graphs = ", ".join(known for known, other in CATALOG.items() if other.differentiable)
        raise ValueError(f"{name} has no useful gradient to the pixels. Differentiable rewards: {graphs}.")
    options: dict[str, object] = {"differentiable": True} if differentiable else {}
    if entry.weights:
        options["device"] = device
    return entry.build(**options)
