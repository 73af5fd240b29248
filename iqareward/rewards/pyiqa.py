"""Any metric of the pyiqa package as a reward that survives training."""

import difflib
import importlib.util
import inspect
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from iqareward._gradients import clamp
from iqareward.images import drop_broken_gradients
from iqareward.optional import require
from iqareward.rewards.core import ImageReward
from iqareward.rewards.loading import LazyModel, plain_defaults
from iqareward.rewards.options import name_with
from iqareward.types import Bounds
from iqareward.weight_files import FLOATS, check_values, decode, listed

_LOGGER = logging.getLogger(__name__)
_PROBE_SIDE = 256
# what metrics raise on images that they cannot score; LinAlgError is one of these in torch and in numpy
_IMAGE_ERRORS = (RuntimeError, AssertionError, ValueError, IndexError, ArithmeticError)
_RESERVED = {"as_loss", "loss_weight", "loss_reduction", "check_input_range", "pretrained_model_path"}

# What pyiqa's configuration does not say, found with version 0.1.16.

REFUSED = {
    **dict.fromkeys(("fid", "sfid", "fid_dinov2"), "it compares two sets of images and has no value for one image"),
    "inception_score": "it rates a set of images and has no value for one image",
    "clipscore": "it rates agreement with a caption, not quality",
    "fgresq_pair": "it ranks two candidates and gives no score of one; use 'fgresq'",
}
NO_GRADIENT = {
    **dict.fromkeys(("piqe", "entropy"), "it counts, so its gradient is zero"),
    **dict.fromkeys(("nrqm", "pi"), "part of it runs in numpy"),
    **dict.fromkeys(("qalign", "qalign_8bit", "qalign_4bit", "compare2score"), "it converts images to PIL"),
    **dict.fromkeys(
        ("deepdc", "dmm", "afine_nr", "afine_fr", "afine_all_scale", "afine_all",
         "qrealign", "qrealign-mini", "qrealign-lite", "qrealign-pro"), "it turns gradients off inside"
    ),
    **dict.fromkeys(("ilniqe", "fgresq", "maclip"), "its gradient was never measured"),
}  # fmt: skip
# They fail without a face, also on any image that could serve as a test: each of their failures is the image's own.
_NEEDS_FACE = frozenset({"topiq_nr-face", "topiq_nr_swin-face", "topiq_nr-face-v1"})
NEEDS_CUDA = frozenset({"maclip"})
NO_WEIGHTS = frozenset({
    "ssim", "ssimc", "ms_ssim", "cw_ssim", "psnr", "psnry", "fsim", "vsi", "vif", "gmsd", "nlpd", "mad", "piqe",
    "entropy",
})  # fmt: skip
_ONE_IMAGE_PER_CALL = _NEEDS_FACE | NEEDS_CUDA | {"qalign", "qalign_8bit", "qalign_4bit", "compare2score"}
# On a reference of one colour CW-SSIM answers 1,000,000, VIF 0 even for identical images, VSI 1 for black on white.
_FLAT_REFERENCE_UNDEFINED = frozenset({"cw_ssim", "vif", "vsi"})
# On stripes, where a band of its wavelet is empty, CW-SSIM answers 1,000,000 too.
_CEILING = {"cw_ssim": 1.001}
# pyiqa's PIQE completes other sizes by `size % 16` pixels instead of up to the next multiple: up to 16 points wrong.
_PAD_TO_MULTIPLE = {"piqe": 16}
# pyiqa states ~40 and ~60, but images beyond are common in restoration, and its constant 1e-8 caps PSNR at 80.
_RANGE = {"psnr": (0.0, 80.0), "psnry": (0.0, 80.0)}
# Limits that the formula guarantees, checked with and without a difference between the images. All other ranges are
# habits: networks leave them.
_HARD_RANGE = {
    "psnr": (0.0, 80.0), "psnry": (0.0, 80.0), "ssim": (0.0, 1.0), "ssimc": (0.0, 1.0), "ms_ssim": (0.0, 1.0),
    "gmsd": (0.0, None), "nlpd": (0.0, None), "mad": (0.0, None), "piqe": (0.0, 100.0), "entropy": (0.0, 8.0),
}  # fmt: skip
# Where one end of a range is open: the distance from the other end that `normalize=True` maps to 1/2; 1 for others.
_HALF = {"mad": 50.0, "pi": 5.0, "afine_all": 2.0}
# Shorter sides that a metric needs (8 where it would score less than its filters see). Other metrics are tried, and a
# failure is noticed when it happens.
MIN_SIDE = {
    "ssim": 11, "ssimc": 11, "ms_ssim": 161, "cw_ssim": 64, "vif": 33, "fsim": 8, "vsi": 8, "gmsd": 8, "nlpd": 8,
    "mad": 16, "piqe": 8, "niqe": 96, "niqe_matlab": 96, "stlpips": 21, "pieapp": 64, "wadiqam_fr": 33,
    "wadiqam_nr": 33, "msswd": 8, "liqe": 224, "liqe_mix": 224,
}  # fmt: skip
# Working memory without and with a graph. Counted at 512x512: MAD 3450 and 18391, PieAPP 2986 and 8143, ST-LPIPS 895
# and 2017, URanker 659 and 4036, CW-SSIM 493 and 736, MUSIQ 471 and 2033, eleven others less. For all others stands a
# VGG-16 that keeps every layer of both images, which is what DISTS takes.
_BYTES_PER_PIXEL = {"mad": (3600, 18500), "pieapp": (3072, 8192)}
_OTHER_BYTES_PER_PIXEL = (2560, 4096)
# Modules that pyiqa imports but does not require, and what to install for them.
_MISSING_REQUIREMENTS = {"icecream": "icecream", "pkg_resources": "'setuptools<81'"}


class PyIQAFacts(NamedTuple):
    """Mode and direction of a metric, and the range that pyiqa states, in the metric's own direction.

    Most ranges are habits of the training labels, not limits of the network; None = open. `half` is the distance from
    the other end that is mapped to 1/2 where one end is open.
    """

    needs_references: bool
    higher_is_better: bool
    low: float | None
    high: float | None
    half: float

    @property
    def usual(self) -> tuple[float, float] | None:
        """Usual range of the reward, that is after the sign; an open end lies two `half` away; None = not stated."""
        if self.low is None and self.high is None:
            return None
        low = self.low if self.low is not None else (self.high or 0.0) - 2 * self.half
        high = self.high if self.high is not None else low + 2 * self.half
        return (low, high) if self.higher_is_better else (0.0 - high, 0.0 - low)  # no -0.0

    def normalized(self, values: Tensor) -> Tensor:
        """Values on [0, 1], 1 = best: linear in [low, high], constant beyond, d / (d + half) where one end is open."""
        if self.low is not None and self.high is not None:
            unit = clamp((values - self.low) / (self.high - self.low), 0, 1)
        elif self.low is not None:
            distance = (values - self.low).clamp(min=0)
            unit = distance / (distance + self.half)
        else:
            assert self.high is not None
            unit = self.half / ((self.high - values).clamp(min=0) + self.half)
        return unit if self.higher_is_better else 1 - unit


@cache
def pyiqa_configs() -> dict[str, dict[str, Any]]:
    """The configurations of the installed pyiqa by the names of its metrics.

    Raises:
        ImportError: pyiqa is not installed.
    """
    name, spec = "pyiqa.default_model_configs", None
    package = importlib.util.find_spec("pyiqa")
    if package is not None and package.submodule_search_locations:
        # the file alone, in a millisecond: pyiqa as a whole takes seconds to import
        file = Path(package.submodule_search_locations[0]) / "default_model_configs.py"
        spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        return require(name, extra="pyiqa", purpose="PyIQAReward").DEFAULT_CONFIGS
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.DEFAULT_CONFIGS)


def pyiqa_facts(metric: str) -> PyIQAFacts:
    """What pyiqa says of a metric of it.

    Raises:
        ImportError: pyiqa is not installed.
        ValueError: an unknown metric, or one that scores no single images.
    """
    if metric in REFUSED:
        raise ValueError(f"PyIQAReward cannot score images with {metric!r}: {REFUSED[metric]}.")
    configs = pyiqa_configs()
    if metric not in configs:
        near = difflib.get_close_matches(metric, configs, n=3)
        hint = f"near names: {', '.join(near)}" if near else f"known names: {', '.join(configs)}"
        raise ValueError(f"PyIQAReward expected the name of a metric of pyiqa, got {metric!r}; {hint}.")
    config = configs[metric]
    mode = config["metric_mode"]
    if mode not in ("FR", "NR"):
        raise ValueError(f"PyIQAReward expected a metric of mode FR or NR, got {metric!r} of mode {mode!r}.")
    low, high = _RANGE.get(metric) or _stated_range(config.get("score_range", ""))
    return PyIQAFacts(mode == "FR", not config.get("lower_better"), low, high, _HALF.get(metric, 1.0))


def pyiqa_bounds(metric: str) -> Bounds:
    """What a raw score cannot leave, after the sign."""
    low, high = _HARD_RANGE.get(metric, (None, None))
    if pyiqa_facts(metric).higher_is_better:
        return (low, high)
    return (None if high is None else 0.0 - high, None if low is None else 0.0 - low)


@final
class PyIQAReward(ImageReward):
    """A metric of pyiqa as a reward: higher is better, and each score is independent of the batch.

    Mode, direction and range are those of the installed pyiqa's configuration; version 0.1.16 is tested.

    pyiqa's code and weights are under PolyForm Noncommercial 1.0.0 and similar terms: not for commercial use. The
    first use in a process logs this as a warning (through `logging`, because no change to the caller's code would
    avoid it).

    pyiqa unpickles its downloads, which can run code, and checks no hash: use `weights` with a file that you trust,
    which is refused unless it holds tensors only. The qrealign metrics change transformers for the whole process.

    Args:
        metric: pyiqa's name, e.g. `"musiq"`, `"topiq_nr"`, `"clipiqa+"`. Metrics of image sets are refused.
        normalize: map scores to [0, 1], 1 = best: linear over the range that pyiqa states, and constant beyond it; for
            a metric without a limit on one side, d / (d + half), d the distance from the limit that it has.
        differentiable: keep the graph from scores to pixels. An image whose gradient is not finite gets a zero one.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU.
        batch_size: images per run of the network; None = as many as fit the budget of memory.
        weights: file with the metric's own weights, for metrics that can read one (pyiqa's `pretrained_model_path`).
            Backbones may still be downloaded.
        **options: Options that the metric has in pyiqa, e.g. `test_y_channel=False` for ssim.

    Raises:
        ValueError: unknown or refused metric, an option that is not a metric's, no range to normalize by, or no
            gradient to be had.
        ImportError: pyiqa is not installed, or a package that a metric needs is not (at the first use).
        OSError: weights cannot be downloaded (at the first use).

    Example:
        >>> reward = PyIQAReward("musiq", normalize=True)  # nothing is loaded yet
        >>> reward.name, reward.needs_references, reward.bounds
        ('pyiqa:musiq(normalize=true)', False, (0.0, 1.0))
    """

    def __init__(
        self,
        metric: str,
        *,
        normalize: bool = False,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        weights: str | Path | None = None,
        **options: Any,
    ) -> None:
        facts = pyiqa_facts(metric)
        if normalize and facts.usual is None:
            raise ValueError(
                f"PyIQAReward({metric!r}) expected normalize=False, because pyiqa states no range of it. "
                "Wrap the reward in Calibrated."
            )
        if differentiable and metric in NO_GRADIENT:
            raise ValueError(
                f"PyIQAReward({metric!r}) expected differentiable=False, got True: {NO_GRADIENT[metric]}. "
                "Use it with a policy gradient, which needs no gradient of the reward."
            )
        if metric in NEEDS_CUDA and device is not None and torch.device(device).type != "cuda":
            raise ValueError(f"PyIQAReward({metric!r}) runs on CUDA only (fixed in pyiqa), got device={str(device)!r}.")
        if reserved := _RESERVED & options.keys():
            raise ValueError(
                f"PyIQAReward expected options of the metric, got {sorted(reserved)}, which it sets itself. "
                "Gradients: differentiable=True. Weights: weights='<file>'."
            )
        self.metric = metric
        self.name = name_with(self, f"pyiqa:{metric}", normalize=normalize, weights=weights, **options)
        self.normalize = normalize
        self.needs_references = facts.needs_references
        self.differentiable = differentiable
        self.batch_size = 1 if metric in _ONE_IMAGE_PER_CALL else batch_size
        self.bounds: Bounds = (0.0, 1.0) if normalize else pyiqa_bounds(metric)
        self.bytes_per_pixel = _BYTES_PER_PIXEL.get(metric, _OTHER_BYTES_PER_PIXEL)[differentiable]
        self.min_side = MIN_SIDE.get(metric, 1)
        self.model_loader = LazyModel(partial(_build, metric, weights, options), device, name=self.name)
        self._facts = facts
        self._reported: set[str] = set()

    @property
    def model(self) -> nn.Module:
        """pyiqa's metric object; loads it if need be."""
        return self._loader.get()

    def score_batch(self, images: Tensor, references: Tensor | None = None) -> Tensor:
        """Pyiqa's value of each image, higher is better."""
        images = drop_broken_gradients(images)  # FSIM has no derivative at a constant image
        batch = [images] if references is None else [images, references]
        multiple = _PAD_TO_MULTIPLE.get(self.metric, 1)
        padding = (0, -images.shape[3] % multiple, 0, -images.shape[2] % multiple)
        if any(padding):
            batch = [nn.functional.pad(tensor, padding, mode="replicate") for tensor in batch]
        with plain_defaults(self.name), self._loader.lock:  # metrics keep state between layers
            values = self._measure(self._loader.ready(images), *batch)
        signed = values if self._facts.higher_is_better else torch.neg(values)
        scores = self._facts.normalized(values) if self.normalize else signed
        if self.metric in _FLAT_REFERENCE_UNDEFINED:
            undefined = (batch[1].amax((2, 3)) == batch[1].amin((2, 3))).all(1)
            undefined |= values > _CEILING.get(self.metric, torch.inf)
            identical = (batch[0] == batch[1]).flatten(1).all(1)
            scores = torch.where(identical, 1.0, torch.where(undefined, torch.nan, scores))
        return scores

    def _measure(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """The metric's values; where it fails on an image but not on an ordinary one, NaN for that image alone."""
        count = batch[0].shape[0]
        try:
            values = _per_image(self.name, _network_of(model)(*batch), count)
        except torch.OutOfMemoryError:
            raise
        except _IMAGE_ERRORS as error:
            if self.metric not in _NEEDS_FACE and not self._works(model, *batch):
                raise
            if count == 1:
                self._report(error, batch[0])
                return batch[0].new_full((1,), torch.nan)
        else:
            if batch[0].requires_grad and not values.requires_grad:
                raise ValueError(
                    f"PyIQAReward({self.metric!r}) expected differentiable=False, because pyiqa cuts the graph inside."
                )
            return values
        rows = zip(*(tensor.split(1) for tensor in batch), strict=True)
        return torch.cat([self._measure(model, *row) for row in rows])

    def _works(self, model: nn.Module, *batch: Tensor) -> bool:
        """Whether the metric scores an ordinary image, so that a failure is the image's own."""
        side, rng = _PROBE_SIDE, torch.Generator(device="cpu").manual_seed(0)
        coarse = torch.rand(1, 3, side // 8, side // 8, generator=rng, dtype=torch.float32, device="cpu")
        noise = torch.rand(1, 3, side, side, generator=rng, dtype=torch.float32, device="cpu")
        image = (0.8 * nn.functional.interpolate(coarse, size=(side, side)) + 0.2 * noise).to(batch[0].device)
        try:
            with torch.no_grad():
                return bool(_per_image(self.name, _network_of(model)(*[image] * len(batch)), 1).isfinite())
        except _IMAGE_ERRORS:
            return False

    def _report(self, error: Exception, image: Tensor) -> None:
        if type(error).__name__ not in self._reported:
            self._reported.add(type(error).__name__)
            _LOGGER.warning(
                "%s could not score an image of %d x %d pixels and answers NaN: %s: %s (further ones are not logged)",
                self.name, *image.shape[2:], type(error).__name__, error,
            )  # fmt: skip


def _stated_range(text: str) -> tuple[float | None, float | None]:
    """The ends of a range such as "~0, ~100"; None for an end that is open or not stated."""
    ends: list[float | None] = []
    for end in text.split(","):
        try:
            ends.append(float(end.strip(" ~")))
        except ValueError:
            ends.append(None)
    return (ends[0], ends[1]) if len(ends) == 2 else (None, None)


def _per_image(name: str, output: Any, count: int) -> Tensor:
    """`[count]` float32 from (B,), (B, 1), (B, 1, 1, 1), a 0-d tensor, a float, or a tuple that starts with one."""
    first = output[0] if isinstance(output, tuple | list) else output
    values = torch.as_tensor(first)
    if values.numel() != count:
        raise RuntimeError(
            f"{name} expected one number per image from pyiqa ({count}), got shape {list(values.shape)}."
        )
    return values.reshape(count).float()


def _network_of(metric: nn.Module) -> nn.Module:
    """The network inside pyiqa's metric object.

    Called directly, because the object around it raises for the whole batch if one pixel is out of range or the dtype
    is a half, changes cudnn flags of the process while it runs, and fails where `fp32_precision` is set.
    """
    network = metric.net
    if not isinstance(network, nn.Module):
        raise RuntimeError(f"expected pyiqa's metric to hold a network as `.net`, got {type(network).__name__}.")
    return network


def _build(metric: str, weights: str | Path | None, options: Mapping[str, Any], device: torch.device) -> nn.Module:
    """pyiqa's metric object on `device`, or an error that says in plain words why it cannot be built."""
    who = f"PyIQAReward({metric!r})"
    if metric in NEEDS_CUDA and device.type != "cuda":
        raise ValueError(f"{who} runs on CUDA only (fixed in pyiqa), got device={str(device)!r}. Move the images.")
    content: Any = None
    if weights is not None:
        if Path(weights).suffix != ".mat":  # pyiqa would execute what a pickle holds; MATLAB files hold arrays only
            content, _ = decode(Path(weights))
        options = {**options, "pretrained_model_path": str(weights)}
    with plain_defaults(f"pyiqa:{metric}"):
        pyiqa = require("pyiqa", extra="pyiqa", purpose=who)
        _say_licence()
        try:
            built = pyiqa.create_metric(metric, device=device, as_loss=False, check_input_range=False, **options)
        except ModuleNotFoundError as error:
            missing = error.name or "a module"
            package = _MISSING_REQUIREMENTS.get(missing, missing)
            raise ImportError(
                f"{who} needs `{missing}`, which pyiqa imports without requiring it. Run: pip install {package}"
            ) from error
        except OSError as error:
            raise OSError(_missing_weights(who, error)) from error
        except Exception as error:  # pyiqa raises anything for a file of another layout
            if isinstance(error, TypeError) and "keyword argument" in str(error):
                registry = require("pyiqa.utils.registry", extra="pyiqa", purpose=who).ARCH_REGISTRY
                known = inspect.signature(registry.get(pyiqa_configs()[metric]["metric_opts"]["type"])).parameters
                raise ValueError(
                    f"{who} was given an option that this metric does not have: {error}. It has "
                    f"{', '.join(sorted(known.keys() - _RESERVED))}; every metric has normalize, "
                    "differentiable, device, batch_size and weights."
                ) from error
            if weights is None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"{who} expected {weights} laid out as pyiqa's own file of this metric: {type(error).__name__}: {error}"
            ) from error
    facts = pyiqa_facts(metric)
    if (built.metric_mode == "FR", not built.lower_better) != (facts.needs_references, facts.higher_is_better):
        raise RuntimeError(
            f"{who} expected what pyiqa's configuration says, got mode {built.metric_mode} and "
            f"lower_better={built.lower_better}. Install pyiqa==0.1.16."
        )
    if weights is not None:
        if "pretrained_model_path" not in inspect.signature(type(built.net)).parameters:
            raise ValueError(f"{who} cannot read `weights`: pyiqa has no file option for this metric.")
        _check_weights(Path(weights), content, _network_of(built))
    return built


def _check_weights(file: Path, content: Any, network: nn.Module) -> None:
    """Refuse quantised weights, which pyiqa would take for numbers, those that are not finite, and layers left out."""
    stored = dict(_tensors(content))
    taken = {
        name: value for name, value in network.state_dict().items() if name in stored and value.is_floating_point()
    }
    for name in taken:
        if stored[name].dtype not in FLOATS:
            raise ValueError(f"{file} has {name} as {stored[name].dtype}, expected floating-point numbers.")
    check_values(file, taken, may_be_zero=True)  # some metrics have layers that were never trained
    _check_complete(file, stored.keys(), network)


def _check_complete(file: Path, stored: Collection[str], network: nn.Module) -> None:
    """Refuse a file that holds a layer or a series of layers in part.

    A published file may leave a part of the network, such as its backbone, to another file. So a parameter may be
    missing, unless the file has parameters of the same layer, or of one whose name differs in numbers only:
    `lin3.weight` is missed where there is `lin0.weight`. Of buffers only a normalisation's statistics are missed; the
    others are constants, which pyiqa sets itself.
    """
    names: defaultdict[Tensor, set[str]] = defaultdict(set)  # some networks have two names for a parameter
    for name, value in chain(network.named_parameters(remove_duplicate=False), network.named_buffers()):
        if isinstance(value, nn.Parameter) or name.endswith((".running_mean", ".running_var")):
            names[value].add(name)
    given = {_series(name) for aliases in names.values() if not aliases.isdisjoint(stored) for name in aliases}
    absent = [aliases for aliases in names.values() if aliases.isdisjoint(stored)]
    if missing := [min(aliases) for aliases in absent if not given.isdisjoint(map(_series, aliases))]:
        raise ValueError(f"{file} lacks {listed(missing)}, although it holds others of the same layers.")


def _series(name: str) -> str:
    """The layer of a parameter, with its numbers left out."""
    return re.sub(r"\d+", "#", name.rpartition(".")[0])


def _tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file by name, whatever dictionaries they are wrapped in."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Tensor):
            yield str(key).removeprefix("module."), value
        else:
            yield from _tensors(value)


def _missing_weights(who: str, error: OSError) -> str:
    hub = torch.hub.get_dir()
    return (
        f"{who} needs weights that are not in the caches and could not be downloaded. Build it once on a machine with "
        f"a network and copy its caches here: {hub}/pyiqa, {hub}/checkpoints and the Hugging Face cache (HF_HOME); or "
        f"pass weights='<file>' if the metric reads one. The reason: {error}"
    )


@cache  # once per process
def _say_licence() -> None:
    _LOGGER.warning(
        "pyiqa is licensed under PolyForm Noncommercial 1.0.0 and parts under other non-commercial terms: "
        "its scores must not be used commercially."
    )
