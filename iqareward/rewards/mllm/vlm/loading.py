"""Load a vision-language model and its processor with the native classes of transformers, never with remote code."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from iqareward.optional import require
from iqareward.rewards.mllm.vlm.families import check_family
from iqareward.rewards.mllm.vlm.network import Network

# the version that this was tested with; earlier ones do not all take image features ready-made
_OLDEST = "transformers>=5.23"
_SHOWN = 5  # names in an error message


def require_transformers(name: str) -> ModuleType:
    """The library, recent enough.

    Raises:
        ImportError: it is not installed, or too old.
    """
    transformers = require("transformers", extra="vlm", purpose=name)
    from transformers.utils.versions import require_version

    require_version(_OLDEST, f'{name} needs it. Run: pip install --upgrade "iqareward[vlm]"')
    return transformers


def load_network(
    name: str, source: str | Path, *, device: torch.device, dtype: torch.dtype, checkpointing: bool
) -> Network:
    """A frozen model in eval mode with its processor.

    Args:
        name: of the reward, for error messages.
        source: a folder as `save_pretrained` writes it, or a hub id `owner/name`, or `owner/name/folder`.
        device: where the weights go.
        dtype: their dtype.
        checkpointing: recompute layers in the backward pass instead of keeping their activations.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the model's family is not supported, or the checkpoint lacks weights.
    """
    transformers = require_transformers(name)
    where, options = _where(source)
    check_family(transformers.AutoConfig.from_pretrained(where, **options).model_type)
    processor = transformers.AutoProcessor.from_pretrained(where, **options)
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        where, dtype=dtype, device_map=str(device), output_loading_info=True, **options
    )
    lost = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if lost:  # transformers would draw them at random
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        raise ValueError(f"{source} lacks weights of its model: {', '.join(lost[:_SHOWN])}{more}.")
    model.requires_grad_(False).eval()
    if checkpointing:
        _recompute_layers(model)
    return Network(model, processor)


def _where(source: str | Path) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` takes: folders stay whole, hub ids may end in a folder of the repository."""
    options: dict[str, Any] = {"trust_remote_code": False}
    if Path(source).is_dir():
        return str(source), options
    parts = str(source).split("/")
    if isinstance(source, Path) or len(parts) < 2 or not all(parts):
        raise ValueError(f"expected a folder or a hub id like 'owner/name', got {str(source)!r}: no such folder.")
    if len(parts) > 2:
        options["subfolder"] = "/".join(parts[2:])
    return "/".join(parts[:2]), options


def _recompute_layers(model: Any) -> None:
    """Activation checkpointing for a model that stays in eval mode.

    transformers checkpoints a layer only while it is in training mode. Only the layers themselves are put there: what
    could drop out is inside them and stays in eval mode.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
