"""The decoder of mPLUG-Owl2: LLaMA-2 whose norms, keys and values have one set of weights per modality."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqareward.rewards.mllm.owl2.config import Owl2Config

KeyValue = tuple[Tensor, Tensor]


class Layout(NamedTuple):
    """What the rows of one forward are. Rows before `image` and after it are text; earlier rows are in a cache."""

    image: tuple[int, int]  # start and stop of the image rows
    cos: Tensor  # [T, head_dim]
    sin: Tensor
    mask: Tensor  # [T, past + T] bool: causal over cached and new rows

    @classmethod
    def build(cls, config: Owl2Config, rows: Tensor, image: tuple[int, int], past: int) -> "Layout":
        """The layout of `rows` `[B, T, hidden]` that continue after `past` cached rows."""
        count, device = rows.shape[1], rows.device
        width = config.hidden // config.heads
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        positions = torch.arange(past, past + count, dtype=torch.float32, device=device)
        angles = positions[:, None] / config.rope_theta**exponents
        angles = torch.cat([angles, angles], dim=-1)
        mask = torch.ones(count, past + count, dtype=torch.bool, device=device).tril(past)
        return cls(image, angles.cos().to(rows.dtype), angles.sin().to(rows.dtype), mask)


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

    def forward(self, rows: Tensor, image: tuple[int, int]) -> Tensor:
        start, stop = image
        text_weights, image_weights = self.multiway
        pieces = ((text_weights, rows[:, :start]), (image_weights, rows[:, start:stop]), (text_weights, rows[:, stop:]))
        # A slice is not contiguous, and torch multiplies such rows by a copy of the weights for every image.
        return torch.cat([module(piece.contiguous()) for module, piece in pieces if piece.shape[1]], dim=1)


class DecoderLayer(nn.Module):
    """One layer; `forward` returns the new rows and the keys and values that it computed."""

    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width, eps = config.hidden, config.rms_eps
        self.input_layernorm = Multiway(RmsNorm(width, eps), RmsNorm(width, eps))
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = Multiway(RmsNorm(width, eps), RmsNorm(width, eps))
        self.mlp = _Mlp(width, config.ffn)

    def forward(
        self, rows: Tensor, layout: Layout, past: KeyValue | None = None, last_only: bool = False
    ) -> tuple[Tensor, KeyValue]:
        normed = self.input_layernorm(rows, layout.image)
        own = self.self_attn.keys_values(normed, layout)
        attended = own if past is None else _append(past, own)
        image = layout.image
        if last_only:  # the last row is text, and nothing reads the other rows of the last layer
            rows, normed, image = rows[:, -1:], normed[:, -1:], (0, 0)
        rows = rows + self.self_attn(normed, attended, layout)
        return rows + self.mlp(self.post_attention_layernorm(rows, image)), own


class _Attention(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width, head = config.hidden, config.hidden // config.heads
        self.heads, self.kv_heads = config.heads, config.kv_heads
        kv_width = config.kv_heads * head
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = Multiway(nn.Linear(width, kv_width, bias=False), nn.Linear(width, kv_width, bias=False))
        self.v_proj = Multiway(nn.Linear(width, kv_width, bias=False), nn.Linear(width, kv_width, bias=False))
        self.o_proj = nn.Linear(width, width, bias=False)

    def keys_values(self, normed: Tensor, layout: Layout) -> KeyValue:
        keys = _split(self.k_proj(normed, layout.image), self.kv_heads)
        return _rotate(keys, layout.cos, layout.sin), _split(self.v_proj(normed, layout.image), self.kv_heads)

    def forward(self, normed: Tensor, attended: KeyValue, layout: Layout) -> Tensor:
        count = normed.shape[1]  # all new rows, or the last one alone, which may attend to every row
        queries = _rotate(_split(self.q_proj(normed), self.heads), layout.cos[-count:], layout.sin[-count:])
        mask = layout.mask if count > 1 else None
        grouped = self.heads != self.kv_heads
        mixed = F.scaled_dot_product_attention(queries, *attended, attn_mask=mask, enable_gqa=grouped)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(rows)) * self.up_proj(rows))


def _split(rows: Tensor, heads: int) -> Tensor:
    return rows.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the half-split convention."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def _append(past: KeyValue, own: KeyValue) -> KeyValue:
    """Put the shared cache `[1, heads, P, head_dim]` before each image's own keys and values."""
    return tuple(  # pyright: ignore[reportReturnType]
        torch.cat([old.expand(new.shape[0], -1, -1, -1), new], dim=2) for old, new in zip(past, own, strict=True)
    )
