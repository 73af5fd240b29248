"""The samplers' steps are those of diffusers, given the same noise, and their log-densities those of torch."""

import math

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    # their latents are as large as sigma (4096 with zero terminal signal), in fp32
    close = {"rtol": 1e-4, "atol": max(1e-4, scale[0] * 2**-22)}
    latents, start = theirs.init_noise_sigma * normal(2, 4, 4, 4), process.start(normal(2, 4, 4, 4))
    torch.testing.assert_close(start, latents / scale[0], **CLOSE)
    ours = start
    for number, (step, time) in enumerate(zip(process.schedule(num_steps), theirs.timesteps, strict=True)):
        output = normal(2, 4, 4, 4, seed=number)
        torch.testing.assert_close(theirs.scale_model_input(latents, time), ours, **close)
        latents = theirs.step(output, time, latents, generator=torch.Generator().manual_seed(99)).prev_sample
        transition = process.transition(output, ours, step, eta=eta)
        ours = transition.mean + transition.std * normal(2, 4, 4, 4, seed=99)
        assert step.time == float(time)
        torch.testing.assert_close(ours, latents / scale[number + 1], **close)


@pytest.mark.parametrize("name", EULER)
def test_euler_schedulers_are_followed_in_scaled_latents(name):
    """With eta = 0 the samples are those of EulerDiscreteScheduler, whatever its sigmas."""
    config = SIGMAS | EULER[name]
    for num_steps in (2, 4, 7, 25):
        follow(
            diffusers.EulerDiscreteScheduler(**config), DDIM(diffusers.EulerDiscreteScheduler(**config)), num_steps, 0.0
        )


@pytest.mark.parametrize("name", ["linspace", "leading", "trailing"])
def test_euler_ancestral_is_followed_in_scaled_latents(name):
    """With eta = 1 the samples are those of EulerAncestralDiscreteScheduler."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**SIGMAS, **EULER[name])
    for num_steps in (2, 4, 25):
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
    scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(
        diffusers.DDIMScheduler(**SIGMAS, clip_sample=True).config
    )
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


def shift_of(tokens, config):
    """`calculate_shift` of the Flux and Qwen pipelines."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return tokens * slope + config.base_shift - slope * config.base_image_seq_len


QWEN = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}


@pytest.mark.parametrize("process_class", [FlowSDE, FlowCPS])
@pytest.mark.parametrize("options", [{}, QWEN], ids=["flux", "qwen"])
@pytest.mark.parametrize("tokens", [16, 1024, 4096])
@pytest.mark.parametrize("num_steps", [1, 4, 28])
def test_flow_schedules_are_those_of_the_edit_pipelines(process_class, options, tokens, num_steps):
    """Flux Kontext's and Qwen-Image-Edit's sigmas, which they give to the scheduler with a shift for the resolution."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **options)
    process = process_class(diffusers.FlowMatchEulerDiscreteScheduler.from_config(theirs.config))
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
    if num_steps == 1 and options:
        pytest.skip("one step has no terminal sigma to stretch to")
    theirs.set_timesteps(sigmas=sigmas, mu=shift_of(tokens, theirs.config))
    steps = process.schedule(num_steps, tokens=tokens)
    assert [step.now for step in steps] == pytest.approx(theirs.sigmas[:-1].tolist(), abs=1e-6)
    assert [step.then for step in steps] == pytest.approx(theirs.sigmas[1:].tolist(), abs=1e-6)
    assert [step.time for step in steps] == pytest.approx(theirs.timesteps.tolist(), rel=1e-6)


def test_flow_schedule_of_kontext_at_64_pixels():
    """The published pipeline's four sigmas; the last step is not a dead one. A fixed `mu` replaces the tokens."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    expected = [1, 0.826, 0.613, 0.345]
    assert [step.now for step in FlowSDE(scheduler).schedule(4, tokens=16)] == pytest.approx(expected, abs=5e-4)
    fixed = FlowSDE(scheduler, mu=shift_of(16, scheduler.config)).schedule(4)
    assert [step.now for step in fixed] == pytest.approx(expected, abs=5e-4)
    with pytest.raises(ValueError, match="tokens"):
        FlowSDE(scheduler).schedule(4)


def test_linspace_sigmas_can_be_chosen():
    """SD3 lets the scheduler choose, which ends in a dead step; Flux-schnell gives sigmas to a fixed shift."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    found = FlowSDE(scheduler).schedule(4)
    assert [step.now for step in found] == pytest.approx(scheduler.sigmas[:-1].tolist())
    schnell = FlowSDE(diffusers.FlowMatchEulerDiscreteScheduler(), linspace_sigmas=True)
    assert [step.now for step in schnell.schedule(4)] == [1.0, 0.75, 0.5, 0.25]
    assert FlowSDE(scheduler).noise_level(found[-1]) < 0.01 < 0.3 < schnell.noise_level(schnell.schedule(4)[-1])


def resshift_etas(steps, kappa, power, end=0.99):
    """Levels of the ResShift paper's section 2.2 in fp64: b0^beta_t with beta_t = ((t - 1) / (T - 1))^p (T - 1)."""
    first = min(0.04 / kappa, 0.04, math.sqrt(0.001)) ** 2
    b0 = math.exp(math.log(end**2 / first) / (2 * (steps - 1)))
    beta = ((np.arange(steps) / (steps - 1)) ** power) * (steps - 1)
    return (math.sqrt(first) * b0**beta) ** 2


@pytest.mark.parametrize(("steps", "kappa", "power"), [(15, 2.0, 0.3), (4, 2.0, 0.3), (15, 1.0, 0.8)])
def test_resshift_is_that_of_the_paper(steps, kappa, power):
    """Marginals, posterior mean and variance (equations 2 and 7), input scaling and start, from numpy in fp64."""
    process = ResShift(steps=steps, kappa=kappa, power=power)
    etas = resshift_etas(steps, kappa, power)
    clean, noise, anchor = (normal(1, 3, 4, 4, seed=seed).double().numpy() for seed in range(3))
    as_torch = [torch.from_numpy(value).float() for value in (clean, noise, anchor)]
    schedule = process.schedule(steps)
    assert [step.time for step in schedule] == list(range(steps - 1, -1, -1))
    for step in schedule:
        index = int(step.time)
        eta, before, time = etas[index], etas[index - 1] if index else 0.0, torch.tensor([index])
        latents = clean + eta * (anchor - clean) + kappa * math.sqrt(eta) * noise
        found = process.add_noise(as_torch[0], as_torch[1], time, as_torch[2])
        torch.testing.assert_close(found, torch.from_numpy(latents).float(), **CLOSE)
        transition = process.transition(as_torch[0], found, step, eta=1.0, anchor=as_torch[2])
        mean = before / eta * latents + (eta - before) / eta * clean
        torch.testing.assert_close(transition.mean, torch.from_numpy(mean).float(), **CLOSE)
        assert transition.std**2 == pytest.approx(kappa**2 * before / eta * (eta - before), rel=1e-5)
        scaled = latents / math.sqrt(1 + kappa**2 * eta)
        torch.testing.assert_close(process.scale_input(found, time), torch.from_numpy(scaled).float(), **CLOSE)
    start = torch.from_numpy(anchor + kappa * math.sqrt(etas[-1]) * noise).float()
    torch.testing.assert_close(process.start(as_torch[1], as_torch[2]), start, **CLOSE)


def irsde_integrals(steps, delta):
    """The time integral of theta from 0 to t, of a cosine schedule, in fp64; its last is -log(delta)."""
    position = np.arange(steps + 3) / (steps + 2)
    alpha_bars = np.cos((position + 0.008) / 1.008 * math.pi / 2) ** 2
    theta = 1 - (alpha_bars / alpha_bars[0])[1:-1]
    integral = np.cumsum(theta) - theta[0]
    return integral * -math.log(delta) / integral[-1]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "score"])
def test_irsde_is_that_of_the_paper(prediction_type):
    """Marginals (equation 6), optimum reverse state and posterior variance (equation 14), from numpy in fp64."""
    steps, delta, strength = 100, 0.005, 50 / 255
    process = IRSDE(steps=steps, delta=delta, max_sigma=strength, prediction_type=prediction_type)
    integral = irsde_integrals(steps, delta)
    clean, noise, anchor = (normal(1, 3, 4, 4, seed=seed).double().numpy() for seed in range(3))
    as_torch = [torch.from_numpy(value).float() for value in (clean, noise, anchor)]
    schedule = process.schedule(steps)
    assert [step.time for step in schedule] == list(range(steps, 0, -1))
    for step in schedule:
        index, time = int(step.time), torch.tensor([int(step.time)])
        full, before = integral[index], integral[index - 1]
        variance = strength**2 * (1 - math.exp(-2 * full))
        latents = anchor + (clean - anchor) * math.exp(-full) + math.sqrt(variance) * noise
        found = process.add_noise(as_torch[0], as_torch[1], time, as_torch[2])
        torch.testing.assert_close(found, torch.from_numpy(latents).float(), **CLOSE)
        output = {"epsilon": noise, "sample": clean, "score": -noise / math.sqrt(variance)}[prediction_type]
        output = torch.from_numpy(output).float()
        torch.testing.assert_close(
            process.target(as_torch[0], as_torch[1], time, as_torch[2]), output, rtol=1e-4, atol=1e-5
        )
        # with delta = 0.005, the last steps divide rounding errors of the latents by exp(-b) >= 0.005
        transition = process.transition(output, found, step, eta=1.0, anchor=as_torch[2])
        of_latents = (1 - math.exp(-2 * before)) / (1 - math.exp(-2 * full)) * math.exp(before - full)
        of_clean = (1 - math.exp(2 * (before - full))) / (1 - math.exp(-2 * full)) * math.exp(-before)
        mean = of_latents * (latents - anchor) + of_clean * (clean - anchor) + anchor
        torch.testing.assert_close(transition.mean, torch.from_numpy(mean).float(), **CLOSE)
        share = (1 - math.exp(2 * (before - full))) * (1 - math.exp(-2 * before)) / (1 - math.exp(-2 * full))
        assert transition.std == pytest.approx(strength * math.sqrt(share), rel=1e-5, abs=1e-9)
    start = torch.from_numpy(anchor + strength * noise).float()
    torch.testing.assert_close(process.start(as_torch[1], as_torch[2]), start, **CLOSE)


def test_one_step_of_resshift_is_the_answer():
    """SinSR's single step starts at the noisiest time and ends in the network's answer."""
    (step,) = ResShift().schedule(1)
    answer = normal(1, 3, 4, 4)
    transition = ResShift().transition(answer, normal(1, 3, 4, 4, seed=1), step, eta=1.0, anchor=answer)
    assert (step.time, step.then, transition.std) == (14.0, 0.0, 0.0)
    torch.testing.assert_close(transition.mean, answer, **CLOSE)
    with pytest.raises(ValueError, match=r"num_steps in \[1, 15\]"):
        ResShift().schedule(16)


PROCESSES = {
    "ddim": lambda: DDIM(diffusers.DDIMScheduler(clip_sample=False)),
    "ancestral": lambda: DDIM(diffusers.DDPMScheduler(clip_sample=False, timestep_spacing="linspace")),
    "v": lambda: DDIM(diffusers.DDPMScheduler(clip_sample=False, prediction_type="v_prediction")),
    "euler": lambda: DDIM(diffusers.EulerDiscreteScheduler(**SIGMAS, use_karras_sigmas=True)),
    "lcm": lambda: DDIM(diffusers.LCMScheduler()),
    "resshift": ResShift,
    "irsde": IRSDE,
    "cps": lambda: FlowCPS(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)),
}


@pytest.mark.parametrize("name", PROCESSES)
@settings(deadline=None, max_examples=25)
@given(eta=st.floats(0, 1), num_steps=st.integers(1, 12), where=st.floats(0, 0.999), scale=st.floats(0, 3))
def test_steps_keep_the_distribution(name, eta, num_steps, where, scale):
    """From the marginal at one level a step leads to that at the next, with any eta, for a point and for a Gaussian.

    A step is linear in latents and output, so with an answer that knows clean latents and noise it maps `(a, s)`, the
    shares of the two, to the shares of its mean; fresh noise is added to the second.
    """
    process = PROCESSES[name]()
    schedule = process.schedule(num_steps)
    step = schedule[int(where * num_steps)]
    (signal, noise), (next_signal, next_noise) = process.coefficients(step.now), process.coefficients(step.then)
    anchor = torch.full((2, 1), 0.3)
    base = (1 - signal) * 0.3 if process.anchored else 0.0
    clean, unit = (
        torch.tensor([[scale], [0.0]]),
        torch.tensor([[0.0], [1.0]]),
    )  # first clean latents only, then noise only
    answer = {"epsilon": unit, "sample": clean, "v_prediction": signal * unit - noise * clean, "velocity": unit - clean}
    output, latents = answer[process.prediction_type], signal * clean + noise * unit + base
    transition = process.transition(output, latents, step, eta=eta, anchor=anchor)
    kept = transition.mean - ((1 - next_signal) * 0.3 if process.anchored else 0.0)
    # The levels are up to 30 times noise to signal in fp32, so 1e-5 of rounding in the latents.
    assert kept[0].item() == pytest.approx(next_signal * scale, abs=1e-4)
    assert kept[1].item() ** 2 + transition.std**2 == pytest.approx(next_noise**2, abs=1e-4)
    if eta == 0:
        assert transition.std == 0


@pytest.mark.parametrize("name", [*PROCESSES, "sde"])
@settings(deadline=None, max_examples=25)
@given(eta=st.just(0.0) | st.floats(1e-3, 1), num_steps=st.integers(1, 12))
def test_samples_have_finite_log_probabilities(name, eta, num_steps):
    """Every step of every schedule draws latents whose log-probability and noise level are finite."""
    process = FlowSDE(diffusers.FlowMatchEulerDiscreteScheduler()) if name == "sde" else PROCESSES[name]()
    anchor = normal(2, 3, 2, 2, seed=5)
    latents = process.start(normal(2, 3, 2, 2), anchor if process.anchored else None)
    for step in process.schedule(num_steps):
        transition = process.transition(normal(2, 3, 2, 2, seed=1), latents, step, eta=eta, anchor=anchor)
        latents = transition.mean + transition.std * normal(2, 3, 2, 2, seed=2)
        assert transition.log_prob(latents).isfinite().all()
        assert 0 <= process.noise_level(step) <= 1


@pytest.mark.parametrize("name", [*PROCESSES])
def test_training_times_cover_the_process(name):
    """From uniform numbers, the largest below 1 included; and add_noise, target and clean fit together there."""
    process = PROCESSES[name]()
    times = process.draw_times(torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24]))
    clean, noise, anchor = (normal(4, 3, 2, 2, seed=seed) for seed in range(3))
    latents = process.add_noise(clean, noise, times, anchor)
    target = process.target(clean, noise, times, anchor)
    assert latents.isfinite().all()
    assert target.isfinite().all()
    assert (times.diff() > 0).all()
    found = process.clean(target, latents, times, anchor)
    # Noise hides the clean latents by up to 1 / 157 at the last of a thousand times, so fp32 leaves 3 to 4 digits.
    torch.testing.assert_close(found, clean, rtol=1e-3, atol=1e-3)


def test_degraded_latents_can_be_where_ddim_starts():
    """SeeSR's and StableSR's start is the degraded image with the noise of the last training time."""
    scheduler = diffusers.DDIMScheduler(**SIGMAS)
    anchor, noise = normal(1, 4, 4, 4), normal(1, 4, 4, 4, seed=1)
    expected = scheduler.add_noise(anchor, noise, torch.tensor([999]))
    torch.testing.assert_close(DDIM(scheduler).start(noise, anchor), expected, **CLOSE)


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


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("DDIMScheduler", {"thresholding": True}, "thresholding"),
        ("UniPCMultistepScheduler", {"thresholding": True}, "thresholding"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "continuous"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type"),
        ("HeunDiscreteScheduler", {}, "order 2"),
        ("TCDScheduler", {}, "TCDScheduler"),
    ],
)
def test_schedulers_that_cannot_be_followed_are_refused(kind, options, named):
    """A setting that a step would not follow is named when the process is made."""
    with pytest.raises(ValueError, match=named):
        DDIM.from_scheduler(getattr(diffusers, kind)(**options))


def test_anchors_are_asked_for():
    """A residual-shifting step without its degraded image is refused."""
    with pytest.raises(ValueError, match="anchor"):
        ResShift().start(torch.zeros(1, 3, 4, 4))


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
