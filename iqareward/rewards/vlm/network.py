"""A loaded vision-language model: images and a prompt in, logits of the next token out, in one forward pass."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqareward.rewards.threads import ProcessLock
from iqareward.rewards.vlm.branches import Branches
from iqareward.rewards.vlm.chat import Prompt
from iqareward.rewards.vlm.families import check_family, family_of
from iqareward.rewards.vlm.towers import VisionTower

_CACHED_SHAPES = 32  # layouts kept, one for each prompt and size of image

# language models that are nothing but their layers between an embedding and a norm; others scale or clip in between
_LANGUAGE_MODELS = ("qwen2_5_vl_text", "qwen3_vl_text", "qwen3_5_text", "qwen2", "qwen3", "llama")


class Features(NamedTuple):
    """What the vision tower made of a batch of images of one size.

    Attributes:
        tokens: `[B, T, values]` to put in place of the image tokens.
        deep: `[B, T, values]` to add to them behind each of the first layers (deepstack); most models have none.
        grid: rows and columns of the tokens, for M-RoPE.
    """

    tokens: Tensor
    deep: tuple[Tensor, ...]
    grid: tuple[int, int] | None


class Layout(NamedTuple):
    """Everything about the tokens of one image's sequence that does not depend on its pixels.

    Attributes:
        ids: `[1, L]` token ids.
        positions: `[1, L]`, or `[3, 1, L]` for M-RoPE.
        rotation: cosines and sines of the positions, as the layers take them.
        masks: what the layers of each kind take as attention mask.
        keep: `[K]` indices of the tokens that are read.
        end: position of the next token after the prompt.
    """

    ids: Tensor
    positions: Tensor
    rotation: tuple[Tensor, Tensor]
    masks: dict[str, Any]
    keep: Tensor
    end: int


@final
class Network:
    """A native image-text-to-text model with its processor, frozen, ready to answer about batches of equal size.

    Args:
        model: on its device.
        processor: of the model.

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
        self._tower = VisionTower(model)

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

        The cache is repeated for each branch: for models whose layers do not all attend to everything.

        Args:
            features: of `B` images.
            prompt: before them, shared.
            branchings: `[branches, T]` ids each: how every sequence so far goes on.
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

    def _prefill(self, layout: Layout, features: Features, before: int, cache: Any = None) -> Tensor:
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
        """The text model's own layers, one after the other.

        Its `forward` would read masks and positions back to the host, and find the tokens of deepstack with `nonzero`.
        """
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

    def _layout(
        self, prompt: Prompt, num_tokens: int, grid: tuple[int, int] | None, branches: Branches | None
    ) -> Layout:
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
            return Layout(ids[None].to(self.device), positions, rotation, masks, keep.to(self.device), end)

    @property
    def _text(self) -> Any:
        return self.model.model.language_model

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


def _positions(before: int, image: int, grid: tuple[int, int] | None, after: int) -> Tensor:
    """`[L]`, or `[3, L]` (time, row, column) for M-RoPE: an image stands at one time, text goes on behind its grid."""
    if grid is None:
        return torch.arange(before + image + after)
    rows, columns = grid
    row = torch.arange(rows).repeat_interleave(columns)
    column = torch.arange(columns).repeat(rows)
    seen = before + torch.stack([torch.zeros_like(row), row, column])
    text = torch.arange(before).expand(3, -1), (torch.arange(after) + before + max(grid)).expand(3, -1)
    return torch.cat([text[0], seen, text[1]], dim=1)
