"""The samplers' steps are those of diffusers, given the same noise, and their log-densities those of torch."""

import diffusers
import pytest
import torch
from torch.distributions import Normal

from iqareward.diffusion import DDIM, FlowCPS, FlowSDE, Transition

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32, coefficients in fp64 here and in fp32 there


def normal(*shape, seed=0):
    """Seeded standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample_range": 0.7},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
    ],
    ids=["default", "offset", "scaled", "cosine"],
)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_steps_are_those_of_diffusers(prediction_type, spacing, options, eta):
    """Every step of a schedule leads to what DDIMScheduler.step makes of the same answer and noise."""
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing, **options}
    theirs = diffusers.DDIMScheduler(**config)
    theirs.set_timesteps(7)
    # Differences of alpha-bars near 1 lose 3 digits in fp32; these are the same numbers, subtracted in fp64.
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
    process = DDIM.from_scheduler(diffusers.DDPMScheduler.from_config(theirs.config))
    latents = normal(2, 3, 4, 4)
    for number, (step, time) in enumerate(zip(process.schedule(7), theirs.timesteps, strict=True)):
        output, noise = normal(2, 3, 4, 4, seed=2 * number + 1), normal(2, 3, 4, 4, seed=2 * number + 2)
        transition = process.transition(output, latents, step, eta=eta)
        expected = theirs.step(output, time, latents, eta=eta, variance_noise=noise)
        latents = transition.mean + transition.std * noise
        torch.testing.assert_close(latents, expected.prev_sample, **CLOSE)
        torch.testing.assert_close(transition.clean, expected.pred_original_sample, **CLOSE)
        assert step.time == float(time)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_zero_terminal_signal_is_sampled_as_diffusers_does(prediction_type):
    """With betas rescaled to end in pure noise, the first step, whose latents hold nothing, is theirs too."""
    config = {"prediction_type": prediction_type, "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    theirs, process = diffusers.DDIMScheduler(**config), DDIM(diffusers.DDIMScheduler(**config))
    theirs.set_timesteps(4)
    latents, output, noise = (normal(2, 3, 4, 4, seed=seed) for seed in range(3))
    step = process.schedule(4)[0]
    transition = process.transition(output, latents, step, eta=0.5)
    expected = theirs.step(output, theirs.timesteps[0], latents, eta=0.5, variance_noise=noise).prev_sample
    assert step.now < 1e-6
    torch.testing.assert_close(transition.mean + transition.std * noise, expected, **CLOSE)


def test_the_last_ddim_step_carries_no_log_probability():
    """Its standard deviation is 0, its log-probability 0 and without a gradient."""
    process = DDIM(diffusers.DDIMScheduler())
    output = normal(1, 3, 4, 4).requires_grad_()
    transition = process.transition(output, normal(1, 3, 4, 4, seed=1), process.schedule(5)[-1], eta=1.0)
    assert transition.std == 0
    assert transition.log_prob(transition.mean).tolist() == [0.0]
    assert not transition.log_prob(transition.mean).requires_grad


@pytest.mark.parametrize("process_class", [FlowSDE, FlowCPS])
@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"shift_terminal": 0.1}])
def test_flow_without_noise_is_the_euler_step_of_diffusers(process_class, options):
    """With eta = 0 both samplers follow FlowMatchEulerDiscreteScheduler."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**options)
    theirs.set_timesteps(6)
    process = process_class(diffusers.FlowMatchEulerDiscreteScheduler(**options))
    latents = normal(2, 4, 4, 4)
    for number, (step, time) in enumerate(zip(process.schedule(6), theirs.timesteps, strict=True)):
        output = normal(2, 4, 4, 4, seed=number + 1)
        expected = theirs.step(output, time, latents).prev_sample
        latents = process.transition(output, latents, step, eta=0.0).mean
        torch.testing.assert_close(latents, expected, **CLOSE)


def test_cps_with_all_noise_exchanged_is_stochastic_sampling_of_diffusers():
    """With eta = 1 the step equals `stochastic_sampling=True`, given the same noise."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    theirs.set_timesteps(6)
    process = FlowCPS(diffusers.FlowMatchEulerDiscreteScheduler())
    latents = normal(2, 4, 4, 4)
    for number, (step, time) in enumerate(zip(process.schedule(6), theirs.timesteps, strict=True)):
        output = normal(2, 4, 4, 4, seed=number + 1)
        expected = theirs.step(output, time, latents, generator=torch.Generator().manual_seed(99)).prev_sample
        transition = process.transition(output, latents, step, eta=1.0)
        latents = transition.mean + transition.std * normal(2, 4, 4, 4, seed=99)
        torch.testing.assert_close(latents, expected, **CLOSE)


def exact_velocity(latents, sigma, variance):
    """The velocity that knows clean data to be normal with this variance: E[noise - clean | latents]."""
    total = (1 - sigma) ** 2 * variance + sigma**2
    return (sigma - (1 - sigma) * variance) / total * latents


@pytest.mark.parametrize("process_class", [FlowSDE, FlowCPS])
def test_flow_noise_keeps_the_distribution(process_class):
    """Samples of a known Gaussian keep its variance with noise at every step, within Monte-Carlo error."""
    variance, num_steps, count = 0.25, 200, 20_000
    process = process_class(diffusers.FlowMatchEulerDiscreteScheduler())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 1, generator=generator)
    for step in process.schedule(num_steps):
        output = exact_velocity(latents, step.now, variance)
        # CPS exchanges a share of all noise at each step, so 200 steps of 0.1 are as much as a few of 0.7.
        transition = process.transition(output, latents, step, eta=0.7 if process_class is FlowSDE else 0.1)
        latents = transition.mean + transition.std * torch.randn(count, 1, generator=generator)
    # Sampling error of a variance: sqrt(2 / count) = 1 %; 200 Euler steps add about 1 %.
    assert latents.var().item() == pytest.approx(variance, rel=0.04)


def test_flow_grpo_step_by_hand():
    """Mean and standard deviation of one step, worked out from the published formula."""
    process = FlowSDE(diffusers.FlowMatchEulerDiscreteScheduler())
    step = process.schedule(4)[1]
    sigma, after, eta = step.now, step.then, 0.7
    strength = eta * (sigma / (1 - sigma)) ** 0.5
    x, v = 0.3, -0.8
    mean = x + (v + strength**2 / (2 * sigma) * (x + (1 - sigma) * v)) * (after - sigma)
    transition = process.transition(torch.full((1, 1), v), torch.full((1, 1), x), step, eta=eta)
    assert transition.mean.item() == pytest.approx(mean, rel=1e-6)
    assert transition.std == pytest.approx(strength * (sigma - after) ** 0.5, rel=1e-9)


def test_log_prob_is_the_mean_of_normal_densities():
    """Against torch.distributions; times the number of elements it is the joint density."""
    mean, latents = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1)
    expected = Normal(mean, 0.3).log_prob(latents).flatten(1).mean(1)
    torch.testing.assert_close(Transition(mean, 0.3, mean).log_prob(latents), expected, rtol=1e-5, atol=1e-6)


def test_kl_is_that_of_two_normals():
    """Against torch.distributions.kl_divergence; no gradient reaches the reference."""
    mean, other = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1).requires_grad_()
    expected = torch.distributions.kl_divergence(Normal(mean, 0.3), Normal(other, 0.3)).flatten(1).mean(1)
    found = Transition(mean, 0.3, mean).kl(Transition(other, 0.3, other))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    assert not found.requires_grad


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_targets_lead_back_to_the_clean_latents(prediction_type):
    """`clean(target(...), add_noise(...))` is the identity, and `add_noise` that of diffusers."""
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction_type)
    process, clean, noise = DDIM(scheduler), normal(5, 3, 4, 4), normal(5, 3, 4, 4, seed=1)
    times = process.draw_times(5, torch.Generator().manual_seed(2)) % 700  # later ones amplify rounding
    latents = process.add_noise(clean, noise, times)
    torch.testing.assert_close(latents, scheduler.add_noise(clean, noise, times), **CLOSE)
    found = process.clean(process.target(clean, noise, times), latents, times)
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)


def test_flow_targets_lead_back_to_the_clean_latents():
    """The same for the straight path."""
    process = FlowSDE(diffusers.FlowMatchEulerDiscreteScheduler())
    clean, noise = normal(5, 3, 4, 4), normal(5, 3, 4, 4, seed=1)
    times = process.draw_times(5, torch.Generator().manual_seed(2))
    latents = process.add_noise(clean, noise, times)
    torch.testing.assert_close(process.clean(process.target(clean, noise, times), latents, times), clean, **CLOSE)


def test_wrong_schedulers_are_named():
    """Thresholding, flow schedulers for DDIM and the reverse, and eta beyond its range."""
    with pytest.raises(ValueError, match="thresholding=False"):
        DDIM(diffusers.DDIMScheduler(thresholding=True))
    with pytest.raises(ValueError, match="FlowSDE or FlowCPS"):
        DDIM.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"DDIM\.from_scheduler"):
        FlowSDE(diffusers.DDIMScheduler())
    process = FlowCPS(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"eta in \[0, 1\]"):
        process.transition(torch.zeros(1, 1), torch.zeros(1, 1), process.schedule(2)[0], eta=1.5)
