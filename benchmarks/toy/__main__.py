"""The toy experiment: hundreds of tiny restorers compare weightings of RL and SFT on the same data and noise.

    python -m benchmarks.toy                     # the experiment: 24 seeds
    python -m benchmarks.toy --search --first-seed 1000 --seeds 8
    python -m benchmarks.toy --quick             # smoke run

The last line of standard output is one JSON document; `--out folder --figures folder` writes table and figures.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.toy import figures, report, world
from benchmarks.toy.controllers import GradientNoise, NoiseAware, RunningAnchor, TargetTracking, gradient_noise
from iqareward.schedules import Schedule, constant, cosine, gate, logistic_success, soft_gate, softmax_batch
from iqareward.weighting import AdaptiveWeighter, LossWeights

# Dense, because a chord under a concave front would flatter whatever is compared with it.
FIXED = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.85, 0.9, 0.95, 0.98, 1.0)
# A rollout passes if it is nearer than this: about the median error of the SFT model.
PASS_DISTANCE = 0.45
ADVANTAGES = ("batch", "group")


class Arm:
    """A weighting with one state per seed, fed with rows `[seed, B]`."""

    def __init__(self, build: Callable[[], Any], *, per_seed: bool = False) -> None:
        self.build, self.per_seed = build, per_seed

    def begin(self, anchor: Tensor) -> None:
        """Build the weighter(s), and calibrate them on `anchor` `[seed, N]` if they want it."""
        self.weighters = [self.build() for _ in range(len(anchor) if self.per_seed else 1)]
        if self.per_seed:
            for weighter, rows in zip(self.weighters, anchor, strict=True):
                if isinstance(weighter, RunningAnchor):
                    weighter.calibrate(rows)
        elif isinstance(self.weighters[0], AdaptiveWeighter):
            self.weighters[0].calibrate(anchor.flatten(), _bins(anchor))

    def step(self, rollouts: world.Rollouts, arm: int, noise: Callable[[int], GradientNoise]) -> LossWeights:
        """Weights `[seed, B]` of this step, and the update after it."""
        distances = rollouts.distances[arm]
        difficulty = distances.mean(-1)
        if self.per_seed:
            parts = []
            for seed, (weighter, rows) in enumerate(zip(self.weighters, difficulty, strict=True)):
                if isinstance(weighter, NoiseAware):
                    weighter.observe(noise(seed))
                parts.append(weighter(rows))
                weighter.update(rows)
            return LossWeights(*(torch.stack(field) for field in zip(*parts, strict=True)))
        weighter = self.weighters[0]
        if isinstance(weighter, AdaptiveWeighter):
            weights = weighter(difficulty.flatten(), bins=_bins(difficulty))
        elif weighter.signal == "pass_rate":
            weights = weighter(pass_rate=(distances < PASS_DISTANCE).float().mean(-1).flatten())
        else:
            weights = weighter(difficulty.flatten())
        weighter.update(difficulty)
        return LossWeights(weights.rl.view_as(difficulty), weights.sft.view_as(difficulty))


def _bins(rows: Tensor) -> Tensor:
    """The seed of each of the flattened rows `[seed, B]`."""
    return torch.arange(len(rows)).repeat_interleave(rows.shape[1])


def fixed_arms() -> dict[str, Arm]:
    """The front every weighting is measured against."""
    return {f"fixed {share:g}": Arm(lambda s=share: Schedule(partial(constant, share=s))) for share in FIXED}


def shipped_arms(seeds: int) -> dict[str, Arm]:
    """The adaptive weighter, its reverse, and every schedule of the library."""
    time_decay = partial(cosine, peak=0.9, valley=0.1, warmup_steps=0, decay_steps=world.RL_STEPS)
    return {
        "adaptive": Arm(partial(AdaptiveWeighter, num_bins=seeds, mode="additive")),
        "adaptive, convex": Arm(partial(AdaptiveWeighter, num_bins=seeds, mode="convex")),
        "adaptive, convex, steepness 0.5": Arm(partial(AdaptiveWeighter, num_bins=seeds, mode="convex", steepness=0.5)),
        "reversed": Arm(partial(AdaptiveWeighter, num_bins=seeds, mode="additive", direction="hard_to_sft")),
        "reversed, convex": Arm(partial(AdaptiveWeighter, num_bins=seeds, mode="convex", direction="hard_to_sft")),
        "cosine": Arm(lambda: Schedule(time_decay)),
        "gate": Arm(lambda: Schedule(gate)),
        "gate, hard to RL": Arm(lambda: Schedule(partial(gate, direction="hard_to_rl"))),
        "soft_gate": Arm(lambda: Schedule(soft_gate)),
        "logistic_success": Arm(lambda: Schedule(partial(logistic_success, sft=0.25))),
        "softmax_batch": Arm(lambda: Schedule(partial(softmax_batch, sft=0.25)), per_seed=True),
        "target_tracking": Arm(partial(TargetTracking, centre=-1.0, target=0.75), per_seed=True),
        "noise_aware": Arm(NoiseAware, per_seed=True),
    }


def search_arms(seeds: int) -> dict[str, Arm]:
    """Variants of the adaptive formula, for the tuning seeds."""
    variants: dict[str, dict] = {"convex, output_range 0.5 to 1": {"output_range": (0.5, 1.0), "mode": "convex"}}
    for steepness in (0.5, 1.0, 1.5, 2.0, 3.0):
        variants[f"convex, steepness {steepness:g}"] = {"steepness": steepness, "mode": "convex"}
        variants[f"additive, steepness {steepness:g}"] = {"steepness": steepness, "mode": "additive"}
    found = {name: Arm(partial(AdaptiveWeighter, num_bins=seeds, **options)) for name, options in variants.items()}
    return {"convex, rho 0": Arm(partial(RunningAnchor, mode="convex"), per_seed=True)} | found


def policy_direction(rollouts: world.Rollouts, advantages: str) -> Tensor:
    """Gradient of the REINFORCE loss of each sample with respect to mu, `[arm, seed, B, 4, 2]`."""
    centred = rollouts.rewards - rollouts.rewards.mean(-1, keepdim=True)
    dims = (-1,) if advantages == "group" else (-2, -1)
    centred = centred / (rollouts.rewards.std(dims, keepdim=True) + 1e-4)
    steps = rollouts.actions - rollouts.mean.detach().unsqueeze(3)
    return -(centred[..., None, None] * steps).mean(3) / world.EXPLORATION**2


def last_layer_noise(features: Tensor, rl: Tensor, sft: Tensor) -> GradientNoise:
    """Noise of the last layer's gradients of one model, from four micro-batches; directions are `[B, 4, 2]`."""
    parts = features.detach().unflatten(0, (4, -1))
    stacked = [torch.einsum("nrf,nro->nfo", parts, d.flatten(0, 1).unflatten(0, (4, -1))).flatten(1) for d in (rl, sft)]
    return gradient_noise(*stacked)


def train(
    sft: world.Models, seeds: range, arms: dict[str, Arm], advantages: str, sft_scale: float
) -> tuple[world.Models, Tensor]:
    """All arms from the same SFT models; the trained models, and the SFT weight `[step, arm, third of sigma]`."""
    anchor = world.calibration(sft, seeds)
    for arm in arms.values():
        arm.begin(anchor)
    models, sft_weights = world.with_arms(sft.parameters, len(arms)), []
    for step, batch, rollouts in world.training(models, seeds):
        rl = policy_direction(rollouts, advantages)
        sft_direction = sft_scale * (rollouts.mean.detach() - batch.clean)

        def noise(seed: int, index: int = 0, rollouts=rollouts, rl=rl, sft_direction=sft_direction) -> GradientNoise:
            return last_layer_noise(rollouts.features[index, seed], rl[index, seed], sft_direction[index, seed])

        weights = [arm.step(rollouts, i, partial(noise, index=i)) for i, arm in enumerate(arms.values())]
        w_rl, w_sft = (torch.stack(field) for field in zip(*weights, strict=True))
        direction = w_rl[..., None, None] * rl + w_sft[..., None, None] * sft_direction
        world.descend(models, (direction * rollouts.mean).sum((3, 4)).mean(2).sum(), step, world.RL_STEPS)
        tercile = ((batch.sigma - 0.1) / 1.4 * 3).long().clamp(max=2)
        masks = torch.stack([tercile == third for third in range(3)])
        sft_weights.append((w_sft.unsqueeze(1) * masks).sum((2, 3)) / masks.sum((1, 2)))
    return models, torch.stack(sft_weights)


def handover(seeds: range, advantages: str, sft_scale: float) -> Tensor:
    """SFT weights `[step, (rho 1, rho 0), third of sigma]` when RL begins on a model that SFT left unfinished."""
    frozen = Arm(partial(AdaptiveWeighter, num_bins=len(seeds)))
    arms = {"rho 1": frozen, "rho 0": Arm(RunningAnchor, per_seed=True)}
    return train(world.pretrain(seeds, world.SFT_STEPS // 10), seeds, arms, advantages, sft_scale)[1]


def main() -> None:
    """Run, print the tables and the JSON line, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--advantages", choices=ADVANTAGES, default="batch")
    parser.add_argument(
        "--search", action="store_true", help="variants of the adaptive formula instead of all schedules"
    )
    parser.add_argument("--sft-scale", type=float, default=3.0, help="of every arm; 3 spreads shares of .25 to .9 best")
    parser.add_argument("--reward-bias", type=float, default=0.0, help="how much the reward also pays for contrast")
    parser.add_argument("--sft-steps", type=int, default=world.SFT_STEPS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figures", type=Path)
    options = parser.parse_args()
    world.SFT_STEPS, world.REWARD_BIAS = options.sft_steps, options.reward_bias
    if options.quick:
        options.seeds, world.SFT_STEPS, world.RL_STEPS, world.TEST = 3, 30, 10, 64
    torch.set_num_threads(1)  # the tensors are small: threads would wait for each other more than they work
    start = time.perf_counter()
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    others = (search_arms if options.search else shipped_arms)(len(seeds))
    arms, setting = fixed_arms() | others, (options.advantages, options.sft_scale)
    sft = world.pretrain(seeds)
    models, sft_weights = train(sft, seeds, arms, *setting)
    scores = report.scores(*world.test_scores(models, seeds), world.test_scores(sft, seeds)[0])
    seconds = time.perf_counter() - start
    report.publish(list(arms), scores, len(FIXED), options, seconds)
    if options.figures:
        found = report.rows(list(arms), scores, len(FIXED))
        figures.draw_front(found, options.figures / "weighting_front.png")
        panels = {"SFT converged": sft_weights[:, [list(arms).index("adaptive")]]}
        panels["SFT stopped at a tenth"] = handover(seeds, *setting)
        figures.draw_weights(panels, options.figures / "weighting_over_training.png")


if __name__ == "__main__":
    main()
