"""Saving a run so that it continues with the same numbers, whenever it is killed."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that train, by name, on the CPU: adapters only for a LoRA model.

    Example:
        >>> list(trained_weights(nn.Linear(1, 1, bias=False)))
        ['weight']
    """
    return {name: weight.detach().cpu().clone() for name, weight in model.named_parameters() if weight.requires_grad}


def load_trained_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights of `trained_weights` back.

    Raises:
        ValueError: the names are not those of the weights that train.
    """
    own = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if own.keys() != weights.keys():
        differing = sorted(own.keys() ^ weights.keys())
        raise ValueError(
            f"The checkpoint expected a model in which the same weights train, got a difference in {len(differing)} "
            f"names, e.g. {differing[0]!r}. Build the policy as in the run that saved it."
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them; `path` holds the old or the new file, never a part.

    Args:
        path: the file; its folder is made.
        state: what `load_state` will return.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    with part.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def save_lines(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, null for NaN and infinity; `path` holds the old or the new file, never a part."""
    lines = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
        for record in history
    ]
    part = path.with_suffix(path.suffix + ".part")
    part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    part.replace(path)


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote; never runs code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, e.g. truncated.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}. Give the folder that a run wrote, or start anew.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} expected a checkpoint of this library, got an unreadable file: {error}") from error
