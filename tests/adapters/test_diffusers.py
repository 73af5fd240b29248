"""Stepwise rewards in real diffusers pipelines: the predictions are right, and sampling is not disturbed."""

import diffusers
import pytest
import torch

import iqareward
from iqareward.adapters.diffusers import StepwiseRewards, decode_latents
from iqareward.rewards.metric import NoReference
from tests.adapters.tiny_pipelines import flow, img2img, prompt
from tests.diffusion.tiny import images
from tests.tolerances import OTHER_PACKAGE

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
    pooled = isinstance(pipeline, diffusers.StableDiffusion3Img2ImgPipeline)
    call = {"image": images(count), "strength": 1.0, "guidance_scale": 1.0, "num_inference_steps": STEPS}
    callback = {"output_type": "pt"} | ({} if steps is None else {"callback_on_step_end": steps})
    generator = torch.Generator().manual_seed(0)
    return pipeline(generator=generator, **prompt(count, pooled=pooled), **call, **callback, **options).images


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


def test_predictions_of_flow_matching() -> None:
    """The prediction is x - sigma v, with the sigma of the step that was made."""
    pipeline = flow(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    spy = Spy(pipeline.transformer)
    with StepwiseRewards(pipeline, JUDGE) as steps:
        run(pipeline, steps)
    sigmas = pipeline.scheduler.sigmas[:-1]
    with torch.no_grad():
        clean = [x - sigma * v for x, sigma, v in zip(spy.inputs, sigmas, spy.outputs, strict=True)]
        expected = torch.stack([JUDGE(decode_latents(pipeline, rows)) for rows in clean])
    assert expected.isfinite().all()
    torch.testing.assert_close(steps.scores, expected, **OTHER_PACKAGE)


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


@pytest.mark.filterwarnings("ignore::iqareward.rewards.scoring.UnscoredWarning")
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
    with pytest.raises(ValueError, match="no `references`"):
        StepwiseRewards(pipeline, "ssim")
    with pytest.raises(ValueError, match="every"):
        StepwiseRewards(pipeline, JUDGE, every=0)


def test_decode_latents_is_what_the_pipeline_does() -> None:
    """Scaling and shift of the autoencoder are undone as by the pipelines themselves."""
    pipeline, kept = flow(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)), []
    final = run(pipeline, lambda pipeline, index, timestep, tensors: kept.append(tensors["latents"]) or {})
    assert pipeline.vae.config.shift_factor == 0.1
    with torch.no_grad():
        torch.testing.assert_close(decode_latents(pipeline, kept[-1]), final, **OTHER_PACKAGE)


def test_decode_latents_refuses_what_it_would_get_wrong() -> None:
    """Packed latents, and an autoencoder that overflows in half precision."""
    pipeline = img2img(diffusers.DDIMScheduler(**DDIM))
    with pytest.raises(ValueError, match="Pass decode"):
        decode_latents(pipeline, torch.zeros(1, 16, 64))
    pipeline.vae.register_to_config(force_upcast=True)
    pipeline.vae.half()
    with pytest.raises(ValueError, match="force_upcast"):
        decode_latents(pipeline, torch.zeros(1, 4, 8, 8))
