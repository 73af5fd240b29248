"""The decoder of mPLUG-Owl2: LLaMA-2 whose norms, keys and values have one set of weights per modality."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqareward.rewards.owl2.config import Owl2Config

KeyValue = tuple[Tensor, Tensor]


class Layout(NamedTuple):
    """What the rows of one forward are. Rows before `image` and after it are text; earlier rows are in a cache."""

    image: tuple[int, int]  # start and stop of the image rows
    cos: Tensor  # [past + T, 1, 1, head_dim]
    sin: Tensor  # the same, its first half negated
    mask: Tensor  # [T, past + T], added to logits: 0, or -inf for later rows. A bool would be converted in each layer.

    @classmethod
    def build(cls, config: Owl2Config, rows: Tensor, image: tuple[int, int], past: int) -> "Layout":
        """The layout of `rows` `[T, B, hidden]` that continue after `past` cached rows."""
        count, device = rows.shape[0], rows.device
        width = config.hidden // config.heads
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        positions = torch.arange(past + count, dtype=torch.float32, device=device)
        angles = (positions[:, None] / config.rope_theta**exponents)[:, None, None]
        cos, sin = angles.cos(), angles.sin()
        cos, sin = (torch.cat(halves, dim=-1).to(rows.dtype) for halves in ((cos, cos), (-sin, sin)))
        mask = torch.full((count, past + count), -torch.inf, dtype=rows.dtype, device=device).triu(past + 1)
        return cls(image, cos, sin, mask)


class RmsNorm(nn.Module):
    """Divide by the root mean square, computed in float32, and scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, rows: Tensor) -> Tensor:
        return F.rms_norm(rows, self.weight.shape, self.weight, self.eps)


class Multiway(nn.Module):
    """Two modules of one shape: `multiway.0` for text rows, `multiway.1` for image rows, chosen by slicing."""

    def __init__(self, text: nn.Module, image: nn.Module) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([text, image])

    def forward(self, rows: Tensor, image: tuple[int, int], *before: Tensor) -> Tensor:
        """Results for `rows` `[T, B, width]`, after the results of earlier rows, `before`."""
        start, stop = image
        text_weights, image_weights = self.multiway
        pieces = ((text_weights, rows[:start]), (image_weights, rows[start:stop]), (text_weights, rows[stop:]))
        found = [*before, *(module(piece) for module, piece in pieces if piece.shape[0])]
        return torch.cat(found) if len(found) > 1 else found[0]


class DecoderLayer(nn.Module):
    """One layer, on rows `[T, B, hidden]`: position first, so that the rows of one modality lie side by side."""

    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width, eps = config.hidden, config.rms_eps
        self.input_layernorm = Multiway(RmsNorm(width, eps), RmsNorm(width, eps))
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = Multiway(RmsNorm(width, eps), RmsNorm(width, eps))
        self.mlp = _Mlp(width, config.ffn)

    def keys_values(self, rows: Tensor, layout: Layout) -> KeyValue:
        """What later rows need of these: keys, not yet rotated, and values, each `[T, B, kv_width]`."""
        return self.self_attn.keys_values(self.input_layernorm(rows, layout.image), layout)

    def forward(self, rows: Tensor, layout: Layout, past: KeyValue | None = None, last_only: bool = False) -> Tensor:
        normed = self.input_layernorm(rows, layout.image)
        keys_values = self.self_attn.keys_values(normed, layout, past)
        image = layout.image
        if last_only:  # the last row is text, and nothing reads the other rows of the last layer
            rows, normed, image = rows[-1:], normed[-1:], (0, 0)
        rows = rows + self.self_attn(normed, keys_values, layout)
        return rows + self.mlp(self.post_attention_layernorm(rows, image))


class _Attention(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width, self.head_dim = config.hidden, config.hidden // config.heads
        kv_width = config.kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = Multiway(nn.Linear(width, kv_width, bias=False), nn.Linear(width, kv_width, bias=False))
        self.v_proj = Multiway(nn.Linear(width, kv_width, bias=False), nn.Linear(width, kv_width, bias=False))
        self.o_proj = nn.Linear(width, width, bias=False)

    def keys_values(self, normed: Tensor, layout: Layout, past: KeyValue | None = None) -> KeyValue:
        batch = normed.shape[1]  # a cache holds what all images share, [P, 1, kv_width]
        keys, values = ((),) * 2 if past is None else ((old.expand(-1, batch, -1),) for old in past)
        return self.k_proj(normed, layout.image, *keys), self.v_proj(normed, layout.image, *values)

    def forward(self, normed: Tensor, keys_values: KeyValue, layout: Layout) -> Tensor:
        count = normed.shape[0]  # all new rows, or the last one alone, which may attend to every row
        queries, keys, values = (x.unflatten(-1, (-1, self.head_dim)) for x in (self.q_proj(normed), *keys_values))
        queries = _rotate(queries, layout.cos[-count:], layout.sin[-count:])
        keys = _rotate(keys, layout.cos, layout.sin)
        mixed = F.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (queries, keys, values)),
            attn_mask=layout.mask if count > 1 else None,
            enable_gqa=queries.shape[2] != keys.shape[2],
        )
        # Most kernels keep the order of the queries in memory; where one does not, a product would copy the weights.
        return self.o_proj(mixed.permute(2, 0, 1, 3).contiguous().flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(rows)) * self.up_proj(rows))


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split convention."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, -1), sin)
