"""mPLUG-Owl2 for reading out level words: pixels to image rows, image rows to the logits of a few vocabulary ids."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from iqareward.rewards.owl2.abstractor import Abstractor
from iqareward.rewards.owl2.config import Owl2Config
from iqareward.rewards.owl2.decoder import DecoderLayer, KeyValue, Layout, RmsNorm
from iqareward.rewards.owl2.vision import VisionTower
from iqareward.rewards.recompute import RunLayer, run_layer


class PromptState(NamedTuple):
    """A prompt made ready on the model's device: what all images share."""

    past: tuple[KeyValue, ...]  # per layer, keys and values [P, 1, kv_width] of the text before the image
    suffix: Tensor  # [S, hidden] embeddings of the text after the image
    head: Tensor  # [K, hidden] float32 rows of the language-model head for the ids to read out


class Owl2(nn.Module):
    """The network under its published parameter names: `load_state_dict` takes a published checkpoint's 862 tensors.

    Args:
        config: sizes.

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

    def encode_images(self, pixels: Tensor, run: RunLayer = run_layer) -> Tensor:
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
        past: list[KeyValue] = []
        layers: Any = self.model.layers
        for layer in layers:
            past.append(layer.keys_values(rows, layout))
            rows = layer(rows, layout)
        head = self.lm_head.weight[torch.tensor(level_ids, dtype=torch.long, device=device)]
        head = head if head.dtype == torch.float64 else head.float()
        return PromptState(tuple(past), embed(torch.tensor(suffix, dtype=torch.long, device=device)), head)

    def level_logits(self, image_rows: Tensor, state: PromptState, run: RunLayer = run_layer) -> Tensor:
        """Logits of the level ids after the prompt around `image_rows` `[B, rows, hidden]`: `[B, K]`, float32."""
        batch, count = image_rows.shape[:2]
        rows = torch.cat([image_rows.transpose(0, 1), state.suffix[:, None].expand(-1, batch, -1)])
        layout = Layout.build(self.config, rows, image=(0, count), past=state.past[0][0].shape[0])
        *layers, last = self.model.layers
        for layer, past in zip(layers, state.past, strict=False):
            rows = run(layer, rows, layout, past)
        rows = run_layer(last, rows, layout, state.past[-1], True)
        return self.model.norm(rows[-1]).to(state.head.dtype) @ state.head.mT

    def forward(self, pixels: Tensor, states: tuple[PromptState, ...], run: RunLayer = run_layer) -> Tensor:
        """Level logits `[N, prompts, K]` of preprocessed pixels `[N, 3, S, S]`; the prompts share the vision tower."""
        image_rows = self.encode_images(pixels, run)
        return torch.stack([self.level_logits(image_rows, state, run) for state in states], dim=1)


class _Trunk(nn.Module):
    """Everything but the head, as the published names have it."""

    def __init__(self, config: Owl2Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = RmsNorm(config.hidden, config.rms_eps)
        self.vision_model = VisionTower(config)
        self.visual_abstractor = Abstractor(config)
