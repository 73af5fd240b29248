"""Stepwise scores and the best of N candidates in tiny pipelines of every family, guided and packed."""

import itertools
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from torch import Tensor, nn

import iqareward
from iqareward.adapters.diffusers import StepwiseRewards, decode_latents, generate_best
from iqareward.rewards.metric import NoReference
from tests.adapters.tiny_pipelines import HEIGHT, KINDS, WIDTH, flux2
from tests.diffusion.policies import sd_pipelines
from tests.tolerances import EXACT, HALF_NETWORK, NETWORK_BATCH, OTHER_PACKAGE

pytestmark = pytest.mark.trainer("diffusers", "0.42.1", "run", "caller", "reader")
STEPS, ROWS = 4, 2
TRUTH = torch.rand(ROWS, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))
PSNR = iqareward.load("psnr")


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image-Edit would make every picture as large as 1024x1024."""
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (WIDTH, HEIGHT, None))


def run(pipeline, kind: str, **more: Any) -> Tensor:
    """The pipeline's images, a generator for each."""
    generators = [torch.Generator().manual_seed(row) for row in range(ROWS)]
    call = {"num_inference_steps": STEPS, "output_type": "pt"}
    dtype = pipeline.vae.dtype
    inputs = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in KINDS[kind].inputs(ROWS).items()
    }
    return pipeline(generator=generators, **inputs, **KINDS[kind].arguments, **call, **more).images


class Inputs:
    """What the network is given first: the noise, perhaps twice for guidance, perhaps with an image behind it."""

    def __init__(self, pipeline) -> None:
        self.first: Tensor | None = None
        (getattr(pipeline, "transformer", None) or pipeline.unet).register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, network, args, named) -> None:
        if self.first is None:
            self.first = (args[0] if args else named["hidden_states"])[:ROWS].clone()


def predictions(pipeline, latents: list[Tensor]) -> list[Tensor]:
    """The noise-free latents of each step, from the latents before and after it: on a straight line to them."""
    pairs, scheduler = itertools.pairwise(latents), pipeline.scheduler
    if not hasattr(scheduler, "alphas_cumprod"):
        sigmas = scheduler.sigmas
        return [
            before - sigmas[step] * (after - before) / (sigmas[step + 1] - sigmas[step])
            for step, (before, after) in enumerate(pairs)
        ]
    found, gap = [], 1000 // STEPS
    for timestep, (before, after) in zip(scheduler.timesteps.tolist(), pairs, strict=True):
        past = scheduler.alphas_cumprod[timestep - gap] if timestep >= gap else scheduler.final_alpha_cumprod
        (a, b), (c, d) = (
            (level.double().sqrt(), (1 - level.double()).sqrt()) for level in (scheduler.alphas_cumprod[timestep], past)
        )
        found.append((before * d - after * b) / (a * d - c * b))
    return [one.float() for one in found]


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_scores_what_the_model_predicts(kind) -> None:
    """Each score is that of the image which the pipeline itself decodes from where its latents were heading."""
    pipeline, kept = KINDS[kind].build(), []
    spy = Inputs(pipeline)
    with StepwiseRewards(pipeline, "psnr", references=TRUTH) as steps:

        def own(pipeline, step, timestep, tensors):
            kept.append(tensors["latents"].clone())
            return steps(pipeline, step, timestep, tensors)

        final = run(pipeline, kind, callback_on_step_end=own)
    assert final.shape == TRUTH.shape
    first = spy.first[:, : kept[0].shape[1]]
    expected = []
    for clean in predictions(pipeline, [first, *kept]):

        def replaced(pipeline, step, timestep, tensors, clean=clean):
            return {"latents": clean} if step + 1 == len(kept) else {}

        expected.append(PSNR(run(pipeline, kind, callback_on_step_end=replaced), references=TRUTH))
    assert steps.scores.unique().numel() == len(kept) * ROWS
    torch.testing.assert_close(steps.scores, torch.stack(expected), **OTHER_PACKAGE)
    torch.testing.assert_close(steps.scores[-1], PSNR(final, references=TRUTH), **OTHER_PACKAGE)
    torch.testing.assert_close(run(pipeline, kind), final, **EXACT)


@pytest.mark.parametrize("kind", ["Stable Diffusion 3", "Flux", "Flux2", "Qwen-Image"])
def test_half_precision(kind) -> None:
    """In bfloat16 the scores are those of float32 up to rounding, and the last is that of the image."""
    build = KINDS[kind].build
    both = []
    for dtype in (torch.float32, torch.bfloat16):
        pipeline = build().to(dtype) if kind == "Stable Diffusion 3" else build(dtype=dtype)
        with StepwiseRewards(pipeline, "psnr", references=TRUTH) as steps:
            final = run(pipeline, kind, callback_on_step_end=steps)
        torch.testing.assert_close(steps.scores[-1], PSNR(final.float(), references=TRUTH), **HALF_NETWORK)
        both.append(steps.scores)
    torch.testing.assert_close(*both, **HALF_NETWORK)


def test_images_per_prompt() -> None:
    """With several images for each prompt there is a score, and a reference, for each image."""
    pipeline = sd_pipelines.text_to_image()
    truth = TRUTH.repeat(2, 1, 1, 1).roll(1, 3)
    call = {"num_images_per_prompt": 2, "num_inference_steps": 2, "height": HEIGHT, "width": WIDTH}
    generators = [torch.Generator().manual_seed(row) for row in range(4)]
    with StepwiseRewards(pipeline, "psnr", references=truth) as steps:
        final = pipeline(["a", "b"], generator=generators, callback_on_step_end=steps, output_type="pt", **call).images
    assert steps.scores.shape == (2, 4)
    torch.testing.assert_close(steps.scores[-1], PSNR(final, references=truth), **OTHER_PACKAGE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_candidate_is_that_of_direct_scores(kind) -> None:
    """The image that comes back is the one of the highest direct score, whatever the batch size; a NaN never wins."""
    pipeline, seen = KINDS[kind].build(), []

    def noted(**call):
        output = pipeline(**call)
        seen.extend(output.images)
        return output

    options = {"num_candidates": 3, "num_inference_steps": 2, "show_progress": False, **KINDS[kind].arguments}
    found = generate_best(noted, "psnr", KINDS[kind].inputs(ROWS), references=TRUTH, **options)
    direct = PSNR(torch.stack(seen), references=TRUTH.repeat_interleave(3, 0)).view(ROWS, 3)
    torch.testing.assert_close(found.scores, direct, **NETWORK_BATCH)
    assert torch.equal(found.chosen, direct.argmax(1))
    for row in range(ROWS):
        assert torch.equal(found.images[row], seen[3 * row + found.chosen[row]])
    together = generate_best(noted, "psnr", KINDS[kind].inputs(ROWS), references=TRUTH, batch_size=4, **options)
    torch.testing.assert_close(together.scores, found.scores, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_an_overflow_never_wins() -> None:
    """A candidate whose pixels are not finite, as after an overflow in float16, loses against every other."""
    pipeline = KINDS["Flux"].build()

    def overflowing(**call):
        output = pipeline(**call)
        output.images[0] = torch.nan
        return output

    options = {"num_candidates": 3, "num_inference_steps": 2, "show_progress": False, **KINDS["Flux"].arguments}
    brightness = NoReference(lambda images: -images.mean((1, 2, 3)), higher_is_better=True)
    found = generate_best(overflowing, brightness, KINDS["Flux"].inputs(ROWS), batch_size=3, **options)
    assert found.scores.isnan().tolist() == [[True, False, False]] * ROWS
    assert (found.chosen > 0).all()
    assert torch.stack(found.images).isfinite().all()


def test_decoding_leaves_the_autoencoder_as_it_was() -> None:
    """An autoencoder in training goes on; one that overflows in float16 decodes in float32, as in a pipeline."""
    pipeline = sd_pipelines.text_to_image()
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = decode_latents(pipeline, latents)
    expected.sum().backward()
    assert latents.grad.abs().sum() > 0
    pipeline.vae.train().half().register_to_config(force_upcast=True)
    torch.testing.assert_close(decode_latents(pipeline, latents.detach().half()), expected.detach(), **HALF_NETWORK)
    assert pipeline.vae.dtype == torch.float16
    assert pipeline.vae.training
    assert all(weight.requires_grad for weight in pipeline.vae.parameters())


@pytest.mark.parametrize("latents", [torch.zeros(1, 16, 64), torch.zeros(1, 8, 4, 4), torch.zeros(1, 4, 1, 8, 8)])
def test_latents_that_it_cannot_decode(latents) -> None:
    """Packed latents without their height, other channels, and videos."""
    with pytest.raises(ValueError, match="Pass decode"):
        decode_latents(sd_pipelines.text_to_image(), latents)


@pytest.mark.parametrize("vae", [None, nn.Linear(1, 1)])
def test_autoencoders_that_it_does_not_know(vae) -> None:
    """A pipeline that works in pixels, and a foreign module."""
    pipeline = sd_pipelines.text_to_image()
    pipeline.vae = vae
    with pytest.raises(ValueError, match="Pass decode"):
        decode_latents(pipeline, torch.zeros(1, 4, 8, 8))


def test_packed_latents_by_hand() -> None:
    """`decode_latents` unpacks tokens whose height is given, as the pipelines do."""
    pipeline = KINDS["Flux"].build()
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    packed = diffusers.FluxPipeline._pack_latents(latents, 1, 4, 8, 12)
    torch.testing.assert_close(decode_latents(pipeline, packed, height=4), decode_latents(pipeline, latents), **EXACT)
    pipeline = flux2()
    latents = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    packed = diffusers.Flux2Pipeline._pack_latents(latents)
    torch.testing.assert_close(decode_latents(pipeline, packed, height=4), decode_latents(pipeline, latents), **EXACT)
