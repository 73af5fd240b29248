"""Qwen2.5-VL's vision tower on a batch of images of one size, all attention windows in one call."""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iqareward.rewards.mllm.owl2.recompute import run_layer


class Windows(NamedTuple):
    """Where the patches of one image stand in its windows.

    Attributes:
        positions: what the tower's rotary embedding takes, for one image.
        order: `[windows * length]` patch in each place; places that an image's border leaves empty hold patch 0.
        inverse: `[patches]` place of each patch.
        length: places of a window.
        filled: `[windows, 1, 1, length]` bool: places that hold a patch; None = all.
    """

    positions: Tensor
    order: Tensor
    inverse: Tensor
    length: int
    filled: Tensor | None


def windows_of(tower: Any, rows: int, columns: int, device: torch.device) -> Windows:
    """Windows of an image of `rows x columns` patches."""
    from transformers.vision_utils import get_vision_position_ids

    merge, unit = tower.spatial_merge_size, tower.spatial_merge_unit
    side = tower.window_size // merge // tower.patch_size  # of a window, in tokens
    down, across = rows // merge, columns // merge
    tokens = torch.arange(down * across).reshape(1, 1, down, across)
    padded = F.pad(tokens, (0, -across % side, 0, -down % side), value=-1)
    cells = F.pixel_unshuffle(padded, side).flatten(2)[0].T  # one row for each window
    places = (cells[:, :, None] * unit + torch.arange(unit)).masked_fill(cells[:, :, None] < 0, -1).flatten(1)
    filled = places >= 0
    inverse = torch.empty(rows * columns, dtype=torch.long)
    inverse[places[filled]] = filled.flatten().nonzero().flatten()
    positions = get_vision_position_ids(torch.tensor([[1, rows, columns]]), merge)
    return Windows(
        positions.to(device),
        places.flatten().clamp_min(0).to(device),
        inverse.to(device),
        places.shape[1],
        None if filled.all() else filled[:, None, None].to(device),
    )


def run_tower(tower: Any, patches: Tensor, batch: int, windows: Windows) -> Tensor:
    """What `tower(patches, grid)` gives, image by image, without a call for each window and layer.

    The library attends window by window: at 1024 x 1024, 100 small calls for each image and layer. A backward pass
    recomputes each block instead of keeping its activations.

    Args:
        tower: `Qwen2_5_VisionTransformerPretrainedModel`.
        patches: `[batch * patches, values]` in the tower's dtype.
        batch: number of images, all of one size.
        windows: of that size.

    Returns:
        `[batch, tokens, hidden]`.
    """
    hidden = tower.patch_embed(patches).unflatten(0, (batch, -1))
    rotation = tower.rotary_pos_emb(hidden, windows.positions)
    for index, block in enumerate(tower.blocks):
        local = None if index in tower.fullatt_block_indexes else windows
        hidden = run_layer(partial(_run_block, block=block, rotation=rotation, windows=local), hidden)
    return tower.merger(hidden.flatten(0, 1)).unflatten(0, (batch, -1))


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
