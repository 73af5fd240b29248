"""The published protocol of rating models: the model writes its answer, and the number is parsed from the text."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from iqareward.rewards.vlm.chat import Prompt
from iqareward.rewards.vlm.network import Network
from iqareward.rewards.vlm.presets import Sampling


class Answers(NamedTuple):
    """What a model wrote about each image.

    Attributes:
        ratings: `[B]` float32 on the images' device, on the preset's scale; NaN where none could be parsed.
        texts: as written, to look at; empty for an image that cannot be scored.
    """

    ratings: Tensor
    texts: list[str]


def write(network: Network, images: Tensor, prompt: Prompt, sampling: Sampling, seed: int | None) -> list[str]:
    """What the model writes about a clean batch of one size; empty texts if it takes no image of that size.

    Args:
        network: the model.
        images: float32 `[b, 3, H, W]` in [0, 1].
        prompt: what it answers.
        sampling: how published scores were sampled.
        seed: None = greedy.
    """
    from transformers import GenerationConfig

    inputs = network.family.images(images)
    if inputs is None:
        return [""] * images.shape[0]
    features = network.features(images[:1])  # to know how many tokens an image has; `generate` makes its own
    assert features is not None
    layout = network.layout(prompt, features.tokens.shape[1], features.grid, None)
    ids = layout.ids.expand(images.shape[0], -1)
    kinds = {"mm_token_type_ids": (ids == network.processor.image_token_id).int()} if inputs.grid else {}
    tokenizer = network.processor.tokenizer
    options = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    with network.writing:
        found = network.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=options,
            logits_processor=[] if seed is None else _sampler(sampling, seed),
            **inputs.keywords | {"pixel_values": inputs.keywords["pixel_values"].to(network.model.dtype)},
            **kinds,
        )
    return tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)


def _sampler(sampling: Sampling, seed: int) -> list[Any]:
    """Sampling as a change of the logits, after which the largest is a fair draw.

    The noise depends on the seed and the step alone, not on a generator that threads share or on the row: an image's
    answer is the same alone and in any batch.
    """
    from transformers.generation import logits_process as warpers

    shaped: list[Any] = []
    if sampling.temperature != 1:
        shaped.append(warpers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        shaped.append(warpers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        shaped.append(warpers.TopPLogitsWarper(sampling.top_p))
    return [*shaped, _Gumbel(seed)]


class _Gumbel:
    """Adds Gumbel noise, the same to every row: the argmax is then a draw from the softmax."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.rand(scores.shape[-1], generator=self._generator, dtype=torch.float64)
        noise = -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()
        return scores + noise.to(scores)
