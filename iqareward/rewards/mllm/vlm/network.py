"""A loaded vision-language model: images and a prompt in, logits of the next token out, in one forward pass."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from iqareward.rewards._per_process import ProcessLock
from iqareward.rewards.mllm.vlm.branches import Branches
from iqareward.rewards.mllm.vlm.chat import Prompt
from iqareward.rewards.mllm.vlm.families import check_family, family_of
from iqareward.rewards.mllm.vlm.towers import VisionTower

_CACHED_SHAPES = 32  # layouts kept, one for each size of image and batch


class Features(NamedTuple):
    """What the vision tower made of a batch.

    Attributes:
        output: as the model takes it.
        batch: number of images.
        num_tokens: image tokens of each image.
        grid: their rows and columns, for M-RoPE.
        shapes: the model's own argument that says so.
    """

    output: Any
    batch: int
    num_tokens: int
    grid: tuple[int, int] | None
    shapes: dict[str, Tensor]


class Layout(NamedTuple):
    """Everything about the tokens of one image's sequence that does not depend on its pixels.

    Attributes:
        ids: `[1, L]` token ids.
        positions: `[1, L]`, or `[3, 1, L]` for M-RoPE.
        mask: `[1, 1, L, L]` added to attention scores; None = causal.
        keep: `[K]` indices of the tokens that are read.
        end: position of the next token after the prompt.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
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
        ValueError: the family is not supported, or model and processor do not belong together.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"expected a model of transformers, got {type(model).__name__}. Merge adapters first, "
                "such as with model.merge_and_unload()."
            )
        check_family(model.config.model_type)
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
        output = self._tower(inputs, images.shape[0])
        tokens = sum(rows.shape[:-1].numel() for rows in output.pooler_output)
        shapes = {key: value for key, value in inputs.keywords.items() if key == "image_grid_thw"}
        return Features(output, images.shape[0], tokens // images.shape[0], inputs.grid, shapes)

    def logits(self, features: Features, prompt: Prompt) -> Tensor:
        """`[B, vocabulary]` of the token behind the prompt."""
        return self.head(self.hidden(features, prompt)[:, -1])

    def hidden(self, features: Features, prompt: Prompt, branches: Branches | None = None) -> Tensor:
        """`[B, K, values]`: the last layer at the end of the prompt, and at each token of `branches` that is read."""
        layout = self.layout(prompt, features.num_tokens, features.grid, branches)
        return self._prefill(layout, features, use_cache=False).last_hidden_state.index_select(1, layout.keep)

    def head(self, hidden: Tensor, ids: Tensor | None = None) -> Tensor:
        """Logits of the next token, `[..., vocabulary]`, or `[..., K]` of these `ids` alone: the head is large."""
        layer = self.model.get_output_embeddings()
        if ids is None:
            return layer(hidden)
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
        layout = self.layout(prompt, features.num_tokens, features.grid, None)
        out = self._prefill(layout, features, use_cache=True)
        yield out.last_hidden_state[:, -1]
        rows, position = features.batch, layout.end
        for ids in branchings:
            branches, length = ids.shape
            out.past_key_values.reorder_cache(torch.arange(rows, device=self.device).repeat_interleave(branches))
            positions = torch.arange(position, position + length, device=self.device)
            out = self.model.model(
                input_ids=ids.repeat(rows, 1),
                past_key_values=out.past_key_values,
                position_ids=positions.expand(*layout.positions.shape[:-2], rows * branches, -1),
                use_cache=True,
            )
            yield out.last_hidden_state[:, -1]
            rows, position = rows * branches, position + length

    def _prefill(self, layout: Layout, features: Features, *, use_cache: bool) -> Any:
        return self.model.model(
            input_ids=layout.ids.expand(features.batch, -1),
            mm_encoder_outputs={"image": features.output},
            position_ids=layout.positions.expand(*layout.positions.shape[:-2], features.batch, -1),
            attention_mask=layout.mask,
            use_cache=use_cache,
        )

    def _layout(
        self, prompt: Prompt, num_tokens: int, grid: tuple[int, int] | None, branches: Branches | None
    ) -> Layout:
        image = self.processor.image_token_id
        ids = torch.tensor([*prompt.before, *[image] * num_tokens, *prompt.after])
        positions = _positions(len(prompt.before), num_tokens, grid, len(prompt.after))
        end = int(positions.max()) + 1
        mask, keep = None, torch.tensor([len(ids) - 1])
        if branches is not None:
            later = torch.tensor(branches.depths) + end
            positions = torch.cat([positions, later.expand(*positions.shape[:-1], -1)], dim=-1)
            length = len(ids)
            ids = torch.cat([ids, torch.tensor(branches.ids)])
            keep = torch.cat([keep, torch.tensor(branches.read) + length])
            visible = branches.visible(length)
            low = torch.finfo(self.model.dtype).min
            mask = torch.zeros(visible.shape, dtype=self.model.dtype).masked_fill(~visible, low)[None, None]
            mask = mask.to(self.device)
        # M-RoPE's three axes come before the batch
        positions = positions[:, None] if positions.ndim == 2 else positions[None]
        return Layout(ids[None].to(self.device), positions.to(self.device), mask, keep.to(self.device), end)


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
