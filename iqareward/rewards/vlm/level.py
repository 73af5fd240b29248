"""Rewards read from level words: how good any vision-language model finds an image, in one forward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from iqareward.rewards.readout import LevelDistribution, expected_value, level_distribution, token_logits
from iqareward.rewards.scoring import reward_mode
from iqareward.rewards.vlm.chat import next_ids, render, tokenize
from iqareward.rewards.vlm.network import Features, Network
from iqareward.rewards.vlm.presets import ZERO_SHOT_LEVELS, LevelPreset
from iqareward.rewards.vlm.scorer import Source, VLMReward
from iqareward.types import Bounds, Images

Scale = Literal["unit", "mos"]


@dataclass(frozen=True)
class LevelReadout:
    """Logits of the level words, and the mass of all of them, at the end of the prompt."""

    preset: LevelPreset

    @property
    def width(self) -> int:
        """Levels, and one more column for their mass."""
        return len(self.preset.levels) + 1

    def prepare(self, network: Network) -> Callable[[Features], Tensor]:
        """Render the prompt, and find the level words in the model's vocabulary."""
        preset, processor = self.preset, network.processor
        text = render(processor, preset, preset.question, preset.stem)
        prompt = tokenize(processor, text, network.family.around)
        ids = torch.tensor(next_ids(processor, text, preset.levels), device=network.device)

        def read(features: Features) -> Tensor:
            logits, mass = token_logits(network.logits(features, prompt), ids)
            return torch.cat([logits, mass[:, None]], dim=1)

        return read


@final
class LevelReward(VLMReward):
    """How good a vision-language model finds each image: its expected level, such as between "bad" and "excellent".

    One forward pass, no sampling and no parsing: the same image always gets the same score. Images are rounded to 8
    bits and resized as Pillow does it, on their device, because that is what these models were trained on. Needs the
    extra `vlm`. The weights are loaded at the first call.

    Args:
        model: hub id or folder of a Qwen2.5-VL, Qwen3-VL, Qwen3.5, LLaVA-OneVision or InternVL (`-hf`) checkpoint, or
            a pair (model, processor), whose model is frozen.
        preset: what is asked, and the words that may answer.
        scale: `"unit"` is [0, 1]; `"mos"` is [1, 5], as human ratings are reported.
        device: None = the GPU of the first images, else the current CUDA device if there is one, else the CPU.
        dtype: None = bfloat16 on CUDA, float32 on the CPU.
        differentiable: keep the graph to the pixels at their original size. Layers of a model that is loaded here are
            recomputed in the backward pass.
        batch_size: images per run of the network; images of different sizes never share one.
        name: of the reward, as key of components and in logs.

    Raises:
        ImportError: at the first call, if transformers is not installed.
        ValueError: at the first call, if the model's family is not supported or a level word is not one token.

    Example:
        >>> reward = LevelReward("Qwen/Qwen3-VL-2B-Instruct", scale="mos")  # nothing is loaded yet
        >>> reward.bounds
        (1.0, 5.0)

    References:
        Wu et al., "Q-Align: Teaching LMMs for Visual Scoring via Discrete Text-Defined Levels", 2024,
        https://arxiv.org/abs/2312.17090
    """

    _SPANS: ClassVar[dict[str, tuple[float, float]]] = {"unit": (0.0, 1.0), "mos": (1.0, 5.0)}

    def __init__(
        self,
        model: Source,
        preset: LevelPreset = ZERO_SHOT_LEVELS,
        scale: Scale = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
        batch_size: int = 8,
        *,
        name: str = "level",
    ) -> None:
        if scale not in self._SPANS:
            raise ValueError(f'{name} expected `scale` "unit" or "mos", got {scale!r}.')
        self.preset, self.scale = preset, scale
        low, high = self._SPANS[scale]
        self._worth = tuple(low + (high - low) * worth for worth in preset.worth)
        self.bounds: Bounds = (min(self._worth), max(self._worth))
        super().__init__(
            name,
            model,
            LevelReadout(preset),
            device=device,
            dtype=dtype,
            differentiable=differentiable,
            batch_size=batch_size,
        )

    @property
    def prompt(self) -> str:
        """What the model continues, one placeholder for the image; loads the model if need be."""
        processor = self._judge.processor
        return render(processor, self.preset, self.preset.question, self.preset.stem)

    def score_batch(self, images: Tensor) -> Tensor:
        """The expected level of each image."""
        return expected_value(self._read(images)[:, :-1], self._worth)

    def logits(self, images: Images) -> Tensor:
        """Logits of the level words, in the order of the preset: `[B, levels]` float32."""
        with reward_mode(differentiable=self.differentiable):
            return self._numbers(images)[:, :-1]

    def mass(self, images: Images) -> Tensor:
        """Probability that the model would go on with any of the level words: `[B]` float32.

        Near 1 for a model that was trained on these words. A small mass says that the model wanted to say something
        else, so that the score is read from an accident.
        """
        with reward_mode(differentiable=self.differentiable):
            return self._numbers(images)[:, -1]

    def distribution(self, images: Images) -> LevelDistribution:
        """Level probabilities of each image, and the mean and standard deviation in levels of [1, 5]."""
        with reward_mode(differentiable=self.differentiable):
            return level_distribution(self.logits(images), [1 + 4 * worth for worth in self.preset.worth])
