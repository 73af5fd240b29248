"""The vision tower of mPLUG-Owl2: a CLIP-like ViT that keeps its class token and its last layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqareward.rewards.owl2.config import Owl2Config
from iqareward.rewards.recompute import RunLayer, run_layer

LAYER_NORM_EPS = 1e-6
QUICK_GELU = 1.702  # x * sigmoid(1.702 x), the activation of CLIP


class VisionTower(nn.Module):
    """Pixels `[N, 3, S, S]` to one row per patch, class token first: `[N, 1 + patches, vision_hidden]`."""

    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(_Layer(config) for _ in range(config.vision_layers))})
        self.post_layernorm = nn.LayerNorm(config.vision_hidden, eps=LAYER_NORM_EPS)

    def forward(self, pixels: Tensor, run: RunLayer = run_layer) -> Tensor:
        rows = self.embeddings(pixels)
        for layer in self.encoder["layers"]:  # pyright: ignore[reportGeneralTypeIssues]
            rows = run(layer, rows)
        return self.post_layernorm(rows)


class _Embeddings(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width, patch = config.vision_hidden, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.num_patches + 1, width))
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.pre_layernorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels).flatten(2).mT
        rows = torch.cat([self.cls_token.expand(pixels.shape[0], -1, -1), patches], dim=1)
        return self.pre_layernorm(rows + self.position_embedding)


class _Layer(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width = config.vision_hidden
        self.input_layernorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.self_attn = _Attention(width, config.vision_heads)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = _Mlp(width, config.vision_ffn)

    def forward(self, rows: Tensor) -> Tensor:
        rows = rows + self.self_attn(self.input_layernorm(rows))
        return rows + self.mlp(self.post_attention_layernorm(rows))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, rows: Tensor) -> Tensor:
        batch, count, width = rows.shape
        # The fused weight is head-major: each head's query, key and value lie side by side.
        fused = self.query_key_value(rows).view(batch, count, self.heads, 3, width // self.heads)
        query, key, value = fused.permute(3, 0, 2, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.dense(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, rows: Tensor) -> Tensor:
        # x sigmoid(c x) = silu(c x) / c, with both factors in the matrix products: one pass over memory, not three
        inner = torch.addmm(self.fc1.bias * QUICK_GELU, rows.flatten(0, 1), self.fc1.weight.t(), alpha=QUICK_GELU)
        outer = torch.addmm(self.fc2.bias, F.silu(inner), self.fc2.weight.t(), alpha=1 / QUICK_GELU)
        return outer.view_as(rows)
