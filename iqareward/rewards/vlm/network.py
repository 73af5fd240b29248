"""A loaded vision-language model: images and a prompt in, logits of the next token out, in one forward pass.

The layers are called one by one in place of the library's `forward`, which reads masks and positions back to the host,
and attends image by image. A warm call does not wait for the device.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqareward._gradients import checkpoint_layer
from iqareward.rewards.threads import ProcessLock
from iqareward.rewards.vlm.inputs import ImageInputs, Pair, Prompt, check_family, family_of

_CACHED_SHAPES = 32  # layouts kept, one for each prompt and size of image, and geometries, one for each size

# language models that are nothing but their layers between an embedding and a norm; others scale or clip in between
_LANGUAGE_MODELS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_5_text", "qwen2", "qwen3", "llama")


class Branches(NamedTuple):
    """Tokens that stand side by side behind a prompt; each sees the prompt and its own ancestors only."""

    ids: tuple[int, ...]
    parents: tuple[int, ...]  # index of each token's parent; -1 = the prompt
    read: tuple[int, ...]  # tokens whose next-token logits are read

    @property
    def depths(self) -> list[int]:
        """How many ancestors each token has: its position behind the prompt."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def visible(self, length: int) -> Tensor:
        """`[L, L]` bool: what each token of a sequence may attend to, behind a prompt of `length` tokens."""
        total = length + len(self.ids)
        visible = torch.ones(total, total, dtype=torch.bool).tril()
        visible[length:, length:] = False
        for index, parent in enumerate(self.parents):
            row = length + index
            if parent >= 0:
                visible[row, length:] = visible[length + parent, length:]
            visible[row, row] = True
        return visible


class Features(NamedTuple):
    """What the vision tower made of a batch of images of one size."""

    tokens: Tensor  # [B, T, values] in place of the image tokens
    deep: tuple[Tensor, ...]  # [B, T, values] added to them behind each of the first layers (deepstack), often none
    grid: Pair | None  # rows and columns of the tokens, for M-RoPE


class _Layout(NamedTuple):
    """Everything about the tokens of one image's sequence that does not depend on its pixels."""

    ids: Tensor  # [1, L]
    positions: Tensor  # [1, L], or [3, 1, L] for M-RoPE
    rotation: tuple[Tensor, Tensor]  # cosines and sines of the positions, as the layers take them
    masks: dict[str, Any]  # what the layers of each kind take as attention mask
    keep: Tensor  # [K] indices of the tokens that are read
    end: int  # position of the next token after the prompt


@final
class Network:
    """A native image-text-to-text model with its processor, frozen, ready to answer about batches of equal size.

    Raises:
        TypeError: the model is wrapped.
        ValueError: the family is not supported, the model is spread over devices, or model and processor do not belong
            together.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"expected a model of transformers, got {type(model).__name__}. Merge adapters first, "
                "such as with model.merge_and_unload()."
            )
        places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
        if len(places) > 1:  # layers are called one by one, without the hooks that would carry rows between devices
            raise ValueError(
                f"expected a model on one device, got one spread over {', '.join(sorted(places))}. Load it without "
                "device_map, or serve it with vLLM or SGLang and use ServedVLMReward."
            )
        check_family(model.config.model_type)
        language = model.config.text_config.model_type
        if language not in _LANGUAGE_MODELS:
            raise ValueError(
                f"expected a language model of type {', '.join(_LANGUAGE_MODELS)}, got {language!r}. "
                "Serve it with vLLM or SGLang and use ServedVLMReward."
            )
        if processor.image_token_id != model.config.image_token_id:
            raise ValueError(
                f"expected model and processor of one checkpoint, got image tokens {model.config.image_token_id} "
                f"(model) and {processor.image_token_id} (processor)."
            )
        self.family = family_of(model, processor)
        self.writing = ProcessLock()  # `generate` keeps positions on the model
        self.layout = lru_cache(_CACHED_SHAPES)(self._layout)
        self._tower = _VisionTower(model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def shares_branches(self) -> bool:
        """Whether branches of an answer can stand side by side in one sequence: every layer attends to everything."""
        text = self.model.config.text_config
        everywhere = all(kind == "full_attention" for kind in getattr(text, "layer_types", None) or ())
        return everywhere and text._attn_implementation in ("sdpa", "eager")

    def features(self, images: Tensor) -> Features | None:
        """Run the vision tower on clean images `[B, 3, H, W]`; None if the model takes no image of that shape."""
        inputs = self.family.images(images)
        if inputs is None:
            return None
        tokens, *deep = self._tower(inputs, images.shape[0])
        return Features(tokens, tuple(deep), inputs.grid)

    def logits(self, features: Features, prompt: Prompt) -> Tensor:
        """`[B, vocabulary]` of the token behind the prompt."""
        return self.head(self.hidden(features, prompt)[:, -1])

    def hidden(self, features: Features, prompt: Prompt, branches: Branches | None = None) -> Tensor:
        """`[B, K, values]`: the last layer at the end of the prompt, and at each token of `branches` that is read."""
        layout = self.layout(prompt, features.tokens.shape[1], features.grid, branches)
        return self._prefill(layout, features, len(prompt.before)).index_select(1, layout.keep)

    def ends(self, features: Features, prompts: Sequence[Prompt]) -> Tensor:
        """`[B, values]`: the last layer at the end of each image's own prompt; all begin alike.

        Positions count tokens, those of the image as well. Shorter prompts are padded behind their end, where no layer
        that is read looks.
        """
        (rows, count, _), before = features.tokens.shape, prompts[0].before
        length = max(len(prompt.after) for prompt in prompts)
        start = [*before, *[self.processor.image_token_id] * count]
        ids = [[*start, *prompt.after, *prompt.after[-1:] * (length - len(prompt.after))] for prompt in prompts]
        last = [len(start) + len(prompt.after) - 1 for prompt in prompts]
        words = self._text.embed_tokens(torch.tensor(ids).to(self.device, non_blocking=True))
        hidden = torch.cat([words[:, : len(before)], features.tokens.to(words), words[:, len(start) :]], dim=1)
        positions = torch.arange(hidden.shape[1], device=self.device).expand(3, 1, -1)
        rotation = self._text.rotary_emb(hidden, positions)
        hidden = self._decode(hidden, rotation, self._masks(hidden), features.deep, len(before))
        ends = torch.tensor(last).to(self.device, non_blocking=True)
        return hidden[torch.arange(rows, device=self.device), ends]

    def head(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """Logits of the next token, `[..., vocabulary]`, or `[..., K]` of these `ids` alone: the head is large."""
        layer = self.model.get_output_embeddings()
        if ids is None:
            return layer(hidden)
        if type(layer) is not nn.Linear:  # packed weights have other rows
            return layer(hidden).index_select(-1, ids)
        bias = None if layer.bias is None else layer.bias.index_select(0, ids)
        return F.linear(hidden, layer.weight.index_select(0, ids), bias)

    def steps(self, features: Features, prompt: Prompt, branchings: Sequence[Tensor]) -> Iterator[Tensor]:
        """The last layer `[rows, values]` at the end of the prompt, then behind every token row of each branching.

        A branching `[branches, T]` holds the ids with which every sequence so far goes on. The cache is repeated for
        each branch: for models whose layers do not all attend to everything.
        """
        from transformers import DynamicCache

        layout = self.layout(prompt, features.tokens.shape[1], features.grid, None)
        cache: Any = DynamicCache(config=self._text.config)
        yield self._prefill(layout, features, len(prompt.before), cache)[:, -1]
        rows, position = features.tokens.shape[0], layout.end
        for ids in branchings:
            branches, length = ids.shape
            cache.reorder_cache(torch.arange(rows, device=self.device).repeat_interleave(branches))
            hidden = self._text.embed_tokens(ids).repeat(rows, 1, 1)
            positions = torch.arange(position, position + length, device=self.device)
            rotation = self._text.rotary_emb(hidden, positions.expand(*layout.positions.shape[:-1], -1))
            yield self._decode(hidden, rotation, self._masks(hidden, cache), cache=cache)[:, -1]
            rows, position = rows * branches, position + length

    def _prefill(self, layout: _Layout, features: Features, before: int, cache: Any = None) -> Tensor:
        """The last layer `[B, L, values]` behind the prompt around the image."""
        rows, length, _ = features.tokens.shape
        words = self._text.embed_tokens(layout.ids).expand(rows, -1, -1)
        hidden = torch.cat([words[:, :before], features.tokens.to(words), words[:, before + length :]], dim=1)
        return self._decode(hidden, layout.rotation, layout.masks, features.deep, before, cache)

    def _decode(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        masks: dict[str, Any],
        deep: tuple[Tensor, ...] = (),
        before: int = 0,
        cache: Any = None,
    ) -> Tensor:
        """The text model's own layers, one after the other."""
        for index, (layer, kind) in enumerate(zip(self._text.layers, self._kinds, strict=True)):
            hidden = layer(
                hidden,
                attention_mask=masks[kind],
                position_embeddings=rotation,
                past_key_values=cache,
                use_cache=cache is not None,
            )
            if index < len(deep):
                first, image, last = hidden.tensor_split((before, before + deep[index].shape[1]), dim=1)
                hidden = torch.cat([first, image + deep[index], last], dim=1)
        return self._text.norm(hidden)

    def _layout(self, prompt: Prompt, num_tokens: int, grid: Pair | None, branches: Branches | None) -> _Layout:
        image = self.processor.image_token_id
        ids = torch.tensor([*prompt.before, *[image] * num_tokens, *prompt.after])
        length = len(ids)
        positions = _positions(len(prompt.before), num_tokens, grid, len(prompt.after))
        end = len(prompt.before) + (num_tokens if grid is None else max(grid)) + len(prompt.after)
        keep = torch.tensor([length - 1])
        if branches is not None:
            later = torch.tensor(branches.depths) + end
            positions = torch.cat([positions, later.expand(*positions.shape[:-1], -1)], dim=-1)
            ids = torch.cat([ids, torch.tensor(branches.ids)])
            keep = torch.cat([keep, torch.tensor(branches.read) + length])
        # M-RoPE's three axes come before the batch
        positions = (positions[:, None] if positions.ndim == 2 else positions[None]).to(self.device)
        with torch.inference_mode(False), torch.no_grad():  # kept for calls in other modes
            dtype = self._text.embed_tokens.weight.dtype
            states = torch.empty(1, len(ids), 1, dtype=dtype, device=self.device)
            rotation = self._text.rotary_emb(states, positions)
            if branches is None:
                masks = self._masks(states)
            else:
                hidden = ~branches.visible(length)
                mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
                masks = {"full_attention": mask[None, None].to(self.device)}
            # Copies from the host come last: they wait for what the device computed before, so that other threads may
            # read it on streams of their own.
            return _Layout(ids[None].to(self.device), positions, rotation, masks, keep.to(self.device), end)

    @property
    def _text(self) -> Any:
        return _core(self.model).language_model

    @property
    def _kinds(self) -> list[str]:
        """Kind of attention of each layer."""
        return getattr(self._text.config, "layer_types", None) or ["full_attention"] * len(self._text.layers)

    def _masks(self, hidden: Tensor, cache: Any = None) -> dict[str, Any]:
        """Causal masks for each kind of layer, as its attention takes them."""
        from transformers import masking_utils

        makers: dict[str, Any] = {
            "full_attention": masking_utils.create_causal_mask,
            "sliding_attention": masking_utils.create_sliding_window_causal_mask,
        }
        options = {"config": self._text.config, "inputs_embeds": hidden, "attention_mask": None}
        return {
            # a recurrent layer needs a mask for padding only, and there is none
            kind: None if kind == "linear_attention" else makers[kind](**options, past_key_values=cache)
            for kind in set(self._kinds)
        }


def _core(model: Any) -> Any:
    """The model without its language-modelling head, which it may be already."""
    return getattr(model, "model", model)


def _positions(before: int, image: int, grid: Pair | None, after: int) -> Tensor:
    """`[L]`, or `[3, L]` (time, row, column) for M-RoPE: an image stands at one time, text goes on behind its grid."""
    if grid is None:
        return torch.arange(before + image + after)
    rows, columns = grid
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    seen = before + torch.stack([torch.zeros_like(row), row, column])
    text = torch.arange(before).expand(3, -1), (torch.arange(after) + before + max(grid)).expand(3, -1)
    return torch.cat([text[0], seen, text[1]], dim=1)


class _Windows(NamedTuple):
    """Where the patches of one image stand in the attention windows of Qwen2.5-VL."""

    order: Tensor  # [windows * length] patch in each place; places that an image's border leaves empty hold patch 0
    inverse: Tensor  # [patches] place of each patch
    length: int  # places of a window
    filled: Tensor | None  # [windows, 1, 1, length] bool: places that hold a patch; None = all


class _Geometry(NamedTuple):
    """What a tower of the Qwen family needs to know about images of one size."""

    rotation: tuple[Tensor, Tensor]  # cosines and sines [patches, values] of the rotary position embedding
    taps: tuple[Tensor, Tensor] | None  # [patches, 4] learned positions to interpolate between, and their weights
    windows: _Windows | None  # None = every layer attends to the whole image


class _VisionTower:
    """From inputs of equal size to image tokens, in place of a model's `get_image_features`.

    The library attends image by image, and in Qwen2.5-VL window by window: at 1024 x 1024, 100 small calls for each
    image and layer.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._geometry = lru_cache(_CACHED_SHAPES)(partial(geometry_of, getattr(_core(model), "visual", None)))

    def __call__(self, inputs: ImageInputs, batch: int) -> tuple[Tensor, ...]:
        """`[batch, tokens, values]` to put in place of the image tokens, then what deepstack layers add to them."""
        pixels = inputs.keywords["pixel_values"].to(self.model.dtype)
        if inputs.grid is not None:
            return run_tower(_core(self.model).visual, pixels, batch, self._geometry(*inputs.grid))
        if "image_sizes" in inputs.keywords:
            return (self._packed(pixels, inputs.keywords["image_sizes"][0]),)
        tiles = self.model.get_image_features(pixels, return_dict=True).pooler_output
        return (tiles.unflatten(0, (batch, -1)).flatten(1, 2),)

    def _packed(self, pixels: Tensor, size: Pair) -> Tensor:
        """LLaVA-OneVision's features of tiles `[batch, 1 + tiles, 3, H, W]` from images that had this size.

        The library packs image by image and copies counts to the device.
        """
        from transformers.models.llava_onevision import modeling_llava_onevision as library

        core, config = _core(self.model), self.model.config
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


def geometry_of(tower: Any, down: int, across: int) -> _Geometry:
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
        return _Geometry(
            (angles.cos().to(device), angles.sin().to(device)),
            None if taps is None else (taps[0].to(device), taps[1].to(device)),
            windows,
        )


def _taps(places: Tensor, size: Pair, side: int) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation, corner to corner, between learned positions on a grid of `side x side`."""
    near, shares = [], []
    for place, length in zip(places, size, strict=True):
        source = place.float() * (side - 1) / max(length - 1, 1)
        low = source.floor()
        near.append(torch.stack([low, (low + 1).clamp_max(side - 1)], dim=1).long())
        shares.append(torch.stack([1 - (source - low), source - low], dim=1))
    indices = near[0][:, :, None] * side + near[1][:, None, :]
    return indices.flatten(1), (shares[0][:, :, None] * shares[1][:, None, :]).flatten(1)


def _windows_of(tower: Any, down: int, across: int, device: torch.device) -> _Windows:
    unit = tower.spatial_merge_unit
    side = tower.window_size // tower.spatial_merge_size // tower.patch_size  # of a window, in tokens
    tokens = torch.arange(down * across).reshape(1, 1, down, across)
    padded = F.pad(tokens, (0, -across % side, 0, -down % side), value=-1)
    cells = F.pixel_unshuffle(padded, side).flatten(2)[0].T  # one row for each window
    places = (cells[:, :, None] * unit + torch.arange(unit)).masked_fill(cells[:, :, None] < 0, -1).flatten(1)
    filled = places >= 0
    patches = down * across * unit
    inverse = places.masked_fill(~filled, patches).flatten().argsort()[:patches]
    return _Windows(
        places.flatten().clamp_min(0).to(device),
        inverse.to(device),
        places.shape[1],
        None if down % side == across % side == 0 else filled[:, None, None].to(device),
    )


def run_tower(tower: Any, patches: Tensor, batch: int, geometry: _Geometry) -> tuple[Tensor, ...]:
    """What `tower(patches, grid)` gives for images of one size, with one attention call for each layer.

    Patches are `[batch * patches, values]`. Returns the image tokens `[batch, tokens, hidden]`, and the same of every
    deepstack layer. A backward pass recomputes each block instead of keeping its activations.
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


def _run_block(hidden: Tensor, *, block: Any, rotation: tuple[Tensor, Tensor], windows: _Windows | None) -> Tensor:
    hidden = hidden + _attend(block.norm1(hidden), block.attn, rotation, windows)
    return hidden + block.mlp(block.norm2(hidden))


def _attend(hidden: Tensor, attention: Any, rotation: tuple[Tensor, Tensor], windows: _Windows | None) -> Tensor:
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
