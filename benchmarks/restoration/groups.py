"""How far the rollouts of one input differ, against what could be gained, for whole images and for patches of them.

    python -m benchmarks.restoration.groups --json benchmarks/results/restoration-groups_HARDWARE_DATE.json

A policy gradient learns from the differences within a group. The table says how large they are for each size of a
patch, and whether more noise in the sampler makes them larger.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import iqareward
from benchmarks._harness import document, finish
from benchmarks.restoration import world
from benchmarks.restoration.world import Bench, Scale
from iqareward.diffusion import Batch, Noise, rollout
from iqareward.types import Reward

GROUP = 8
INPUTS = 60  # the first twelve pictures with each task
SAMPLERS = {"its own": (1.0, 1.0), "noise at the start only": (1.0, 0.0), "twice the noise at every level": (2.0, 1.0)}


@torch.no_grad()
def rollouts(bench: Bench, inputs: int, noise_factor: float, eta: float) -> tuple[Tensor, Tensor]:
    """Restorations `[inputs, GROUP, 3, H, W]`, and the ground truth `[inputs, 3, H, W]`."""
    policy, pairs = bench.start("converged"), world.test(bench.scale)
    process: Any = policy.process
    policy.process = dataclasses.replace(process, kappa=noise_factor * process.kappa)
    found = []
    for row in range(inputs):
        noise = Noise((row,) * GROUP, tuple(range(GROUP)), world.SAMPLER)
        condition = policy.condition(Batch(noise.ids, pairs.degraded[row].expand(GROUP, -1, -1, -1)), noise)
        with torch.autocast(bench.device, torch.bfloat16):
            sample = rollout(policy, condition, noise, eta=eta).sample
        found.append(policy.decode(sample, condition).float().clamp(0, 1))
    return torch.stack(found), pairs.references[:inputs]


def patches(images: Tensor, times: int) -> Tensor:
    """Images `[N, 3, H, W]` cut in half in both directions, `times` times over."""
    for _ in range(times):
        images = world.quarters(images)
    return images


def spread(reward: Reward, images: Tensor, references: Tensor, times: int) -> dict[str, float]:
    """Of the scores of all patches that `times` cuts leave.

    Args:
        reward: A full-reference reward that is 1 at most.
        images: `[N, G, 3, H, W]` in [0, 1], G rollouts of each input.
        references: `[N, 3, H, W]` in [0, 1].
        times: How often images are cut in half in both directions.

    Returns:
        Means of: the score, the headroom above it, the standard deviation within a group, and the best of a group less
        its mean; and the standard deviation between inputs.
    """
    truth = patches(references, times)
    groups = torch.stack([reward(patches(copy, times), references=truth) for copy in images.unbind(1)], 1)
    means = groups.mean(1)
    found = {
        "score": means.mean(),
        "headroom": 1 - means.mean(),
        "within": groups.std(1).mean(),
        "between": means.std(),
        "best": (groups.amax(1) - means).mean(),
    }
    return {name: round(float(value), 5) for name, value in found.items()}


def measured(scale: Scale, inputs: int) -> list[dict[str, Any]]:
    """A row for every sampler and every size of a patch, down to 16 pixels."""
    bench, reward, rows = Bench(scale), iqareward.load("haarpsi"), []
    for sampler, (noise_factor, eta) in SAMPLERS.items():
        images, references = rollouts(bench, inputs, noise_factor, eta)
        for times in range((scale.test_side // 16).bit_length()):
            found = spread(reward, images, references, times)
            rows.append({"sampler": sampler, "side": scale.test_side >> times} | found)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    finish(document("restoration-groups", measured(world.CPU, INPUTS), [], ["diffusers"]), options.json)


if __name__ == "__main__":
    main()
