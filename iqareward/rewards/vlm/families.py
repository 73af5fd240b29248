"""Which vision-language models are supported, and how each one's pixels are made, read from its own processor."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from iqareward.rewards.vlm.patches import ImageInputs, PatchGrid
from iqareward.rewards.vlm.tiles import FittedTiles, StretchedTiles

_BICUBIC = 3  # Pillow's number


class Family(NamedTuple):
    """What differs between model families.

    Attributes:
        images: from clean images `[B, 3, H, W]` to the vision tower's inputs; None for a shape that it does not take.
        around: token ids before and after the image's tokens that the chat template leaves to the processor.
    """

    images: Callable[[Tensor], ImageInputs | None]
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


def family_of(model: Any, processor: Any) -> Family:
    """How images become inputs of this model.

    Args:
        model: a native image-text-to-text model of transformers.
        processor: its processor; sizes, limits and colour statistics are taken from it.

    Raises:
        ValueError: the model's family is not supported, or its processor resizes in another way.
    """
    check_family(model.config.model_type)
    source = processor.image_processor
    if int(source.resample) != _BICUBIC:
        raise ValueError(f"expected an image processor with bicubic resampling (3), got {source.resample}.")
    return _FAMILIES[model.config.model_type](processor, source)


def check_family(model_type: str) -> None:
    """Refuse a model of another family.

    Raises:
        ValueError: `model_type` is not supported.
    """
    if model_type not in _FAMILIES:
        raise ValueError(
            f"expected a model of a supported family ({', '.join(_FAMILIES)}), got {model_type!r}. "
            "Serve it with vLLM or SGLang and use ServedVLMReward."
        )


def _patch_grid(processor: Any, source: Any) -> Family:
    images = PatchGrid(
        patch_size=source.patch_size,
        merge_size=source.merge_size,
        temporal_size=source.temporal_patch_size,
        min_pixels=source.size["shortest_edge"],
        max_pixels=source.size["longest_edge"],
        **_colours(source),
    )
    return Family(images)


def _fitted_tiles(processor: Any, source: Any) -> Family:
    canvases = tuple((height, width) for height, width in source.image_grid_pinpoints)
    return Family(FittedTiles(_tile(source), canvases, **_colours(source)))


def _stretched_tiles(processor: Any, source: Any) -> Family:
    images = StretchedTiles(_tile(source), source.min_patches, source.max_patches, **_colours(source))
    return Family(images, ((processor.start_image_token_id,), (processor.end_image_token_id,)))


def _colours(source: Any) -> dict[str, tuple[float, ...]]:
    return {"mean": tuple(source.image_mean), "std": tuple(source.image_std)}


def _tile(source: Any) -> tuple[int, int]:
    return source.size["height"], source.size["width"]


# by `model_type` of the configuration
_FAMILIES: dict[str, Callable[[Any, Any], Family]] = {
    "qwen2_5_vl": _patch_grid,
    "qwen3_vl": _patch_grid,
    "qwen3_5": _patch_grid,
    "llava_onevision": _fitted_tiles,
    "internvl": _stretched_tiles,
}
