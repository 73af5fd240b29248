"""The samplers' steps are those of diffusers, given the same noise, and their log-densities those of torch."""

import math

import diffusers
import numpy as np
import pytest
import torch
from torch.distributions import Normal

from iqareward.diffusion import DDIM, IRSDE, FlowCPS, FlowSDE, ResShift, Transition

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # fp32, coefficients in fp64 here and in fp32 there


def normal(*shape, seed=0):
    """Seeded standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_double(scheduler):
    """The scheduler with the same alpha-bars in fp64: their differences lose 3 digits in fp32."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


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
    """Every step of many schedules leads to what DDIMScheduler.step makes of the same answer and noise."""
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing, **options}
    theirs = in_double(diffusers.DDIMScheduler(**config))
    process = DDIM.from_scheduler(diffusers.DDIMScheduler(**config))
    for num_steps in (1, 2, 3, 7, 13, 50):
        theirs.set_timesteps(num_steps)
        latents = normal(2, 3, 4, 4)
        for number, (step, time) in enumerate(zip(process.schedule(num_steps), theirs.timesteps, strict=True)):
            output, noise = normal(2, 3, 4, 4, seed=2 * number + 1), normal(2, 3, 4, 4, seed=2 * number + 2)
            transition = process.transition(output, latents, step, eta=eta)
            expected = theirs.step(output, time, latents, eta=eta, variance_noise=noise)
            latents = transition.mean + transition.std * noise
            torch.testing.assert_close(latents, expected.prev_sample, **CLOSE)
            torch.testing.assert_close(transition.clean, expected.pred_original_sample, **CLOSE)
            assert step.time == float(time)
            latents = latents.clamp(-3, 3)  # random answers make the latents grow, and rounding with them


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip_sample", [False, True])
@pytest.mark.parametrize("num_steps", [1, 4, 7, 50])
def test_ancestral_steps_are_those_of_diffusers(spacing, clip_sample, num_steps):
    """With eta = 1 a step is DDPMScheduler's own, clipping included."""
    config = {"timestep_spacing": spacing, "clip_sample": clip_sample, "prediction_type": "v_prediction"}
    theirs, process = in_double(diffusers.DDPMScheduler(**config)), DDIM(diffusers.DDPMScheduler(**config))
    theirs.set_timesteps(num_steps)
    latents = normal(2, 3, 4, 4)
    for number, (step, time) in enumerate(zip(process.schedule(num_steps), theirs.timesteps, strict=True)):
        output = normal(2, 3, 4, 4, seed=number)
        expected = theirs.step(output, time, latents, generator=torch.Generator().manual_seed(99)).prev_sample
        transition = process.transition(output, latents, step, eta=1.0)
        found = transition.mean + transition.std * normal(2, 3, 4, 4, seed=99)
        torch.testing.assert_close(found, expected, **CLOSE)
        latents = expected.float().clamp(-3, 3)


def test_spaced_ancestral_sampler_written_from_its_equations():
    """The sampler of DiffBIR, StableSR and guided-diffusion: betas of the chosen times, then the DDPM posterior."""
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="linspace",
    )
    process, num_steps = DDIM(scheduler), 10
    kept = torch.linspace(0, 999, num_steps).round().long()
    alpha_bars = (
        torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)[kept]
    )
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])
    betas = 1 - alpha_bars / before
    expected = found = process.start(normal(2, 4, 4, 4))
    expected = expected.double()
    for number, step in enumerate(process.schedule(num_steps)):
        index = num_steps - 1 - number
        output, noise = normal(2, 4, 4, 4, seed=2 * number + 1), normal(2, 4, 4, 4, seed=2 * number + 2)
        clean = (expected - (1 - alpha_bars[index]).sqrt() * output) / alpha_bars[index].sqrt()
        of_clean = betas[index] * before[index].sqrt() / (1 - alpha_bars[index])
        of_latents = (1 - before[index]) * (1 - betas[index]).sqrt() / (1 - alpha_bars[index])
        std = (betas[index] * (1 - before[index]) / (1 - alpha_bars[index])).sqrt()
        expected = of_clean * clean + of_latents * expected + std * noise
        transition = process.transition(output, found, step, eta=1.0)
        found = transition.mean + transition.std * noise
        assert step.time == kept[index]
    # The latents grow to about 20 with random answers; 4e-6 of that, and alpha-bars in fp32 here.
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


SIGMAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
EULER = {
    "linspace": {},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    "zero_snr": {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "final": {"final_sigmas_type": "sigma_min"},
}


def follow(theirs, process, num_steps, eta):
    """Run an Euler scheduler and our process on the same answers and noise, and compare scaled latents throughout."""
    theirs.set_timesteps(num_steps)
    scale = [math.sqrt(1 + sigma**2) for sigma in theirs.sigmas.tolist()]
    latents, start = theirs.init_noise_sigma * normal(2, 4, 4, 4), process.start(normal(2, 4, 4, 4))
    torch.testing.assert_close(start, latents / scale[0], **CLOSE)
    ours = start
    for number, (step, time) in enumerate(zip(process.schedule(num_steps), theirs.timesteps, strict=True)):
        output = normal(2, 4, 4, 4, seed=number)
        torch.testing.assert_close(theirs.scale_model_input(latents, time), ours, rtol=1e-4, atol=1e-4)
        latents = theirs.step(output, time, latents, generator=torch.Generator().manual_seed(99)).prev_sample
        transition = process.transition(output, ours, step, eta=eta)
        ours = transition.mean + transition.std * normal(2, 4, 4, 4, seed=99)
        assert step.time == float(time)
        # sigmas up to 4096, of which theirs take differences in fp32
        torch.testing.assert_close(ours, latents / scale[number + 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EULER)
def test_euler_schedulers_are_followed_in_scaled_latents(name):
    """With eta = 0 the samples are those of EulerDiscreteScheduler, whatever its sigmas."""
    config = SIGMAS | EULER[name]
    for num_steps in (1, 4, 7, 25):
        follow(
            diffusers.EulerDiscreteScheduler(**config), DDIM(diffusers.EulerDiscreteScheduler(**config)), num_steps, 0.0
        )


@pytest.mark.parametrize("name", ["linspace", "leading", "trailing"])
def test_euler_ancestral_is_followed_in_scaled_latents(name):
    """With eta = 1 the samples are those of EulerAncestralDiscreteScheduler."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SIGMAS, **EULER[name])
    for num_steps in (1, 4, 25):
        follow(scheduler, DDIM(diffusers.EulerAncestralDiscreteScheduler.from_config(scheduler.config)), num_steps, 1.0)


@pytest.mark.parametrize("name", [*EULER, "lu", "offset"])
@pytest.mark.parametrize("kind", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_first_order_solvers_are_followed(kind, name):
    """A UniPC or DPM-Solver++ of order 1 takes the steps that its process takes, spacing and sigmas kept."""
    config = SIGMAS | ({"use_lu_lambdas": True} if name == "lu" else EULER.get(name, {"timestep_spacing": "leading"}))
    config |= (
        {"solver_order": 1, "disable_corrector": list(range(50))} if kind.startswith("UniPC") else {"solver_order": 1}
    )
    if name == "lu" and kind.startswith("UniPC"):
        pytest.skip("UniPC has no such sigmas")
    theirs, process = getattr(diffusers, kind)(**config), DDIM.from_scheduler(getattr(diffusers, kind)(**config))
    theirs.set_timesteps(8)
    latents = normal(2, 4, 4, 4)
    for number, (step, time) in enumerate(zip(process.schedule(8), theirs.timesteps, strict=True)):
        output = normal(2, 4, 4, 4, seed=number)
        expected = theirs.step(output, time, latents).prev_sample
        latents = process.transition(output, latents, step, eta=0.0).mean
        assert step.time == float(time)
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)  # exponentials of logarithms in fp32


def test_lcm_steps_are_those_of_diffusers():
    """With eta = 1 all noise is replaced, as LCMScheduler does."""
    theirs, process = diffusers.LCMScheduler(), DDIM.from_scheduler(diffusers.LCMScheduler())
    theirs.set_timesteps(4)
    latents = normal(2, 4, 4, 4)
    for number, (step, time) in enumerate(zip(process.schedule(4), theirs.timesteps, strict=True)):
        output = normal(2, 4, 4, 4, seed=number)
        expected = theirs.step(output, time, latents, generator=torch.Generator().manual_seed(99)).prev_sample
        transition = process.transition(output, latents, step, eta=1.0)
        latents = transition.mean + transition.std * normal(2, 4, 4, 4, seed=99)
        torch.testing.assert_close(latents, expected, **CLOSE)  # their boundary condition is under 1e-7 at these times


def test_pndm_has_the_times_of_ddim():
    """The scheduler of Stable Diffusion 1 and 2 without its Runge-Kutta and multi-step corrections."""
    config = SIGMAS | {"steps_offset": 1, "set_alpha_to_one": False}
    found = DDIM.from_scheduler(diffusers.PNDMScheduler(skip_prk_steps=True, **config)).schedule(20)
    assert found == DDIM(diffusers.DDIMScheduler(**config)).schedule(20)


@pytest.mark.parametrize(
    "kind",
    ["UniPCMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "EulerDiscrete",
     "EulerAncestralDiscrete", "LMSDiscrete", "LCM", "PNDM", "DDPM", "DDIM"],
)  # fmt: skip
def test_only_schedulers_that_clip_are_clipped(kind):
    """A perfect answer keeps the range of normal latents, also if a configuration holds another class's clipping."""
    scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(diffusers.DDIMScheduler(**SIGMAS).config)
    clips = kind in ("LCM", "DDPM", "DDIM")  # whose own `clip_sample` is True in that configuration
    process = DDIM.from_scheduler(scheduler)
    clean, noise, step = normal(1, 4, 64, 64), normal(1, 4, 64, 64, seed=1), process.schedule(4)[-2]
    latents = math.sqrt(step.now) * clean + math.sqrt(1 - step.now) * noise
    found = process.transition(noise, latents, step, eta=0.0).clean
    assert clean.abs().max() > 3.6
    torch.testing.assert_close(found, clean.clamp(-1, 1) if clips else clean, rtol=1e-4, atol=1e-4)


def test_a_schedule_leaves_the_pipeline_alone():
    """The scheduler of a pipeline keeps its own timesteps."""
    for scheduler, process in [
        (diffusers.DDIMScheduler(), DDIM),
        (diffusers.EulerDiscreteScheduler(), DDIM),
        (diffusers.FlowMatchEulerDiscreteScheduler(), FlowSDE),
    ]:
        scheduler.set_timesteps(5)
        process(scheduler).schedule(3)
        assert len(scheduler.timesteps) == 5


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
    times = process.draw_times(torch.linspace(0, 0.999, 5)) % 700  # later ones amplify rounding
    latents = process.add_noise(clean, noise, times)
    torch.testing.assert_close(latents, scheduler.add_noise(clean, noise, times), **CLOSE)
    found = process.clean(process.target(clean, noise, times), latents, times)
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)


def test_flow_targets_lead_back_to_the_clean_latents():
    """The same for the straight path."""
    process = FlowSDE(diffusers.FlowMatchEulerDiscreteScheduler())
    clean, noise = normal(5, 3, 4, 4), normal(5, 3, 4, 4, seed=1)
    times = process.draw_times(torch.linspace(0, 0.999, 5))
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
