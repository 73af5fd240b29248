"""Build a pyiqa metric, or say in plain words why it cannot be built."""

import difflib
import importlib.util
import inspect
import logging
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iqareward.optional import require
from iqareward.rewards.pyiqa_facts import METRICS, MISSING_REQUIREMENTS, NEEDS_CUDA, NO_GRADIENT, REFUSED
from iqareward.weight_files import FLOATS, check_values, decode, listed

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
        ValueError: the metric takes no `weights`, or the file is damaged, holds code, or does not fit.
        RuntimeError: the installed pyiqa contradicts what is known of the metric.
    """
    who = f"PyIQAReward({metric!r})"
    if metric in NEEDS_CUDA and device.type != "cuda":
        raise ValueError(f"{who} runs on CUDA only (fixed in pyiqa), got device={str(device)!r}. Move the images.")
    pyiqa = require("pyiqa", extra="pyiqa", purpose=who)
    _say_licence()
    content: Any = None
    if weights is not None:
        if Path(weights).suffix != ".mat":  # pyiqa would execute what a pickle holds; MATLAB files hold arrays only
            content, _ = decode(Path(weights))
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
    except Exception as error:  # pyiqa raises anything for a file of another layout
        if isinstance(error, TypeError) and "keyword argument" in str(error):
            raise ValueError(f"{who} was given an option that this metric does not have: {error}.") from error
        if weights is None or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{who} expected {weights} laid out as pyiqa's own file of this metric: {type(error).__name__}: {error}"
        ) from error
    _check_built(who, metric, built, weights)
    if weights is not None:
        _check_weights(Path(weights), content, network_of(built))
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
