"""Samplers written from the papers' equations in float64, which the policies are compared with."""

import copy
import math

import torch
from torch import nn

F64 = torch.float64


def exact(policy):
    """A copy of a policy with every module in float64."""
    policy = copy.deepcopy(policy)
    for part in vars(policy).values():
        if isinstance(part, nn.Module):
            part.to(F64)
    return policy


def resshift(network, anchor, degraded, noises, *, steps=15, kappa=2.0, power=0.3, end=0.99):
    """Residual shifting (equations 4 to 10 of ResShift), from noises [T + 1], the first of which starts.

    sqrt(eta_t) grows geometrically from min(0.04 / kappa, sqrt(0.001)) to `end`, with exponents that are bent by
    `power`, as in the published configurations. The published network sees latents divided by their standard deviation,
    sqrt(kappa^2 eta_t + 1).
    """
    low, high = min(0.04 / kappa, math.sqrt(0.001)), end
    growth = [(t / (steps - 1)) ** power * (steps - 1) for t in range(steps)]
    base = math.exp(math.log(high / low) / (steps - 1))
    etas = [(low * base**exponent) ** 2 for exponent in growth]
    latents = anchor + kappa * math.sqrt(etas[-1]) * noises[0]
    for number, t in enumerate(reversed(range(steps))):
        before, now = (etas[t - 1] if t else 0.0), etas[t]
        seen = latents / math.sqrt(kappa**2 * now + 1)
        times = torch.full((len(latents),), t, dtype=F64)
        clean = network(torch.cat([seen, degraded], 1), times).sample
        mean = before / now * latents + (now - before) / now * clean
        latents = mean + kappa * math.sqrt(before / now * (now - before)) * noises[number + 1]
    return latents


def ir_sde(network, degraded, noises, *, steps=100, max_sigma=10 / 255, end=0.005):
    """The posterior of the mean-reverting SDE given the clean image (equations 6, 9 and 12 of IR-SDE and Refusion).

    theta_t is 1 minus the cosine schedule of two more steps, scaled so that the integral of theta ends at -log(end).
    """
    share = [math.cos((t / (steps + 2) + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(steps + 2)]
    thetas = [1 - share[t + 1] / share[0] for t in range(1, steps + 1)]
    unit = -math.log(end) / sum(thetas)
    integral = [unit * sum(thetas[:t]) for t in range(steps + 1)]
    latents = degraded + max_sigma * noises[0]
    for number, t in enumerate(range(steps, 0, -1)):
        variance = max_sigma**2 * (1 - math.exp(-2 * integral[t]))
        times = torch.full((len(latents),), t, dtype=F64)
        noise = network(torch.cat([latents - degraded, degraded], 1), times).sample
        clean = degraded + (latents - degraded - math.sqrt(variance) * noise) * math.exp(integral[t])
        step = integral[t] - integral[t - 1]
        whole, rest, own = (1 - math.exp(-2 * value) for value in (integral[t], integral[t - 1], step))
        mean = rest / whole * math.exp(-step) * (latents - degraded)
        mean = mean + own / whole * math.exp(-integral[t - 1]) * (clean - degraded) + degraded
        latents = mean + max_sigma * math.sqrt(rest * own / whole) * noises[number + 1]
    return latents


def spaced(policy, degraded, prompts, latents, noises, *, guidance):
    """DDPM's posterior (equation 7) on the scheduler's spacing, with guidance from the first prompt to the second."""
    scheduler, outputs = policy.process.scheduler, None
    alpha_bars = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(len(noises))
    stride = scheduler.config.num_train_timesteps // len(noises)
    for time, fresh in zip(scheduler.timesteps.tolist(), noises, strict=True):
        now = alpha_bars[time]
        then = alpha_bars[time - stride] if time >= stride else scheduler.final_alpha_cumprod.double()
        outputs = []
        for prompt in prompts:
            inputs = {"controlnet_cond": degraded, "return_dict": False}
            down, middle = policy.controlnet(latents, time, prompt, **inputs)
            steered = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            outputs.append(policy.unet(latents, time, prompt, **steered).sample)
        noise = outputs[0] + guidance * (outputs[1] - outputs[0])
        clean = (latents - (1 - now).sqrt() * noise) / now.sqrt()
        ratio = now / then
        mean = then.sqrt() * (1 - ratio) / (1 - now) * clean + ratio.sqrt() * (1 - then) / (1 - now) * latents
        latents = mean + ((1 - then) / (1 - now) * (1 - ratio)).sqrt() * fresh
    return latents


def low_frequencies(images):
    """Five blurs by the binomial kernel, whose holes double (StableSR's wavelet colour correction)."""
    row = torch.tensor([0.25, 0.5, 0.25], dtype=F64)
    for level in range(5):
        width = 2**level
        for kernel, pads in (
            (row.view(1, 1, 3, 1), (0, 0, width, width)),
            (row.view(1, 1, 1, 3), (width, width, 0, 0)),
        ):
            padded = nn.functional.pad(images, pads, mode="replicate")
            dilation = (width, 1) if kernel.shape[2] == 3 else (1, width)
            images = nn.functional.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3, dilation=dilation)
    return images
