"""The pixel policy is the sampling loop of diffusers, also for enlarged images."""

import copy

import diffusers
import pytest
import torch
from torch.testing import assert_close

from iqareward.diffusion import DDIM, IRSDE, Batch, Noise, PixelPolicy, ResShift, build_restorer, rollout
from tests.diffusion.tiny import SIZE, images, pixel_policy, unet


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@torch.no_grad()
def test_a_rollout_is_the_sampling_loop_of_diffusers(eta, prediction_type) -> None:
    """Network and `DDIMScheduler.step` in a loop, given the noise of the rollout, end in the same images."""
    policy, batch = pixel_policy(prediction_type), Batch((5, 7), images(2))
    noise = Noise(batch.ids, seed=7)
    condition = policy.condition(batch, noise)
    trajectory = rollout(policy, condition, noise, num_steps=4, eta=eta)
    scheduler, latents = copy.deepcopy(policy.process.scheduler), noise("start", (3, SIZE, SIZE))
    scheduler.set_timesteps(4)
    for number, time in enumerate(scheduler.timesteps):
        output = policy.model(torch.cat([latents, 2 * batch.degraded - 1], 1), time).sample
        fresh = noise(number, (3, SIZE, SIZE))
        latents = scheduler.step(output, time, latents, eta=eta, variance_noise=fresh).prev_sample
    assert_close(trajectory.sample, latents, atol=1e-4, rtol=1e-4)
    assert_close(policy.decode(trajectory.sample, condition), (latents + 1) / 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_sft_loss_is_the_denoising_error(prediction_type) -> None:
    """For each prediction type: mean squared error to noise, v or the clean image, written out here."""
    policy, noise = pixel_policy(prediction_type), Noise((0, 1, 2))
    references, degraded = images(3), images(3, seed=1)
    condition, scheduler = policy.condition(Batch(noise.ids, degraded), noise), policy.process.scheduler
    times = policy.process.draw_times(noise.uniform("times"))
    fresh, clean = noise("noise", (3, SIZE, SIZE)), 2 * references - 1
    latents = scheduler.add_noise(clean, fresh, times)
    output = policy.model(torch.cat([latents, 2 * degraded - 1], 1), times).sample
    targets = {"epsilon": fresh, "v_prediction": scheduler.get_velocity(clean, fresh, times), "sample": clean}
    expected = (output - targets[prediction_type]).square().flatten(1).mean(1)
    assert_close(policy.sft_loss(references, condition, noise), expected, atol=1e-6, rtol=1e-5)


def test_restored_images_can_be_larger() -> None:
    """With `scale` the network sees the enlarged degraded image, and all images have its size."""
    policy = PixelPolicy(unet(), DDIM(diffusers.DDIMScheduler(clip_sample=False)), scale=2)
    batch, noise = Batch((0, 1), images(2)), Noise((0, 1))
    condition = policy.condition(batch, noise)
    with torch.no_grad():
        restored = policy.decode(rollout(policy, condition, noise, num_steps=2).sample, condition)
    assert restored.shape == (2, 3, 2 * SIZE, 2 * SIZE)
    references = torch.nn.functional.interpolate(batch.degraded, scale_factor=2)
    assert policy.sft_loss(references, condition, noise).shape == (2,)
    assert_close(policy.reconstruct(references, condition), references, atol=1e-6, rtol=0)


def test_a_residual_network_begins_with_the_degraded_image() -> None:
    """What a network that answers zero restores is the degraded image; only for those that predict the sample."""
    policy = build_restorer((8, 16))
    with torch.no_grad():
        for weight in policy.model.conv_out.parameters():
            weight.zero_()
        batch, noise = Batch((0,), images(1)), Noise((0,))
        condition = policy.condition(batch, noise)
        restored = policy.decode(rollout(policy, condition, noise, num_steps=2).sample, condition)
    assert_close(restored, batch.degraded, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        PixelPolicy(unet(), DDIM(diffusers.DDIMScheduler()), residual=True)


@pytest.mark.parametrize("process", [ResShift(steps=4), IRSDE(steps=4)], ids=["resshift", "irsde"])
def test_other_processes_end_in_the_degraded_image(process) -> None:
    """Processes with an anchor start at the degraded image with noise, and train."""
    policy, batch, noise = PixelPolicy(unet(), process), Batch((0, 1), images(2)), Noise((0, 1))
    condition = policy.condition(batch, noise)
    start = policy.start(condition, noise)
    expected = process.start(noise("start", (3, SIZE, SIZE)), anchor=2 * batch.degraded - 1)
    assert_close(start, expected, atol=0, rtol=0)
    with torch.no_grad():
        sample = rollout(policy, condition, noise, num_steps=4, eta=1.0).sample
    assert policy.decode(sample, condition).isfinite().all()
    loss = policy.sft_loss(batch.degraded.flip(-1), condition, noise)
    loss.sum().backward()
    assert loss.isfinite().all()


def test_every_part_moves() -> None:
    """After `to`, a step runs on the other device."""
    policy = pixel_policy().to("meta")
    latents = torch.zeros(1, 3, SIZE, SIZE, device="meta")
    step = policy.schedule({}, 2)[0]
    assert policy.step(latents, step, {"latents": latents}, eta=0.0).mean.device.type == "meta"
