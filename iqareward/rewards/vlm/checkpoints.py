"""Load a vision-language model and its processor with the native classes of transformers, never with remote code."""

import os
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from iqareward.optional import require
from iqareward.rewards.vlm.inputs import check_family
from iqareward.rewards.vlm.presets import HPSV3_PIXELS, HPSV3_TOKEN
from iqareward.weight_files import (
    FLOATS,
    Shape,
    WeightFile,
    check_values,
    checkpoint_folder,
    listed,
    open_weights,
    read_json,
)

# Found by running the tests under older versions. In 5.6 the recurrent layers of Qwen3.5 forget their state when
# several tokens follow what is cached, so that digits are misread; 5.3 lacks arguments and image processors besides.
_OLDEST = "transformers>=5.7"
_PROCESSOR_FILES = ("*.txt", "*.jinja", "*.model")

# Beginnings of names in HPSv3's file and in transformers; those of its release, then those since 4.52.
_HPSV3_NAMES = {
    "model.visual.": "visual.",
    "visual.": "visual.",
    "model.language_model.": "language_model.",
    "model.": "language_model.",
    "rm_head.": "rm_head.",
}
_HPSV3_UNUSED = {"lm_head.weight"}  # Qwen2-VL's own head, which writes text


def require_transformers(name: str) -> ModuleType:
    """The library, recent enough; an ImportError says what to install."""
    transformers = require("transformers", extra="vlm", purpose=name)
    from transformers.utils.versions import require_version

    require_version(_OLDEST, f'{name} needs it. Run: pip install --upgrade "iqareward[vlm]"')
    return transformers


def load_model(
    name: str, source: str | Path, *, device: torch.device, dtype: torch.dtype, checkpointing: bool
) -> tuple[Any, Any]:
    """A frozen model in eval mode, and its processor.

    Args:
        name: The reward's name, for error messages.
        source: A folder as `save_pretrained` writes it, or a hub id `owner/name`, or `owner/name/folder`,
            perhaps with a revision behind an "@".
        device: Where the weights go.
        dtype: The dtype of the weights.
        checkpointing: Whether to recompute layers in the backward pass instead of keeping their activations.

    Raises:
        ImportError: transformers is not installed, or too old.
        OSError: a file is missing, or cannot be downloaded.
        ValueError: the model's family is not supported, a file is damaged, or the weights are not those of the model
            that config.json describes.
    """
    transformers = require_transformers(name)
    folder = _folder(source)
    config = read_json(folder / "config.json")
    check_family(str(config.get("model_type")))
    owners = _check_stored(folder, config)
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, device_map=str(device), output_loading_info=True, trust_remote_code=False
        )
    except (ImportError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises anything for files that contradict each other
        raise ValueError(f"{name} cannot load {folder}: {type(error).__name__}: {error}") from error
    lost = {*report["missing_keys"], *map(str, report["mismatched_keys"])}
    if lost:  # transformers would draw them at random
        raise ValueError(f"{folder} lacks weights of its model: {listed(lost)}.")
    unused = report["unexpected_keys"]
    adapters = [key for key in unused if "lora_" in key]
    if adapters:  # without them these are the weights before fine-tuning
        raise ValueError(f"{folder} holds an adapter that is not merged: {listed(adapters)}. Merge it with peft first.")
    if unused:  # such as the value head of an RL trainer, which plays no part in a score
        warnings.warn(f"{name} leaves out weights of {folder} that its model has not: {listed(unused)}.", stacklevel=2)
    model.requires_grad_(False).eval()
    found: dict[Path, dict[str, Tensor]] = {}
    for key, value in model.named_parameters():
        if value.dtype in FLOATS:
            found.setdefault(owners.get(key, folder), {})[key] = value
    for path, tensors in found.items():
        check_values(path, tensors)
    fuse_norms(model)
    if checkpointing:
        _recompute_layers(model)
    return model, processor


def load_hpsv3(
    name: str,
    weights: str | Path,
    base: str | Path | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    checkpointing: bool,
) -> tuple[Any, Any, nn.Module]:
    """HPSv3's frozen Qwen2-VL without its language-modelling head, its processor, and its head in float32.

    Args:
        name: The reward's name, for error messages.
        weights: The published file, or one in its layout; or a folder or hub id that holds it.
        base: Folder or hub id of the configuration and the processor; None = those beside the weights.
        device: Where the weights go.
        dtype: The dtype of the weights except the head's.
        checkpointing: Whether to recompute layers in the backward pass instead of keeping their activations.

    Raises:
        ImportError: transformers is not installed, or too old.
        OSError: a file is missing, or cannot be downloaded.
        ValueError: `base` is no Qwen2-VL, or the weights are not those of HPSv3 on it.
    """
    transformers = require_transformers(name)
    is_file = os.path.isfile(weights)
    folder = Path(weights).parent if is_file else checkpoint_folder(weights, also=_PROCESSOR_FILES)
    files = [WeightFile(weights)] if is_file else open_weights(folder)
    if base is not None:
        folder = checkpoint_folder(base, only=("*.json", *_PROCESSOR_FILES))
    owners, shapes, tensors = dict[str, WeightFile](), dict[str, Shape](), dict[str, Tensor]()
    for file in files:
        for key, (shape, _) in file.headers().items():
            start = next((start for start in _HPSV3_NAMES if key.startswith(start)), None)
            if start is None and key not in _HPSV3_UNUSED:
                raise ValueError(f"{file.path} holds {key}, which HPSv3 has not.")
            if start is not None:
                ours = _HPSV3_NAMES[start] + key.removeprefix(start)
                owners[ours], shapes[ours], tensors[ours] = file, shape, file.tensor(key, shape)
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "qwen2_vl":
        raise ValueError(f"{name} expected {folder} to hold the configuration of a qwen2_vl model, got {kind!r}.")
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, OSError):
        raise
    except Exception as error:  # transformers raises anything for files that contradict each other
        raise ValueError(f"{name} cannot read {folder}: {type(error).__name__}: {error}") from error
    processor.tokenizer.add_tokens([HPSV3_TOKEN], special_tokens=True)
    processor.image_processor.size = {"shortest_edge": HPSV3_PIXELS, "longest_edge": HPSV3_PIXELS}
    config.text_config.vocab_size = len(processor.tokenizer)  # as the authors resize the embedding
    head = _hpsv3_head(config.text_config.hidden_size)
    with torch.device("meta"):
        expected = {key: value.shape for key, value in transformers.Qwen2VLModel(config).state_dict().items()}
    expected |= {f"rm_head.{key}": value.shape for key, value in head.state_dict().items()}
    if shapes.keys() != expected.keys():
        raise ValueError(
            f"{weights} does not hold the weights of HPSv3 on {folder}: lacking "
            f"{listed(expected.keys() - shapes.keys()) or 'none'}, beyond them "
            f"{listed(shapes.keys() - expected.keys()) or 'none'}."
        )
    for key, shape in expected.items():
        if tuple(shapes[key]) != tuple(shape):
            raise ValueError(f"{owners[key].path} has {key} of shape {list(shapes[key])}, expected {list(shape)}.")
    head.load_state_dict({key: tensors.pop(f"rm_head.{key}") for key in head.state_dict()})
    # tensors are mapped into memory: they are read when they move to the device
    model = transformers.Qwen2VLModel.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype).to(device)
    model.requires_grad_(False).eval()
    check_values(Path(weights), dict(model.named_parameters()) | dict(head.to(device).named_parameters()))
    fuse_norms(model)
    if checkpointing:
        _recompute_layers(model)
    return model, processor, head


def _hpsv3_head(values: int) -> nn.Module:
    """From the last layer at the reward token to the mean and the logarithm of the deviation."""
    # The published head drops out at index 2 while it is trained, which is why the second layer has index 3.
    return nn.Sequential(
        nn.Linear(values, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def _folder(source: str | Path) -> Path:
    """Folders stay whole, hub ids may end in a folder of the repository."""
    if isinstance(source, Path) or os.path.isdir(source):
        return checkpoint_folder(source)
    where, at, revision = source.partition("@")
    repository, inner = "/".join(where.split("/")[:2]), "/".join(where.split("/")[2:])
    return checkpoint_folder(f"{repository}{at}{revision}", inner=inner, also=_PROCESSOR_FILES)


def _check_stored(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """The file of each tensor; quantised weights are refused, and sizes that the weights cannot have.

    Building a network of such sizes could take minutes.
    """
    path, owners, headers = folder / "config.json", dict[str, Path](), dict[str, tuple[Shape, torch.dtype]]()
    for file in open_weights(folder):
        headers |= file.headers()
        owners |= dict.fromkeys(file.keys(), file.path)
        for key, (_, dtype) in file.headers().items():
            if dtype not in FLOATS and key.endswith((".weight", ".bias")) and "quantization_config" not in config:
                raise ValueError(f"{file.path} has {key} as {dtype}, but {path} says nothing of a quantisation.")
    largest = max((side for shape, _ in headers.values() for side in shape), default=0)
    most = {"hidden_size": largest, "intermediate_size": largest, "num_hidden_layers": len(headers)}
    sections = {"": config} | {f"{key}.": value for key, value in config.items() if isinstance(value, dict)}
    for where, section in sections.items():
        bounds = most | {"vocab_size": largest} if where in ("", "text_config.") else most | {"depth": len(headers)}
        for key in bounds.keys() & section.keys():
            value = section[key]
            if value is not None and (type(value) is not int or not 0 < value <= bounds[key]):
                raise ValueError(
                    f"{path} says {where}{key} = {value!r:.100}; its weights have room for 1 to {bounds[key]}."
                )
    return owners


def fuse_norms(model: Any) -> None:
    """Put torch's RMS norm, one kernel on a GPU, in place of the library's six."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and _is_plain_norm(type(child)):
                fused = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon, device="meta")
                fused.weight = child.weight
                setattr(parent, name, fused)


@cache
def _is_plain_norm(kind: type[Any]) -> bool:
    """Whether a class computes what torch does, seen from its numbers: some add 1 to their weights."""
    norm = kind(8)
    if not hasattr(norm, "variance_epsilon"):
        return False
    inputs, norm.weight.data = torch.linspace(-1, 2, 8), torch.linspace(0.5, 3, 8)
    expected = torch.nn.functional.rms_norm(inputs, (8,), norm.weight, norm.variance_epsilon)
    return torch.allclose(norm(inputs), expected)


def _recompute_layers(model: Any) -> None:
    """Activation checkpointing for a model that stays in eval mode.

    transformers checkpoints a layer only while it is in training mode. Only the layers themselves are put there: what
    could drop out is inside them and stays in eval mode.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # formerly
    enable({"use_reentrant": False, "preserve_rng_state": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
