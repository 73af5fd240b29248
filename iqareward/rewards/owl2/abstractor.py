"""The visual abstractor of mPLUG-Owl2: learned queries that read the vision tower's rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqareward.rewards.owl2.config import Owl2Config
from iqareward.rewards.recompute import RunLayer, run_layer

NORM_EPS = 1e-5
FFN_NORM_EPS = 1e-6
SINUSOID_BASE = 10000.0


class Abstractor(nn.Module):
    """Vision rows `[N, 1 + patches, vision_hidden]` to decoder rows `[N, num_queries + 1, hidden]`."""

    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        self.query_embeds = nn.Parameter(torch.zeros(1, config.num_queries, config.abstractor_hidden))
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, config.hidden))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_Layer(config) for _ in range(config.abstractor_layers))})
        self.visual_fc = nn.Linear(config.abstractor_hidden, config.hidden)

    def forward(self, vision: Tensor, run: RunLayer = run_layer) -> Tensor:
        queries = self.query_embeds.repeat(vision.shape[0], 1, 1)  # not expanded, which would be compiled twice
        for layer in self.encoder["layers"]:  # pyright: ignore[reportGeneralTypeIssues]
            queries = run(layer, queries, vision)
        return torch.cat([self.visual_fc(queries), self.vit_eos.expand(vision.shape[0], -1, -1)], dim=1)


class _Layer(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        self.crossattention = _CrossAttention(config)

    def forward(self, queries: Tensor, vision: Tensor) -> Tensor:
        return self.crossattention(queries, vision)


class _CrossAttention(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.output = _Output(config)
        self.norm1 = nn.LayerNorm(config.abstractor_hidden, eps=NORM_EPS)
        self.normk = nn.LayerNorm(config.vision_hidden, eps=NORM_EPS)

    def forward(self, queries: Tensor, vision: Tensor) -> Tensor:
        queries = self.norm1(queries)  # the residual stream continues from the normalised queries
        sources = torch.cat([queries, self.normk(vision)], dim=1)
        return self.output(queries, self.attention(queries, sources))


class _Attention(nn.Module):
    """Queries attend to themselves and to the vision rows; positions enter queries and keys, not values."""

    q_pos_embed: Tensor
    k_pos_embed: Tensor

    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width = config.abstractor_hidden
        self.heads = config.abstractor_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.register_buffer("q_pos_embed", line_positions(config.num_queries, width))
        self.register_buffer("k_pos_embed", grid_positions(config.grid, width))

    def forward(self, queries: Tensor, sources: Tensor) -> Tensor:
        query = self._split(self.query(queries + self.q_pos_embed))
        key = self._split(self.key(sources + torch.cat([self.q_pos_embed, self.k_pos_embed])))
        value = self._split(self.value(sources))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _Output(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width = config.abstractor_hidden
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = _Mlp(width, config.abstractor_ffn)

    def forward(self, queries: Tensor, attended: Tensor) -> Tensor:
        queries = queries + self.out_proj(attended)
        return queries + self.mlp(self.norm2(queries))


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)
        self.w3 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps=FFN_NORM_EPS)

    def forward(self, rows: Tensor) -> Tensor:
        return self.w2(self.ffn_ln(F.silu(self.w1(rows)) * self.w3(rows)))


def line_positions(count: int, width: int) -> Tensor:
    """Fixed `[count, width]` table: sines, then cosines, of position over falling frequencies."""
    return _sinusoids(torch.arange(count, dtype=torch.float64), width).float()


def grid_positions(side: int, width: int) -> Tensor:
    """Fixed `[1 + side * side, width]` table: zeros for the class token; then column halves beside row halves."""
    axis = _sinusoids(torch.arange(side, dtype=torch.float64), width // 2)
    columns = axis[None, :].expand(side, side, -1)
    rows = axis[:, None].expand(side, side, -1)
    grid = torch.cat([columns, rows], dim=-1).reshape(side * side, width)
    return torch.cat([grid.new_zeros(1, width), grid]).float()


def _sinusoids(positions: Tensor, width: int) -> Tensor:
    half = width // 2
    frequencies = SINUSOID_BASE ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
