"""Run a model's vision tower without waiting for the device, and without a small call for every window."""

from functools import lru_cache
from typing import Any, final

import torch
from torch import Tensor

from iqareward.rewards.mllm.vlm.patches import ImageInputs
from iqareward.rewards.mllm.vlm.windows import Windows, run_tower, windows_of

_CACHED_SHAPES = 32  # of images and batches


@final
class VisionTower:
    """From inputs of equal size to image features, as the model takes them.

    Args:
        model: native image-text-to-text model of transformers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._windows = lru_cache(_CACHED_SHAPES)(self._make_windows)
        self._layout = lru_cache(_CACHED_SHAPES)(self._make_layout)

    def __call__(self, inputs: ImageInputs, batch: int) -> Any:
        """Features of `batch` images: a model output whose `pooler_output` goes in place of the image tokens."""
        pixels = inputs.keywords["pixel_values"].to(self.model.dtype)
        if inputs.grid is None:
            return self.model.get_image_features(**inputs.keywords | {"pixel_values": pixels}, return_dict=True)
        tower = self.model.model.visual
        if hasattr(tower, "window_size"):  # Qwen2.5-VL
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            tokens = run_tower(tower, pixels, batch, self._windows(*inputs.grid))
            # as the library's own tower, one tensor for each image
            return BaseModelOutputWithPooling(pooler_output=tokens.unbind(0))  # pyright: ignore[reportArgumentType]
        layout = self._layout(*inputs.grid, batch)
        shapes = inputs.keywords["image_grid_thw"]
        return self.model.get_image_features(pixels, shapes, **layout, return_dict=True)

    def _make_windows(self, rows: int, columns: int) -> Windows:
        tower = self.model.model.visual
        merge = tower.spatial_merge_size
        return windows_of(tower, rows * merge, columns * merge, self.model.device)

    def _make_layout(self, rows: int, columns: int, batch: int) -> dict[str, Tensor]:
        """What Qwen3's tower would otherwise work out at every call, waiting for the device in each layer."""
        from transformers import vision_utils

        tower, device = self.model.model.visual, self.model.device
        merge = tower.spatial_merge_size
        shapes = torch.tensor([[1, rows * merge, columns * merge]] * batch)
        # Lengths are read as numbers, so they stay on the host, except by flash attention's kernels.
        flash = "flash" in (tower.config._attn_implementation or "")
        ends = vision_utils.get_vision_cu_seqlens(shapes).to(device if flash else "cpu")
        taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            shapes,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
        )
        return {
            "position_ids": vision_utils.get_vision_position_ids(shapes, merge).to(device),
            "cu_seqlens": ends,
            "interp_indices": taps.to(device),
            "interp_weights": weights.to(device),
        }
