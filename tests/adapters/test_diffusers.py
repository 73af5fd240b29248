"""Rewards in real diffusers pipelines: scores of every step, which disturb nothing, and the best of N candidates."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

import iqareward
from iqareward.adapters.diffusers import StepwiseRewards, decode_latents, generate_best
from iqareward.rewards.combine import FidelityFloor
from iqareward.rewards.metric import NoReference
from tests.adapters.restoration_agent import as_pil
from tests.adapters.tiny_pipelines import img2img, prompt
from tests.diffusion.tiny import images
from tests.tolerances import OTHER_PACKAGE

pytestmark = pytest.mark.trainer("diffusers", "0.42.1", "run", "caller", "reader")
STEPS = 4
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
DDIM = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False, **STABLE}


def brightness(batch: torch.Tensor) -> torch.Tensor:
    """A stand-in for a judge."""
    return batch.mean((1, 2, 3))


JUDGE = NoReference(brightness, higher_is_better=True)


class Spy:
    """Notes what the network is asked and answers, beside the scheduler's own view."""

    def __init__(self, network) -> None:
        self.inputs, self.outputs = [], []
        network.register_forward_hook(self.note, with_kwargs=True)

    def note(self, network, args, kwargs, output) -> None:
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.inputs.append(latents.clone())
        self.outputs.append(output[0].clone())


def run(pipeline, steps=None, *, count=2, **options):
    """The pipeline's pixels, from noise alone, in four steps and with a seed."""
    call = {"image": images(count), "strength": 1.0, "guidance_scale": 1.0, "num_inference_steps": STEPS}
    callback = {"output_type": "pt"} | ({} if steps is None else {"callback_on_step_end": steps})
    generator = torch.Generator().manual_seed(0)
    return pipeline(generator=generator, **prompt(count), **call, **callback, **options).images


def from_spy(pipeline, spy: Spy, prediction_type: str) -> torch.Tensor:
    """`[T, B]` scores of the predictions, by the textbook formula of each prediction type."""
    rows = []
    for latents, output, timestep in zip(spy.inputs, spy.outputs, pipeline.scheduler.timesteps, strict=True):
        alpha = pipeline.scheduler.alphas_cumprod[int(timestep)]
        clean = {
            "epsilon": (latents - (1 - alpha).sqrt() * output) / alpha.sqrt(),
            "v_prediction": alpha.sqrt() * latents - (1 - alpha).sqrt() * output,
            "sample": output,
        }[prediction_type]
        with torch.no_grad():
            rows.append(JUDGE(decode_latents(pipeline, clean)))
    return torch.stack(rows)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_predictions_of_ddim(prediction_type) -> None:
    """For every prediction type the scored images are those that the network's answers stand for."""
    pipeline = img2img(diffusers.DDIMScheduler(prediction_type=prediction_type, **DDIM))
    spy = Spy(pipeline.unet)
    with StepwiseRewards(pipeline, JUDGE) as steps:
        run(pipeline, steps)
    assert steps.scores.shape == (STEPS, 2)
    assert steps.scores.unique().numel() == 2 * STEPS
    assert steps.timesteps == pipeline.scheduler.timesteps.tolist()
    torch.testing.assert_close(steps.scores, from_spy(pipeline, spy, prediction_type), **OTHER_PACKAGE)


# UniPC of diffusers 0.42 turns a tensor into an array in a way that numpy 2 calls deprecated
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize(
    "scheduler", [diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler, diffusers.DDPMScheduler]
)
def test_predictions_of_other_schedulers(scheduler) -> None:
    """Multistep solvers store the prediction, others report it: the same formula holds."""
    options = {"clip_sample": False} if scheduler is diffusers.DDPMScheduler else {}
    pipeline = img2img(scheduler(steps_offset=1, **STABLE, **options))
    spy = Spy(pipeline.unet)
    with StepwiseRewards(pipeline, JUDGE) as steps:
        run(pipeline, steps)
    # UniPC corrects the latents before it converts the answer, so that only its first prediction is the network's
    rows = 1 if scheduler is diffusers.UniPCMultistepScheduler else STEPS
    expected = from_spy(pipeline, spy, "epsilon")
    torch.testing.assert_close(steps.scores[:rows], expected[:rows], **OTHER_PACKAGE)


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}], ids=["deterministic", "stochastic"])
def test_sampling_is_not_disturbed(options) -> None:
    """With and without the watcher the images are the same bits, also where the scheduler draws noise."""
    pipeline = img2img(diffusers.DDIMScheduler(**DDIM))
    plain = run(pipeline, **options)
    with StepwiseRewards(pipeline, JUDGE) as steps:
        watched = run(pipeline, steps, **options)
    assert torch.equal(watched, plain)
    assert "step" not in vars(pipeline.scheduler)
    assert torch.equal(run(pipeline, **options), plain)


def test_naive_wrapper_loses_eta() -> None:
    """Why `step` keeps its signature: pipelines read it, and drop eta and generator for a wrapper that hides them."""
    pipeline = img2img(diffusers.DDIMScheduler(**DDIM))
    stochastic, original = run(pipeline, eta=1.0), pipeline.scheduler.step
    pipeline.scheduler.step = lambda *args, **options: original(*args, **options)
    assert not torch.equal(run(pipeline, eta=1.0), stochastic)


def test_two_watchers_and_references() -> None:
    """Watchers nest, each with its own reward, references and rhythm; the last step is always watched."""
    pipeline = img2img(diffusers.DDIMScheduler(**DDIM))
    truth = images(2, seed=1)
    with (
        StepwiseRewards(pipeline, "psnr", references=truth) as outer,
        StepwiseRewards(pipeline, JUDGE, every=2) as inner,
    ):
        final = run(pipeline, lambda *call: outer(*call) | inner(*call))
    assert outer.scores.shape == (STEPS, 2)
    assert inner.timesteps == [outer.timesteps[index] for index in (0, 2, 3)]
    assert "step" not in vars(pipeline.scheduler)
    # the last prediction is what the pipeline returns, up to the noise that Stable Diffusion's schedule leaves in it
    torch.testing.assert_close(outer.scores[-1], iqareward.load("psnr")(final, references=truth), rtol=0.02, atol=0.2)


def test_last_call_counts() -> None:
    """A second call of the pipeline starts a new table."""
    pipeline = img2img(diffusers.DDIMScheduler(**DDIM))
    with StepwiseRewards(pipeline, JUDGE) as steps:
        run(pipeline, steps)
        first = steps.scores
        run(pipeline, steps, count=3)
    assert first.shape == (STEPS, 2)
    assert steps.scores.shape == (STEPS, 3)


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_what_cannot_be_scored_is_nan() -> None:
    """An image too small for the reward is NaN in the table, and sampling goes on."""
    pipeline = img2img(diffusers.DDIMScheduler(**DDIM))
    with StepwiseRewards(pipeline, "niqe") as steps:
        run(pipeline, steps)
    assert steps.scores.isnan().all()


def test_own_decoder() -> None:
    """`decode` takes the place of the autoencoder, for packed latents and for pixels."""
    pipeline = img2img(diffusers.DDIMScheduler(**DDIM))

    def first_channels(pipeline, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :3].sigmoid()

    spy = Spy(pipeline.unet)
    with StepwiseRewards(pipeline, JUDGE, decode=first_channels) as steps:
        run(pipeline, steps)
    alpha = pipeline.scheduler.alphas_cumprod[int(steps.timesteps[0])]
    clean = (spy.inputs[0] - (1 - alpha).sqrt() * spy.outputs[0]) / alpha.sqrt()
    torch.testing.assert_close(steps.scores[0], brightness(first_channels(pipeline, clean)), **OTHER_PACKAGE)


def test_mistakes_are_explained() -> None:
    """A scheduler without predictions, a callback without its block, and a block without its callback."""
    pipeline = img2img(diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True, **STABLE))
    with pytest.raises(ValueError, match="PNDMScheduler"), StepwiseRewards(pipeline, JUDGE) as steps:
        run(pipeline, steps)
    assert "step" not in vars(pipeline.scheduler)
    pipeline = img2img(diffusers.DDIMScheduler(**DDIM))
    with pytest.raises(RuntimeError, match="with StepwiseRewards"):
        run(pipeline, StepwiseRewards(pipeline, JUDGE))
    with StepwiseRewards(pipeline, JUDGE) as steps:
        run(pipeline)
    with pytest.raises(RuntimeError, match="callback_on_step_end=steps"):
        _ = steps.scores
    with pytest.raises(ValueError, match="needs `references`, and has none"):
        StepwiseRewards(pipeline, "ssim")
    with pytest.raises(ValueError, match="every"):
        StepwiseRewards(pipeline, JUDGE, every=0)


CLEAN = images(3, seed=1)


def restore(image, generator, output_type, strength=0.5, **more) -> SimpleNamespace:
    """Stands for a pipeline: noise of each row's generator, mixed into the image."""
    assert output_type == "pt"
    assert len(generator) == len(image)
    pixels = iqareward.to_images(image, value_range=(0, 1))
    noise = torch.stack([torch.rand(row.shape, generator=g) for row, g in zip(pixels, generator, strict=True)])
    return SimpleNamespace(images=(1 - strength) * pixels + strength * noise)


def best(pipeline=restore, reward=JUDGE, inputs=None, **options):
    """Four candidates of each of three inputs."""
    inputs = {"image": images(3)} if inputs is None else inputs
    return generate_best(pipeline, reward, inputs, **{"num_candidates": 4, "show_progress": False} | options)


def test_candidates_have_seeds_of_their_own() -> None:
    """More candidates leave the first ones as they are; another seed changes all of them."""
    four, two, other = best(), best(num_candidates=2), best(seed=1)
    assert torch.equal(four.scores[:, :2], two.scores)
    assert not torch.isclose(four.scores, other.scores).any()
    assert torch.equal(best().scores, four.scores)


def test_unscored_candidates_never_win() -> None:
    """A NaN loses against any number; where all are NaN nothing is chosen, and the first candidate comes back."""

    class Fussy:
        name, needs_references, needs_prompts, differentiable, bounds = "fussy", False, False, False, (None, None)
        calls = 0

        def __call__(self, batch, references=None, prompts=None, **ignored) -> Tensor:
            scores = -brightness(torch.stack(list(batch)))
            keep = [(self.calls + row) % 4 in (1, 2) and self.calls + row < 8 for row in range(len(batch))]
            self.calls += len(batch)
            return torch.where(torch.tensor(keep), scores, torch.nan)

    found = best(reward=Fussy(), batch_size=3)
    assert found.scores.isnan().tolist() == [[True, False, False, True]] * 2 + [[True] * 4]
    expected = [1 + int(row.argmax()) for row in found.scores[:2, 1:3]]
    assert found.chosen.tolist() == [*expected, -1]
    first = best(num_candidates=1)
    assert torch.equal(found.images[2], first.images[2])


def test_inputs_of_different_sizes_never_share_a_batch() -> None:
    """Batches are as large as they may be within one size, and each image keeps its own."""
    seen = []

    def watched(image: list[Image.Image], **call) -> SimpleNamespace:
        seen.append([one.size for one in image])
        return restore(image, **call)

    photographs = images(3)
    pictures = [as_pil(photographs[0]), as_pil(photographs[1]), as_pil(photographs[2, :, :8])]
    found = best(watched, inputs={"image": pictures}, batch_size=5)
    assert [len(sizes) for sizes in seen] == [5, 3, 4]
    assert all(len(set(sizes)) == 1 for sizes in seen)
    assert [tuple(image.shape) for image in found.images] == [(3, 16, 16), (3, 16, 16), (3, 8, 16)]
    torch.testing.assert_close(JUDGE(found.images), found.scores.amax(1))


def test_references_and_prompts_follow_their_input() -> None:
    """Every candidate is compared with the ground truth of its own input."""
    found = best(reward="psnr", references=CLEAN, batch_size=5)
    torch.testing.assert_close(found.scores.amax(1), iqareward.load("psnr")(found.images, references=list(CLEAN)))
    guarded = FidelityFloor(JUDGE, iqareward.load("psnr"), floor=5.0, low=0.0)
    assert best(reward=guarded, references=CLEAN).scores.shape == (3, 4)

    class Longest:
        name, needs_references, needs_prompts, differentiable, bounds = "longest", False, True, False, (0.0, None)

        def __call__(self, batch, references=None, prompts=(), **ignored) -> Tensor:
            return torch.tensor([float(len(text)) for text in prompts])

    texts = {"image": images(3), "prompt": ["a", "bb", "ccc"]}
    assert best(reward=Longest(), inputs=texts, batch_size=5).scores[:, 0].tolist() == [1.0, 2.0, 3.0]


def test_progress_is_shown_on_request(capsys) -> None:
    """The bar is on the error stream, and absent if not wanted."""
    best(show_progress=True)
    shown = capsys.readouterr()
    assert "candidates" in shown.err
    assert shown.out == ""
    best()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": {"image": images(3), "prompt": ["one"]}}, "as many values for every input"),
        ({"inputs": {"image": images(3), "prompt": "one for all"}}, "as many values for every input"),
        ({"inputs": {"image": images(3)}, "references": CLEAN[:2]}, "as many values for every input"),
        ({"inputs": {"image": []}}, "as many values for every input"),
        ({"inputs": {}}, "as many values for every input"),
        ({"num_candidates": 0}, "num_candidates and batch_size"),
        ({"batch_size": 0}, "num_candidates and batch_size"),
        ({"reward": "ssim"}, "needs `references`, and has none"),
        ({"pipeline": lambda **call: SimpleNamespace(images=torch.zeros(2, 3, 8, 8))}, "one image per row"),
    ],
)
def test_candidates_that_cannot_be_made(options, message) -> None:
    """What does not fit together is named before, or at, the first call."""
    with pytest.raises(ValueError, match=message):
        best(**options)
