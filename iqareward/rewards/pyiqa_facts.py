"""What pyiqa 0.1.16 does not say, or not reliably: one literal row per metric, and lists of those that need care."""

from typing import NamedTuple

from torch import Tensor

from iqareward._gradients import clamp
from iqareward.types import Bounds

FULL, NONE = True, False  # whether a metric compares with a reference
HIGHER, LOWER = True, False  # which way is better


class Metric(NamedTuple):
    """Mode, direction and usual range of a metric, in its own direction.

    Attributes:
        needs_references: whether it compares with references.
        higher_is_better: direction.
        low: lower end of the range that pyiqa states (most are habits of the training labels, not limits of the
            network), for `normalize=True`; None = unbounded.
        high: upper end, likewise.
        half: where one end is unbounded: the distance from the other end that is mapped to 1/2, our choice.
    """

    needs_references: bool
    higher_is_better: bool
    low: float | None
    high: float | None
    half: float | None = None

    @property
    def usual(self) -> tuple[float, float]:
        """The usual range of the reward, that is after the sign; an open end lies two `half` away from the other."""
        reach = 2 * (self.half or 0.0)
        low = self.low if self.low is not None else (self.high or 0.0) - reach
        high = self.high if self.high is not None else low + reach
        return (low, high) if self.higher_is_better else (-high, -low)

    def normalized(self, values: Tensor) -> Tensor:
        """Values on [0, 1], 1 = best: linear in [low, high], constant beyond, d / (d + half) where one end is open."""
        if self.low is not None and self.high is not None:
            unit = clamp((values - self.low) / (self.high - self.low), 0, 1)
        elif self.low is not None and self.half is not None:
            distance = (values - self.low).clamp(min=0)
            unit = distance / (distance + self.half)
        elif self.high is not None and self.half is not None:
            unit = self.half / ((self.high - values).clamp(min=0) + self.half)
        else:
            raise AssertionError("a metric with an open end has a half")
        return unit if self.higher_is_better else 1 - unit


# PSNR: pyiqa states ~40 and ~60, but images beyond are common in restoration, and its constant 1e-8 caps it at 80.
METRICS = {
    "ahiq": Metric(FULL, HIGHER, 0, 1),
    "ckdn": Metric(FULL, HIGHER, 0, 1),
    "lpips": Metric(FULL, LOWER, 0, 1),
    "lpips-vgg": Metric(FULL, LOWER, 0, 1),
    "lpips+": Metric(FULL, LOWER, 0, 1),
    "lpips-vgg+": Metric(FULL, LOWER, 0, 1),
    "stlpips": Metric(FULL, LOWER, 0, 1),
    "stlpips-vgg": Metric(FULL, LOWER, 0, 1),
    "dists": Metric(FULL, LOWER, 0, 1),
    "deepdc": Metric(FULL, LOWER, 0, 1),
    "ssim": Metric(FULL, HIGHER, 0, 1),
    "ssimc": Metric(FULL, HIGHER, 0, 1),
    "psnr": Metric(FULL, HIGHER, 0, 80),
    "psnry": Metric(FULL, HIGHER, 0, 80),
    "fsim": Metric(FULL, HIGHER, 0, 1),
    "ms_ssim": Metric(FULL, HIGHER, 0, 1),
    "vif": Metric(FULL, HIGHER, 0, 1),
    "gmsd": Metric(FULL, LOWER, 0, 1),
    "nlpd": Metric(FULL, LOWER, 0, 1),
    "vsi": Metric(FULL, HIGHER, 0, 1),
    "cw_ssim": Metric(FULL, HIGHER, 0, 1),
    "mad": Metric(FULL, LOWER, 0, None, half=50),
    "piqe": Metric(NONE, LOWER, 0, 100),
    "niqe": Metric(NONE, LOWER, 0, 100),
    "niqe_matlab": Metric(NONE, LOWER, 0, 100),
    "ilniqe": Metric(NONE, LOWER, 0, 100),
    "brisque": Metric(NONE, LOWER, 0, 150),
    "brisque_matlab": Metric(NONE, LOWER, 0, 100),
    "nrqm": Metric(NONE, HIGHER, 0, 10),
    "pi": Metric(NONE, LOWER, 0, None, half=5),
    "cnniqa": Metric(NONE, HIGHER, 0, 1),
    "musiq": Metric(NONE, HIGHER, 0, 100),
    "musiq-ava": Metric(NONE, HIGHER, 1, 10),
    "musiq-paq2piq": Metric(NONE, HIGHER, 0, 100),
    "musiq-spaq": Metric(NONE, HIGHER, 0, 100),
    "nima": Metric(NONE, HIGHER, 0, 10),
    "nima-koniq": Metric(NONE, HIGHER, 0, 1),
    "nima-spaq": Metric(NONE, HIGHER, 0, 1),
    "nima-vgg16-ava": Metric(NONE, HIGHER, 0, 10),
    "pieapp": Metric(FULL, LOWER, 0, 5),
    "paq2piq": Metric(NONE, HIGHER, 0, 100),
    "dbcnn": Metric(NONE, HIGHER, 0, 1),
    "maniqa": Metric(NONE, HIGHER, 0, 1),
    "maniqa-pipal": Metric(NONE, HIGHER, 0, 1),
    "maniqa-kadid": Metric(NONE, HIGHER, 0, 1),
    "clipiqa": Metric(NONE, HIGHER, 0, 1),
    "clipiqa+": Metric(NONE, HIGHER, 0, 1),
    "clipiqa+_vitL14_512": Metric(NONE, HIGHER, 0, 1),
    "clipiqa+_rn50_512": Metric(NONE, HIGHER, 0, 1),
    "fgresq": Metric(NONE, HIGHER, 0, 1),
    "tres": Metric(NONE, HIGHER, 0, 100),
    "tres-flive": Metric(NONE, HIGHER, 0, 100),
    "hyperiqa": Metric(NONE, HIGHER, 0, 1),
    "metaiqa": Metric(NONE, HIGHER, 0, 1),
    "uranker": Metric(NONE, HIGHER, -1, 2),
    "entropy": Metric(NONE, HIGHER, 0, 8),
    "topiq_nr": Metric(NONE, HIGHER, 0, 1),
    "topiq_nr-flive": Metric(NONE, HIGHER, 0, 1),
    "topiq_nr-spaq": Metric(NONE, HIGHER, 0, 1),
    "topiq_nr-face": Metric(NONE, HIGHER, 0, 1),
    "topiq_nr_swin-face": Metric(NONE, HIGHER, 0, 1),
    "topiq_nr-face-v1": Metric(NONE, HIGHER, 0, 1),
    "topiq_fr": Metric(FULL, HIGHER, 0, 1),
    "topiq_fr-pipal": Metric(FULL, HIGHER, 0, 1),
    "topiq_iaa": Metric(NONE, HIGHER, 1, 10),
    "topiq_iaa_res50": Metric(NONE, HIGHER, 1, 10),
    "laion_aes": Metric(NONE, HIGHER, 1, 10),
    "liqe": Metric(NONE, HIGHER, 1, 5),
    "liqe_mix": Metric(NONE, HIGHER, 1, 5),
    "wadiqam_fr": Metric(FULL, HIGHER, -1, 0.1),
    "wadiqam_nr": Metric(NONE, HIGHER, -1, 0.1),
    "qalign": Metric(NONE, HIGHER, 1, 5),
    "qalign_8bit": Metric(NONE, HIGHER, 1, 5),
    "qalign_4bit": Metric(NONE, HIGHER, 1, 5),
    "qrealign": Metric(NONE, HIGHER, 0, 1),
    "qrealign-mini": Metric(NONE, HIGHER, 0, 1),
    "qrealign-lite": Metric(NONE, HIGHER, 0, 1),
    "qrealign-pro": Metric(NONE, HIGHER, 0, 1),
    "compare2score": Metric(NONE, HIGHER, 0, 100),
    "unique": Metric(NONE, HIGHER, -3, 3),
    "arniqa": Metric(NONE, HIGHER, 0, 1),
    "arniqa-live": Metric(NONE, HIGHER, 0, 1),
    "arniqa-csiq": Metric(NONE, HIGHER, 0, 1),
    "arniqa-tid": Metric(NONE, HIGHER, 0, 1),
    "arniqa-kadid": Metric(NONE, HIGHER, 0, 1),
    "arniqa-clive": Metric(NONE, HIGHER, 0, 1),
    "arniqa-flive": Metric(NONE, HIGHER, 0, 1),
    "arniqa-spaq": Metric(NONE, HIGHER, 0, 1),
    "msswd": Metric(FULL, LOWER, 0, 10),
    "dmm": Metric(FULL, HIGHER, 0, None, half=1),
    "maclip": Metric(NONE, HIGHER, 0, 1),
    "qualiclip": Metric(NONE, HIGHER, 0, 1),
    "qualiclip+": Metric(NONE, HIGHER, 0, 1),
    "qualiclip+-clive": Metric(NONE, HIGHER, 0, 1),
    "qualiclip+-flive": Metric(NONE, HIGHER, 0, 1),
    "qualiclip+-spaq": Metric(NONE, HIGHER, 0, 1),
    "afine_nr": Metric(NONE, LOWER, -2, 2),
    "afine_fr": Metric(FULL, LOWER, -2, 2),
    "afine_all_scale": Metric(FULL, LOWER, 0, 100),
    "afine_all": Metric(FULL, LOWER, None, 2, half=2),
}

REFUSED = {
    "fid": "it compares two sets of images and has no value for one image",
    "sfid": "it compares two sets of images and has no value for one image",
    "fid_dinov2": "it compares two sets of images and has no value for one image",
    "inception_score": "it rates a set of images and has no value for one image",
    "clipscore": "it rates agreement with a caption, not quality",
    "fgresq_pair": "it ranks two candidates and gives no score of one; use 'fgresq'",
}

# Limits that the formula guarantees, checked with and without a difference between the images. All other ranges are
# habits: networks leave them.
HARD_RANGE = {
    "psnr": (0.0, 80.0), "psnry": (0.0, 80.0), "ssim": (0.0, 1.0), "ssimc": (0.0, 1.0), "ms_ssim": (0.0, 1.0),
    "gmsd": (0.0, None), "nlpd": (0.0, None), "mad": (0.0, None), "piqe": (0.0, 100.0), "entropy": (0.0, 8.0),
}  # fmt: skip


def bounds_of(metric: str) -> Bounds:
    """What a raw score cannot leave, after the sign."""
    low, high = HARD_RANGE.get(metric, (None, None))
    if METRICS[metric].higher_is_better:
        return (low, high)
    return (None if high is None else 0.0 - high, None if low is None else 0.0 - low)


# Measured: shorter sides that the metric needs (8 where it would score less than its filters see). Other metrics are
# tried, and a failure is noticed when it happens.
MIN_SIDE = {
    "ssim": 11, "ssimc": 11, "ms_ssim": 161, "cw_ssim": 64, "vif": 33, "fsim": 8, "vsi": 8, "gmsd": 8, "nlpd": 8,
    "mad": 16, "piqe": 8, "niqe": 96, "niqe_matlab": 96, "stlpips": 21, "pieapp": 64, "wadiqam_fr": 33,
    "wadiqam_nr": 33, "msswd": 8, "liqe": 224, "liqe_mix": 224,
}  # fmt: skip

# Working memory without and with a graph. Counted at 512x512: MAD 3450 and 18391, PieAPP 2986 and 8143, ST-LPIPS 895
# and 2017, URanker 659 and 4036, CW-SSIM 493 and 736, MUSIQ 471 and 2033, eleven others less. For all others stands a
# VGG-16 that keeps every layer of both images, which is what DISTS takes.
BYTES_PER_PIXEL = {"mad": (3600, 18500), "pieapp": (3072, 8192), "": (2560, 4096)}

NO_GRADIENT = {
    **dict.fromkeys(("piqe", "entropy"), "it counts, so its gradient is zero"),
    **dict.fromkeys(("nrqm", "pi"), "part of it runs in numpy"),
    **dict.fromkeys(("qalign", "qalign_8bit", "qalign_4bit", "compare2score"), "it converts images to PIL"),
    **dict.fromkeys(
        ("deepdc", "dmm", "afine_nr", "afine_fr", "afine_all_scale", "afine_all"), "it turns gradients off inside"
    ),
    **dict.fromkeys(
        ("qrealign", "qrealign-mini", "qrealign-lite", "qrealign-pro"),
        "it turns gradients off inside",
    ),
    **dict.fromkeys(("ilniqe", "fgresq", "maclip"), "its gradient was never measured"),
}

# They fail without a face, also on any image that could serve as a test: each of their failures is the image's own.
NEEDS_FACE = frozenset({"topiq_nr-face", "topiq_nr_swin-face", "topiq_nr-face-v1"})
NEEDS_CUDA = frozenset({"maclip"})
ONE_IMAGE_PER_CALL = NEEDS_FACE | NEEDS_CUDA | {"qalign", "qalign_8bit", "qalign_4bit", "compare2score"}

# On a reference of one colour CW-SSIM answers 1,000,000, VIF 0 even for identical images, VSI 1 for black on white.
FLAT_REFERENCE_UNDEFINED = frozenset({"cw_ssim", "vif", "vsi"})
# On stripes, where a band of its wavelet is empty, CW-SSIM answers 1,000,000 too.
CEILING = {"cw_ssim": 1.001}

# pyiqa's PIQE completes other sizes by `size % 16` pixels instead of up to the next multiple: up to 16 points wrong.
PAD_TO_MULTIPLE = {"piqe": 16}

# Modules that pyiqa imports but does not require, and what to install for them.
MISSING_REQUIREMENTS = {"icecream": "icecream", "pkg_resources": "'setuptools<81'"}
