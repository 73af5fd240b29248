"""HPSv3: a vision-language model of transformers with a head of its own for how much people like an image."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor

from iqareward.rewards.combine import LogisticMap
from iqareward.rewards.core import reward_mode
from iqareward.rewards.options import name_with
from iqareward.rewards.vlm.inputs import Prompt, render, tokenize
from iqareward.rewards.vlm.network import Features, Network
from iqareward.rewards.vlm.presets import HPSV3_BASE, HPSV3_MODEL, HPSV3_QUESTION, HPSV3_TOKEN
from iqareward.rewards.vlm.rewards import Model, VLMReward, default_dtype
from iqareward.types import Bounds, Images

# Mean and standard deviation of HPSv3's scores of eleven generators, from Stable Diffusion 2 (-0.24) to Kolors
# (10.55): the benchmark in the README of https://github.com/MizzenAI/HPSv3. Not fitted here.
_HPSV3_MAP = LogisticMap(center=8.3, scale=3.1)


class HPSv3Reading(NamedTuple):
    """What HPSv3 gives an image: a normal distribution of how much people like it.

    Attributes:
        mu: `[B]` its mean, which is the published score.
        sigma: `[B]` its standard deviation.
    """

    mu: Tensor
    sigma: Tensor


@final
class HPSv3Reward(VLMReward):
    """HPSv3: how much people would prefer an image made from this prompt, by Qwen2-VL-7B trained on pairs.

    Published scores have no bounds: the authors' benchmark gives generators -0.24 to 10.55 on average. By default a
    score is mapped to [0, 1] by a logistic function with the mean (8.3) and the standard deviation (3.1) of that
    benchmark, so that it can be combined with other rewards. The prompt and the preprocessing are the authors'. Needs
    prompts and the extra `vlm`. The weights are loaded at the first call.

    Args:
        scale: `"unit"` is [0, 1]; `"raw"` is the published score.
        device: None = the GPU of the first images, else the current CUDA device if there is one, else the CPU.
        dtype: None = bfloat16 on CUDA, float32 on the CPU. The head computes in float32.
        differentiable: Keep the graph to the pixels at their original size. Layers are recomputed in the backward pass.
        batch_size: Images per run of the network; images of different sizes never share one.
        weights: The published weights; a hub id or folder that holds `HPSv3.safetensors`, or a file in its layout.
        base: Folder or hub id of Qwen2-VL-7B-Instruct, of which configuration and processor are read; None = they are
            beside the weights.

    Raises:
        ImportError: at the first call, if transformers is not installed.
        ValueError: at the first call, if the weights are not those of HPSv3; or if a prompt holds a token that marks
            the image or the score.

    Example:
        >>> reward = HPSv3Reward()  # nothing is loaded yet
        >>> reward.bounds, reward.needs_prompts, HPSv3Reward(scale="raw").bounds
        ((0.0, 1.0), True, (None, None))

    References:
        Ma et al., "HPSv3: Towards Wide-Spectrum Human Preference Score", 2025, https://arxiv.org/abs/2508.03789
    """

    needs_prompts = True
    _scales = ("unit", "raw")

    def __init__(
        self,
        scale: Literal["unit", "raw"] = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
        batch_size: int = 8,
        *,
        weights: str | Path = HPSV3_MODEL,
        base: str | Path | None = HPSV3_BASE,
    ) -> None:
        build = partial(_load_hpsv3, "hpsv3", weights, base, dtype, differentiable)
        name = name_with(self, "hpsv3", scale=scale, weights=weights, base=base, dtype=dtype)
        super().__init__(name, weights, 2, scale, device, dtype, differentiable, batch_size, build)
        self.bounds: Bounds = (0.0, 1.0) if scale == "unit" else (None, None)

    @property
    def prompt(self) -> str:
        """What the model reads, with one placeholder for the image and `{text_prompt}` for the prompt."""
        return render(self._pair.processor, None, HPSV3_QUESTION)

    def score_batch(self, images: Tensor, *, prompts: Sequence[str]) -> Tensor:
        mu = self._read(images, prompts=prompts)[:, 0]
        return mu if self.scale == "raw" else _HPSV3_MAP(mu)

    def reading(self, images: Images, prompts: Sequence[str]) -> HPSv3Reading:
        """The published score of each image, on its own scale, and how sure the model is of it."""
        with reward_mode(differentiable=self.differentiable):
            mu, log_sigma = self._numbers(images, prompts).unbind(1)
            return HPSv3Reading(mu, log_sigma.exp())

    def _prepare(self, network: Network) -> Callable[..., Tensor]:
        processor, head = network.processor, self._pair.head
        assert head is not None
        marks = (processor.image_token, HPSV3_TOKEN)
        end: int = processor.tokenizer.convert_tokens_to_ids(HPSV3_TOKEN)

        @lru_cache(1024)  # rollouts of one input share their prompt
        def of(text: str) -> Prompt:
            if found := [mark for mark in marks if mark in text]:
                raise ValueError(f"hpsv3 expected prompts without {found[0]}, got {text!r}.")
            rendered = render(processor, None, HPSV3_QUESTION.replace("{text_prompt}", text))
            before, after = tokenize(processor, rendered, network.family.around)
            return Prompt(before, after[: after.index(end) + 1])  # the model looks back only: what follows is not seen

        def read(features: Features, prompts: Sequence[str]) -> Tensor:
            return head(network.ends(features, [of(text) for text in prompts]).float())

        return read


def _load_hpsv3(
    name: str,
    weights: str | Path,
    base: str | Path | None,
    dtype: torch.dtype | None,
    differentiable: bool,
    device: Any,
) -> Model:
    from iqareward.rewards.vlm.checkpoints import load_hpsv3

    dtype = dtype or default_dtype(device)
    return Model(*load_hpsv3(name, weights, base, device=device, dtype=dtype, checkpointing=differentiable))
