"""Build a pyiqa metric, or say in plain words why it cannot be built."""

import difflib
import importlib.util
import inspect
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iqareward.optional import require
from iqareward.rewards.backbones import read_weights
from iqareward.rewards.pyiqa_facts import METRICS, MISSING_REQUIREMENTS, NEEDS_CUDA, NO_GRADIENT, REFUSED

_LOGGER = logging.getLogger(__name__)
_RESERVED = {"as_loss", "loss_weight", "loss_reduction", "check_input_range", "pretrained_model_path"}


def check_request(
    metric: str, differentiable: bool, device: torch.device | str | None, options: Mapping[str, Any]
) -> None:
    """Refuse what cannot work before anything is imported or loaded.

    Raises:
        ValueError: an unknown or refused metric, no gradient, no CUDA, or an option that is not the metric's.
        ImportError: pyiqa is not installed.
    """
    if metric in REFUSED:
        raise ValueError(f"PyIQAReward cannot score images with {metric!r}: {REFUSED[metric]}.")
    if metric not in METRICS:
        near = difflib.get_close_matches(metric, METRICS, n=3)
        hint = f"near names: {', '.join(near)}" if near else f"known names: {', '.join(METRICS)}"
        raise ValueError(f"PyIQAReward expected the name of a metric of pyiqa 0.1.16, got {metric!r}; {hint}.")
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
    if importlib.util.find_spec("pyiqa") is None:
        require("pyiqa", extra="pyiqa", purpose=f"PyIQAReward({metric!r})")


def build_metric(
    metric: str, weights: str | Path | None, options: Mapping[str, Any], device: torch.device
) -> nn.Module:
    """pyiqa's metric object on `device`.

    Raises:
        ImportError: a package is missing that pyiqa imports without requiring it.
        OSError: weights are neither in the cache nor to be downloaded.
        ValueError: the metric takes no `weights`, or the file holds anything but tensors.
        RuntimeError: the installed pyiqa contradicts what is known of the metric.
    """
    who = f"PyIQAReward({metric!r})"
    if metric in NEEDS_CUDA and device.type != "cuda":
        raise ValueError(f"{who} runs on CUDA only (fixed in pyiqa), got device={str(device)!r}. Move the images.")
    pyiqa = require("pyiqa", extra="pyiqa", purpose=who)
    _say_licence()
    if weights is not None:
        if Path(weights).suffix != ".mat":  # pyiqa would execute what a pickle holds; MATLAB files hold arrays only
            read_weights(weights)
        options = {**options, "pretrained_model_path": str(weights)}
    try:
        built = pyiqa.create_metric(metric, device=device, as_loss=False, check_input_range=False, **options)
    except ModuleNotFoundError as error:
        missing = error.name or "a module"
        package = MISSING_REQUIREMENTS.get(missing, missing)
        raise ImportError(
            f"{who} needs `{missing}`, which pyiqa imports without requiring it. Run: pip install {package}"
        ) from error
    except OSError as error:
        raise OSError(_missing_weights(who, error)) from error
    except TypeError as error:
        raise ValueError(f"{who} was given an option that this metric does not have: {error}.") from error
    except (KeyError, RuntimeError) as error:
        if weights is None:
            raise
        raise ValueError(f"{who} expected `weights` laid out as in pyiqa's own file of this metric: {error}") from error
    _check_built(who, metric, built, weights)
    return built


def network_of(metric: nn.Module) -> nn.Module:
    """The network inside pyiqa's metric object.

    Called directly, because the object around it raises for the whole batch if one pixel is out of range or the dtype
    is a half, changes cudnn flags of the process while it runs, and fails where `fp32_precision` is set.
    """
    network = metric.net
    if not isinstance(network, nn.Module):
        raise RuntimeError(f"expected pyiqa's metric to hold a network as `.net`, got {type(network).__name__}.")
    return network


def _check_built(who: str, metric: str, built: nn.Module, weights: str | Path | None) -> None:
    """The sign comes from our table; another version of pyiqa must not turn it around silently."""
    facts = METRICS[metric]
    if (built.metric_mode == "FR", not built.lower_better) != (facts.needs_references, facts.higher_is_better):
        raise RuntimeError(
            f"{who} expected the metric of pyiqa 0.1.16, but the installed version says mode {built.metric_mode} and "
            f"lower_better={built.lower_better}. Install pyiqa==0.1.16."
        )
    if weights is not None and "pretrained_model_path" not in inspect.signature(type(built.net)).parameters:
        raise ValueError(f"{who} cannot read `weights`: pyiqa has no file option for this metric.")


def _missing_weights(who: str, error: OSError) -> str:
    hub = torch.hub.get_dir()
    return (
        f"{who} needs weights that are not in the caches and could not be downloaded ({error}). Build it once on a "
        f"machine with a network and copy its caches here: {hub}/pyiqa, {hub}/checkpoints and the Hugging Face cache "
        "(HF_HOME); or pass weights='<file>' if the metric reads one."
    )


@cache  # once per process
def _say_licence() -> None:
    _LOGGER.warning(
        "pyiqa is licensed under PolyForm Noncommercial 1.0.0 and parts under other non-commercial terms: "
        "its scores must not be used commercially."
    )
