"""Run a model's vision tower on images of one size: no wait for the device, one attention call for all of them."""

import math
from functools import lru_cache, partial
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from iqareward._gradients import checkpoint_layer
from iqareward.rewards.vlm.patches import ImageInputs

_CACHED_SHAPES = 32  # of images


class Windows(NamedTuple):
    """Where the patches of one image stand in the attention windows of Qwen2.5-VL.

    Attributes:
        order: `[windows * length]` patch in each place; places that an image's border leaves empty hold patch 0.
        inverse: `[patches]` place of each patch.
        length: places of a window.
        filled: `[windows, 1, 1, length]` bool: places that hold a patch; None = all.
    """

    order: Tensor
    inverse: Tensor
    length: int
    filled: Tensor | None


class Geometry(NamedTuple):
    """What a tower of the Qwen family needs to know about images of one size.

    Attributes:
        rotation: cosines and sines `[patches, values]` of the rotary position embedding.
        taps: `[patches, 4]` learned positions to interpolate between, and their weights; None = the tower has none.
        windows: None = every layer attends to the whole image.
    """

    rotation: tuple[Tensor, Tensor]
    taps: tuple[Tensor, Tensor] | None
    windows: Windows | None


@final
class VisionTower:
    """From inputs of equal size to image tokens, in place of a model's `get_image_features`.

    The library attends image by image, and in Qwen2.5-VL window by window: at 1024 x 1024, 100 small calls for each
    image and layer.

    Args:
        model: native image-text-to-text model of transformers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._geometry = lru_cache(_CACHED_SHAPES)(partial(geometry_of, getattr(model.model, "visual", None)))

    def __call__(self, inputs: ImageInputs, batch: int) -> tuple[Tensor, ...]:
        """`[batch, tokens, values]` to put in place of the image tokens, then what deepstack layers add to them."""
        pixels = inputs.keywords["pixel_values"].to(self.model.dtype)
        if inputs.grid is not None:
            return run_tower(self.model.model.visual, pixels, batch, self._geometry(*inputs.grid))
        if "image_sizes" in inputs.keywords:
            return (self._packed(pixels, inputs.keywords["image_sizes"][0]),)
        tiles = self.model.get_image_features(pixels, return_dict=True).pooler_output
        return (tiles.unflatten(0, (batch, -1)).flatten(1, 2),)

    def _packed(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """LLaVA-OneVision's features of equal sizes; the library packs image by image and copies counts to the device.

        Args:
            pixels: `[batch, 1 + tiles, 3, H, W]`.
            size: Height and width of the images before they were fitted.
        """
        from transformers.models.llava_onevision import modeling_llava_onevision as library

        core, config = self.model.model, self.model.config
        layer = config.vision_feature_layer
        states = core.vision_tower(
            # an index lets recent versions keep that layer only
            pixels.flatten(0, 1), output_hidden_states=layer if isinstance(layer, int) else True, return_dict=True
        ).hidden_states  # fmt: skip
        found = states[layer] if isinstance(layer, int) else torch.cat([states[index] for index in layer], dim=-1)
        if config.vision_feature_select_strategy == "default":
            found = found[:, 1:]
        tiles = core.multi_modal_projector(found).unflatten(0, pixels.shape[:2])
        whole, parts = tiles[:, 0], tiles[:, 1:]
        side = config.vision_config.image_size // config.vision_config.patch_size
        grid = library.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        canvas = parts.unflatten(2, (side, side)).unflatten(1, grid).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        canvas = library.unpad_image(canvas.flatten(0, 1), size).unflatten(0, canvas.shape[:2])
        height, width = canvas.shape[2:]
        ratio = math.sqrt(height * width / (int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2))
        if ratio > 1.1:
            canvas = F.interpolate(canvas, [int(height // ratio), int(width // ratio)], mode="bilinear")
        newline = core.image_newline[:, None, None].expand(*canvas.shape[:3], 1).to(canvas.dtype)
        return torch.cat([whole, torch.cat([canvas, newline], dim=3).flatten(2).transpose(1, 2)], dim=1)


def geometry_of(tower: Any, down: int, across: int) -> Geometry:
    """Positions of an image of `down x across` tokens in a tower of the Qwen family."""
    merge, frequencies = tower.spatial_merge_size, tower.rotary_pos_emb.inv_freq
    rows, columns = down * merge, across * merge
    places = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
    places = places.reshape(2, down, merge, across, merge).transpose(2, 3).flatten(1)  # patches that merge are together
    with torch.inference_mode(False), torch.no_grad():  # kept for calls in other modes
        device = frequencies.device
        angles = torch.cat([*(places[..., None] * frequencies.float().cpu())] * 2, dim=-1)
        taps = _taps(places, (rows, columns), tower.num_grid_per_side) if hasattr(tower, "pos_embed") else None
        windows = _windows_of(tower, down, across, device) if hasattr(tower, "window_size") else None
        return Geometry(
            (angles.cos().to(device), angles.sin().to(device)),
            None if taps is None else (taps[0].to(device), taps[1].to(device)),
            windows,
        )


def _taps(places: Tensor, size: tuple[int, int], side: int) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation, corner to corner, between learned positions on a grid of `side x side`."""
    near, shares = [], []
    for place, length in zip(places, size, strict=True):
        source = place.float() * (side - 1) / max(length - 1, 1)
        low = source.floor()
        near.append(torch.stack([low, (low + 1).clamp_max(side - 1)], dim=1).long())
        shares.append(torch.stack([1 - (source - low), source - low], dim=1))
    indices = near[0][:, :, None] * side + near[1][:, None, :]
    return indices.flatten(1), (shares[0][:, :, None] * shares[1][:, None, :]).flatten(1)


def _windows_of(tower: Any, down: int, across: int, device: torch.device) -> Windows:
    unit = tower.spatial_merge_unit
    side = tower.window_size // tower.spatial_merge_size // tower.patch_size  # of a window, in tokens
    tokens = torch.arange(down * across).reshape(1, 1, down, across)
    padded = F.pad(tokens, (0, -across % side, 0, -down % side), value=-1)
    cells = F.pixel_unshuffle(padded, side).flatten(2)[0].T  # one row for each window
    places = (cells[:, :, None] * unit + torch.arange(unit)).masked_fill(cells[:, :, None] < 0, -1).flatten(1)
    filled = places >= 0
    patches = down * across * unit
    inverse = places.masked_fill(~filled, patches).flatten().argsort()[:patches]
    return Windows(
        places.flatten().clamp_min(0).to(device),
        inverse.to(device),
        places.shape[1],
        None if down % side == across % side == 0 else filled[:, None, None].to(device),
    )


def run_tower(tower: Any, patches: Tensor, batch: int, geometry: Geometry) -> tuple[Tensor, ...]:
    """What `tower(patches, grid)` gives for images of one size, with one attention call for each layer.

    A backward pass recomputes each block instead of keeping its activations.

    Args:
        tower: The vision tower of Qwen2.5-VL, Qwen3-VL or Qwen3.5.
        patches: `[batch * patches, values]` in the tower's dtype.
        batch: number of images, all of one size.
        geometry: Positions and windows for images of that size.

    Returns:
        The image tokens `[batch, tokens, hidden]`, and the same of every deepstack layer.
    """
    hidden = tower.patch_embed(patches).unflatten(0, (batch, -1))
    if geometry.taps is not None:
        indices, weights = geometry.taps
        hidden = hidden + (tower.pos_embed(indices) * weights[:, :, None]).sum(1).to(hidden.dtype)
    whole, deep = getattr(tower, "fullatt_block_indexes", ()), getattr(tower, "deepstack_visual_indexes", ())
    found: list[Tensor] = []
    for index, block in enumerate(tower.blocks):
        windows = None if index in whole else geometry.windows
        run = partial(_run_block, block=block, rotation=geometry.rotation, windows=windows)
        hidden = checkpoint_layer(run, hidden)
        if index in deep:
            found.append(tower.deepstack_merger_list[deep.index(index)](hidden.flatten(0, 1)))
    tokens = tower.merger(hidden.flatten(0, 1))
    return tuple(rows.unflatten(0, (batch, -1)) for rows in (tokens, *found))


def _run_block(hidden: Tensor, *, block: Any, rotation: tuple[Tensor, Tensor], windows: Windows | None) -> Tensor:
    hidden = hidden + _attend(block.norm1(hidden), block.attn, rotation, windows)
    return hidden + block.mlp(block.norm2(hidden))


def _attend(hidden: Tensor, attention: Any, rotation: tuple[Tensor, Tensor], windows: Windows | None) -> Tensor:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    batch = hidden.shape[0]
    query, key, value = attention.qkv(hidden).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    query, key = apply_rotary_pos_emb_vision(query, key, *rotation)
    heads = [query, key, value]  # [batch, patches, heads, values]
    filled = None
    if windows is not None:
        heads = [
            states.index_select(1, windows.order).unflatten(1, (-1, windows.length)).flatten(0, 1) for states in heads
        ]
        if windows.filled is not None:
            filled = windows.filled.repeat(batch, 1, 1, 1)
    query, key, value = (states.transpose(1, 2) for states in heads)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=filled, scale=attention.scaling)
    found = found.transpose(1, 2).flatten(2)
    if windows is not None:
        found = found.unflatten(0, (batch, -1)).flatten(1, 2).index_select(1, windows.inverse)
    return attention.proj(found)
