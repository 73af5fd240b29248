"""mPLUG-Owl2 for reading out level words: vision tower, abstractor and modality-adaptive LLaMA-2 decoder in torch.

Module names are those of the published checkpoints.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqareward._gradients import checkpoint_layer
from iqareward.rewards.threads import ProcessLock

_NORM_EPS = 1e-6
_ABSTRACTOR_NORM_EPS = 1e-5
_QUICK_GELU = 1.702  # x * sigmoid(1.702 x), the activation of CLIP
_SINUSOID_BASE = 10000.0

_WARM_UP_RUNS = 3  # compilation and autotuning must be over before a graph is captured
# Of one function. torch gives up after 8, but these are one for each kind of layer, batch size, dtype and network size.
_MOST_COMPILATIONS = 256

_KeyValue = tuple[Tensor, Tensor]
Run = Callable[..., Any]  # run(layer, *inputs) gives layer(*inputs)


@dataclass(frozen=True)
class Owl2Config:
    """Sizes of the network; the defaults are those of q-future/one-align (8.2 billion parameters).

    Example:
        >>> Owl2Config().num_patches
        1024

    References:
        Ye et al., "mPLUG-Owl2: Revolutionizing Multi-modal Large Language Model with Modality Collaboration", 2024,
        https://arxiv.org/abs/2311.04257
    """

    vision_hidden: int = 1024
    vision_ffn: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    abstractor_hidden: int = 1024
    abstractor_ffn: int = 2816
    abstractor_layers: int = 6
    abstractor_heads: int = 16
    num_queries: int = 64
    hidden: int = 4096
    ffn: int = 11008
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    vocab: int = 32000
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image, without the class token."""
        return self.grid**2


class PromptState(NamedTuple):
    """A prompt made ready on the model's device: what all images share."""

    past: tuple[_KeyValue, ...]  # per layer, keys and values [P, 1, kv_width] of the text before the image
    suffix: Tensor  # [S, hidden] embeddings of the text after the image
    head: Tensor  # [K, hidden] float32 rows of the language-model head for the ids to read out


class Owl2(nn.Module):
    """The network under its published parameter names: `load_state_dict` takes a published checkpoint's 862 tensors.

    Args:
        config: The sizes of its layers.

    Example:
        >>> sizes = dict(vision_hidden=16, vision_ffn=16, vision_layers=1, vision_heads=2, image_size=28)
        >>> sizes |= dict(abstractor_hidden=16, abstractor_ffn=16, abstractor_layers=1, abstractor_heads=2)
        >>> model = Owl2(Owl2Config(**sizes, hidden=16, ffn=16, layers=2, heads=2, kv_heads=2, vocab=50))
        >>> state = model.prepare_prompt((1, 2), (3, 4), level_ids=(5, 6, 7))
        >>> model(torch.zeros(2, 3, 28, 28), (state,)).shape
        torch.Size([2, 1, 3])
    """

    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        self.config = config
        self.model = _Trunk(config)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)

    def encode_images(self, pixels: Tensor, run: Run = checkpoint_layer) -> Tensor:
        """Rows that stand for each image in the prompt: `[N, 3, S, S]` to `[N, num_queries + 1, hidden]`."""
        return self.model.visual_abstractor(self.model.vision_model(pixels, run), run)

    @torch.no_grad()
    def prepare_prompt(
        self, prefix: tuple[int, ...], suffix: tuple[int, ...], level_ids: tuple[int, ...]
    ) -> PromptState:
        """Run the text before the image once, for any number of images; a prompt's ids never change."""
        device = self.lm_head.weight.device
        embed = self.model.embed_tokens
        rows = embed(torch.tensor(prefix, dtype=torch.long, device=device))[:, None]
        layout = Layout.build(self.config, rows, image=(0, 0), past=0)
        past: list[_KeyValue] = []
        layers: Any = self.model.layers
        for layer in layers:
            past.append(layer.keys_values(rows, layout))
            rows = layer(rows, layout)
        head = self.lm_head.weight[torch.tensor(level_ids, dtype=torch.long, device=device)]
        head = head if head.dtype == torch.float64 else head.float()
        return PromptState(tuple(past), embed(torch.tensor(suffix, dtype=torch.long, device=device)), head)

    def level_logits(self, image_rows: Tensor, state: PromptState, run: Run = checkpoint_layer) -> Tensor:
        """Logits of the level ids after the prompt around `image_rows` `[B, rows, hidden]`: `[B, K]`, float32."""
        batch, count = image_rows.shape[:2]
        rows = torch.cat([image_rows.transpose(0, 1), state.suffix[:, None].expand(-1, batch, -1)])
        layout = Layout.build(self.config, rows, image=(0, count), past=state.past[0][0].shape[0])
        *layers, last = self.model.layers
        for layer, past in zip(layers, state.past, strict=False):
            rows = run(layer, rows, layout, past)
        rows = checkpoint_layer(last, rows, layout, state.past[-1], True)
        return self.model.norm(rows[-1]).to(state.head.dtype) @ state.head.mT

    def forward(self, pixels: Tensor, states: tuple[PromptState, ...], run: Run = checkpoint_layer) -> Tensor:
        """Level logits `[N, prompts, K]` of preprocessed pixels `[N, 3, S, S]`; the prompts share the vision tower."""
        image_rows = self.encode_images(pixels, run)
        return torch.stack([self.level_logits(image_rows, state, run) for state in states], dim=1)


class _Trunk(nn.Module):
    """Everything but the head, as the published names have it."""

    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(_DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, config.rms_eps)
        self.vision_model = _VisionTower(config)
        self.visual_abstractor = _Abstractor(config)


class _VisionTower(nn.Module):
    """Pixels `[N, 3, S, S]` to one row per patch, class token first: `[N, 1 + patches, vision_hidden]`."""

    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        self.embeddings = _VisionEmbeddings(config)
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(_VisionLayer(config) for _ in range(config.vision_layers))}
        )
        self.post_layernorm = nn.LayerNorm(config.vision_hidden, eps=_NORM_EPS)

    def forward(self, pixels: Tensor, run: Run = checkpoint_layer) -> Tensor:
        rows = self.embeddings(pixels)
        for layer in self.encoder["layers"]:  # pyright: ignore[reportGeneralTypeIssues]
            rows = run(layer, rows)
        return self.post_layernorm(rows)


class _VisionEmbeddings(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width, patch = config.vision_hidden, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, config.num_patches + 1, width))
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.pre_layernorm = nn.LayerNorm(width, eps=_NORM_EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(pixels).flatten(2).mT
        rows = torch.cat([self.cls_token.expand(pixels.shape[0], -1, -1), patches], dim=1)
        return self.pre_layernorm(rows + self.position_embedding)


class _VisionLayer(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width = config.vision_hidden
        self.input_layernorm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.self_attn = _VisionAttention(width, config.vision_heads)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.mlp = _VisionMlp(width, config.vision_ffn)

    def forward(self, rows: Tensor) -> Tensor:
        rows = rows + self.self_attn(self.input_layernorm(rows))
        return rows + self.mlp(self.post_attention_layernorm(rows))


class _VisionAttention(nn.Module):
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


class _VisionMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, rows: Tensor) -> Tensor:
        # x sigmoid(c x) = silu(c x) / c, with both factors in the matrix products: one pass over memory, not three
        inner = torch.addmm(self.fc1.bias * _QUICK_GELU, rows.flatten(0, 1), self.fc1.weight.t(), alpha=_QUICK_GELU)
        outer = torch.addmm(self.fc2.bias, F.silu(inner), self.fc2.weight.t(), alpha=1 / _QUICK_GELU)
        return outer.view_as(rows)


class _Abstractor(nn.Module):
    """Vision rows `[N, 1 + patches, vision_hidden]` to decoder rows `[N, num_queries + 1, hidden]`."""

    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        self.query_embeds = nn.Parameter(torch.zeros(1, config.num_queries, config.abstractor_hidden))
        self.vit_eos = nn.Parameter(torch.zeros(1, 1, config.hidden))
        self.encoder = nn.ModuleDict(
            {"layers": nn.ModuleList(_QueryLayer(config) for _ in range(config.abstractor_layers))}
        )
        self.visual_fc = nn.Linear(config.abstractor_hidden, config.hidden)

    def forward(self, vision: Tensor, run: Run = checkpoint_layer) -> Tensor:
        queries = self.query_embeds.repeat(vision.shape[0], 1, 1)  # not expanded, which would be compiled twice
        for layer in self.encoder["layers"]:  # pyright: ignore[reportGeneralTypeIssues]
            queries = run(layer, queries, vision)
        return torch.cat([self.visual_fc(queries), self.vit_eos.expand(vision.shape[0], -1, -1)], dim=1)


class _QueryLayer(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        self.crossattention = _CrossAttention(config)

    def forward(self, queries: Tensor, vision: Tensor) -> Tensor:
        return self.crossattention(queries, vision)


class _CrossAttention(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        self.attention = _QueryAttention(config)
        self.output = _QueryOutput(config)
        self.norm1 = nn.LayerNorm(config.abstractor_hidden, eps=_ABSTRACTOR_NORM_EPS)
        self.normk = nn.LayerNorm(config.vision_hidden, eps=_ABSTRACTOR_NORM_EPS)

    def forward(self, queries: Tensor, vision: Tensor) -> Tensor:
        queries = self.norm1(queries)  # the residual stream continues from the normalised queries
        sources = torch.cat([queries, self.normk(vision)], dim=1)
        return self.output(queries, self.attention(queries, sources))


class _QueryAttention(nn.Module):
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
        self.register_buffer("q_pos_embed", _line_positions(config.num_queries, width))
        self.register_buffer("k_pos_embed", _grid_positions(config.grid, width))

    def forward(self, queries: Tensor, sources: Tensor) -> Tensor:
        query = self._split(self.query(queries + self.q_pos_embed))
        key = self._split(self.key(sources + torch.cat([self.q_pos_embed, self.k_pos_embed])))
        value = self._split(self.value(sources))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    def _split(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _QueryOutput(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width = config.abstractor_hidden
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=_ABSTRACTOR_NORM_EPS)
        self.mlp = _QueryMlp(width, config.abstractor_ffn)

    def forward(self, queries: Tensor, attended: Tensor) -> Tensor:
        queries = queries + self.out_proj(attended)
        return queries + self.mlp(self.norm2(queries))


class _QueryMlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)
        self.w3 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps=_NORM_EPS)

    def forward(self, rows: Tensor) -> Tensor:
        return self.w2(self.ffn_ln(F.silu(self.w1(rows)) * self.w3(rows)))


def _line_positions(count: int, width: int) -> Tensor:
    """Fixed `[count, width]` table: sines, then cosines, of position over falling frequencies."""
    return _sinusoids(torch.arange(count, dtype=torch.float64), width).float()


def _grid_positions(side: int, width: int) -> Tensor:
    """Fixed `[1 + side * side, width]` table: zeros for the class token; then column halves beside row halves."""
    axis = _sinusoids(torch.arange(side, dtype=torch.float64), width // 2)
    columns = axis[None, :].expand(side, side, -1)
    rows = axis[:, None].expand(side, side, -1)
    grid = torch.cat([columns, rows], dim=-1).reshape(side * side, width)
    return torch.cat([grid.new_zeros(1, width), grid]).float()


def _sinusoids(positions: Tensor, width: int) -> Tensor:
    half = width // 2
    frequencies = _SINUSOID_BASE ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


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


class _Multiway(nn.Module):
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


class _DecoderLayer(nn.Module):
    """One layer, on rows `[T, B, hidden]`: position first, so that the rows of one modality lie side by side."""

    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width, eps = config.hidden, config.rms_eps
        self.input_layernorm = _Multiway(nn.RMSNorm(width, eps), nn.RMSNorm(width, eps))
        self.self_attn = _DecoderAttention(config)
        self.post_attention_layernorm = _Multiway(nn.RMSNorm(width, eps), nn.RMSNorm(width, eps))
        self.mlp = _DecoderMlp(width, config.ffn)

    def keys_values(self, rows: Tensor, layout: Layout) -> _KeyValue:
        """What later rows need of these: keys, not yet rotated, and values, each `[T, B, kv_width]`."""
        return self.self_attn.keys_values(self.input_layernorm(rows, layout.image), layout)

    def forward(self, rows: Tensor, layout: Layout, past: _KeyValue | None = None, last_only: bool = False) -> Tensor:
        normed = self.input_layernorm(rows, layout.image)
        keys_values = self.self_attn.keys_values(normed, layout, past)
        image = layout.image
        if last_only:  # the last row is text, and nothing reads the other rows of the last layer
            rows, normed, image = rows[-1:], normed[-1:], (0, 0)
        rows = rows + self.self_attn(normed, keys_values, layout)
        return rows + self.mlp(self.post_attention_layernorm(rows, image))


class _DecoderAttention(nn.Module):
    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        width, self.head_dim = config.hidden, config.hidden // config.heads
        kv_width = config.kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = _Multiway(nn.Linear(width, kv_width, bias=False), nn.Linear(width, kv_width, bias=False))
        self.v_proj = _Multiway(nn.Linear(width, kv_width, bias=False), nn.Linear(width, kv_width, bias=False))
        self.o_proj = nn.Linear(width, width, bias=False)

    def keys_values(self, normed: Tensor, layout: Layout, past: _KeyValue | None = None) -> _KeyValue:
        batch = normed.shape[1]  # a cache holds what all images share, [P, 1, kv_width]
        keys, values = ((),) * 2 if past is None else ((old.expand(-1, batch, -1),) for old in past)
        return self.k_proj(normed, layout.image, *keys), self.v_proj(normed, layout.image, *values)

    def forward(self, normed: Tensor, keys_values: _KeyValue, layout: Layout) -> Tensor:
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


class _DecoderMlp(nn.Module):
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


class StaticForward:
    """`Owl2.forward` for batches of 1, 2, 4, ... and `batch_size` images, to which others are padded.

    On CUDA each size is captured as a graph when it is first needed, and replayed without Python between the kernels.
    All sizes share one pool of memory, which is smallest if the largest batch comes first. The capture is made here
    rather than by `torch.compile(mode="reduce-overhead")`, whose graphs cannot be replayed from a thread other than the
    one that compiled them, and trainers call rewards from thread pools:
    https://github.com/pytorch/pytorch/issues/123177

    Args:
        model: A frozen network whose weights stay where they are.
        states: The prompts to answer.
        batch_size: The largest number of images per run.
        compile_layers: Whether to compile the layers; one compilation serves all layers of a kind at one batch size.
    """

    def __init__(self, model: Owl2, states: tuple[PromptState, ...], batch_size: int, *, compile_layers: bool) -> None:
        self._network: Callable[[Tensor], Tensor] = partial(model, states=states)
        if compile_layers:
            from torch._dynamo import config  # takes a second to import

            run = torch.compile(_run, fullgraph=True, dynamic=False)
            self._network = config.patch(cache_size_limit=_MOST_COMPILATIONS)(partial(model, states=states, run=run))
        self._batch_size = batch_size
        self._lock = ProcessLock()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by batch size, each with its output
        weight, side = model.model.norm.weight, model.config.image_size
        if weight.is_cuda:
            self._input = weight.new_zeros(batch_size, 3, side, side)
            self._pool, self._done = torch.cuda.graph_pool_handle(), torch.cuda.Event()

    def __call__(self, pixels: Tensor) -> Tensor:
        """Level logits `[N, prompts, K]` of pixels `[N, 3, S, S]`, N <= batch_size."""
        count = pixels.shape[0]
        size = min(1 << (count - 1).bit_length(), self._batch_size)
        with self._lock:
            if pixels.device.type == "cuda":
                with torch.cuda.device(pixels.device):
                    return self._replay(pixels, size)[:count]
            return self._network(F.pad(pixels, (0,) * 7 + (size - count,)))[:count]

    def _replay(self, pixels: Tensor, size: int) -> Tensor:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)  # another thread's stream may still be using the buffers
        self._input[: pixels.shape[0]].copy_(pixels)  # rows behind these are those of an earlier call
        if size not in self._graphs:
            self._graphs[size] = self._capture(self._input[:size])
        graph, output = self._graphs[size]
        graph.replay()
        found = output.clone()
        self._done.record(stream)
        return found

    def _capture(self, pixels: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Not one stream for both: cuBLAS keeps a workspace for each, and that of the captured one belongs in the pool.
        warm, side, graph = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            for _ in range(_WARM_UP_RUNS):
                self._network(pixels)
        side.wait_stream(warm)
        with (
            torch.cuda.stream(side),  # which a capture that fails would not leave by itself
            torch.cuda.graph(graph, self._pool, stream=side, capture_error_mode="thread_local"),
        ):
            output = self._network(pixels)
        torch.cuda.current_stream().wait_stream(side)
        return graph, output


def _run(layer: nn.Module, *inputs: Any) -> Any:
    return layer(*inputs)
