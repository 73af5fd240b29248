"""The published protocol of rating models: the model writes its answer, and the number is parsed from the text."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from iqareward.rewards.batches import shape_buckets
from iqareward.rewards.mllm.vlm.chat import Prompt, render, tokenize
from iqareward.rewards.mllm.vlm.network import Network
from iqareward.rewards.mllm.vlm.presets import RatingPreset, Sampling
from iqareward.rewards.mllm.vlm.ratings import parse_rating
from iqareward.rewards.mllm.vlm.scorer import VLMScorer
from iqareward.rewards.scoring import sanitize
from iqareward.types import Images


class Answers(NamedTuple):
    """What a model wrote about each image.

    Attributes:
        ratings: `[B]` float32 on the images' device, on the preset's scale; NaN where none could be parsed.
        texts: as written, to look at; empty for an image that cannot be scored.
    """

    ratings: Tensor
    texts: list[str]


def generate_answers(
    scorer: VLMScorer, images: Images, preset: RatingPreset, question: str, seed: int | None
) -> Answers:
    """Let the model answer, image batch by image batch.

    Args:
        scorer: with the model.
        images: `[B, 3, H, W]` in [0, 1], or a sequence of `[3, H, W]`.
        preset: prompts, sampling and ratings.
        question: with or without the request to think.
        seed: None = greedy.
    """
    buckets, order = shape_buckets(scorer.name, images, None)
    device = images.device if isinstance(images, Tensor) else (buckets[0][0].device if buckets else None)
    texts: list[str] = []
    if buckets:
        network = scorer.asked(buckets[0][0]).network
        text = render(network.processor, preset, question)
        prompt = tokenize(network.processor, text, network.family.around)
        for (bucket,) in buckets:
            for piece in bucket.split(scorer.rows_at_once(bucket, network.device)):
                clean, valid = sanitize(piece.to(network.device))
                written = _write(network, clean, prompt, preset.sampling, seed)
                texts += [text if intact else "" for text, intact in zip(written, valid.tolist(), strict=True)]
    if order is not None:
        texts = [texts[i] for i in order]
    ratings = [parse_rating(text, preset.answer_pattern, preset.ratings) for text in texts]
    return Answers(torch.tensor(ratings, dtype=torch.float32, device=device), texts)


def _write(network: Network, images: Tensor, prompt: Prompt, sampling: Sampling, seed: int | None) -> list[str]:
    """What the model writes about a clean batch of one size; empty texts if it takes no image of that size."""
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
