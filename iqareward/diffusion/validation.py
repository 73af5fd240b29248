"""Judging the policy on images that it does not train on, by judges that it is not trained with."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from iqareward.atomic import atomic_write
from iqareward.diffusion.experience import checked_scores, images_of
from iqareward.diffusion.finite import finite_mean, usable_rows
from iqareward.diffusion.monitor import HackingMonitor
from iqareward.diffusion.policy import Policy
from iqareward.diffusion.rollout import rollout
from iqareward.groups import gather_rows
from iqareward.types import Reward


@dataclass
class Validation:
    """A fixed set of held-out inputs and everything that is measured on their restorations.

    Args:
        degraded: `[V, 3, H, W]` in [0, 1].
        references: of the same shape.
        judges: by name, `judge(images, references=...) -> [V]`, higher is better; none of them the training reward.
        num_steps: sampling steps; the sampler is deterministic (eta = 0) and the first noise always the same.
        monitor: watches the judges and image statistics for signs of a hacked reward.
        stop_on: judge that decides which model is best and when to stop.
        patience: validations without a new best before training stops; never if not given.
        inputs_at_once: inputs sampled together.

    Raises:
        ValueError: `stop_on` is no judge, or an image has a pixel that is not finite.

    Example:
        >>> import iqareward
        >>> from iqareward.diffusion.restorer import build_restorer
        >>> judges = {"ssim": iqareward.load("ssim")}
        >>> validation = Validation(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16), judges, num_steps=2)
        >>> validation(build_restorer((8, 16)), iqareward.load("gmsd"), seed=0)["scores"]["ssim"].shape
        torch.Size([2])
    """

    degraded: Tensor
    references: Tensor
    judges: Mapping[str, Callable[..., Tensor]]
    num_steps: int = 10
    monitor: HackingMonitor | None = None
    stop_on: str | None = None
    patience: int | None = None
    inputs_at_once: int = 16
    best: float = field(default=float("-inf"), init=False)
    since_best: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.stop_on is not None and self.stop_on not in self.judges:
            raise ValueError(f"Validation expected `stop_on` among {list(self.judges)}, got {self.stop_on!r}.")
        bad = (~usable_rows(self.degraded, self.references)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"Validation expected finite pixels, got others in the inputs {bad}. Leave them out.")

    @property
    def stopped(self) -> bool:
        """Whether the held-out judge has not improved for too long."""
        return self.patience is not None and self.since_best >= self.patience

    @torch.no_grad()
    def restore(self, policy: Policy, *, seed: int, rows: slice = slice(None)) -> Tensor:
        """The restorations `[V, 3, H, W]` of these rows on the CPU."""
        device = next(policy.model.parameters()).device
        restored = []
        for ids in torch.arange(len(self.degraded))[rows].split(self.inputs_at_once):
            degraded = self.degraded[ids].to(device)
            options: dict[str, Any] = {"group_size": 1, "num_steps": self.num_steps, "eta": 0.0, "seed": seed}
            sample = rollout(policy, degraded, ids=ids.tolist(), **options).sample
            restored.append(images_of(policy, sample).cpu())
        return torch.cat(restored)

    def __call__(self, policy: Policy, reward: Reward, *, seed: int, rank: int = 0, world: int = 1) -> dict[str, Any]:
        """Restore and judge every input; with several processes each does its share and all get the whole.

        Args:
            policy: the model.
            reward: the training reward, measured beside the judges.
            seed: of the first noise.
            rank: number of this process.
            world: number of processes.

        Returns:
            `{"images": [V, 3, H, W], "scores": {name: [V]}, "alarms": (sentences), "best": bool}`; the training reward
            is "reward", "best" says whether `stop_on` has not been as good before.

        Raises:
            TypeError: a judge answers with something other than a tensor of real numbers.
            ValueError: it does not answer with one score per image.
        """
        count = len(self.degraded)
        mine = slice(count * rank // world, count * (rank + 1) // world)
        images, references = self.restore(policy, seed=seed, rows=mine), self.references[mine]
        named: dict[str, Callable[..., Tensor]] = {"reward": reward, **self.judges}
        columns: list[Tensor] = []
        for name, judge in named.items():
            answer = judge(images, references=references)
            columns.append(checked_scores(answer, name=getattr(judge, "name", name), count=len(images)).cpu())
        own = torch.stack(columns, 1)
        device = next(policy.model.parameters()).device
        (images, rows), _ = gather_rows(images.to(device), own.to(device))
        images, scores = images.cpu(), dict(zip(named, rows.cpu().unbind(1), strict=True))
        alarms = [f"{name} scored no held-out image" for name, found in scores.items() if found.isnan().all()]
        if self.monitor is not None and not scores["reward"].isnan().all():
            if self.monitor.calibrated:
                alarms += self.monitor.update(images, self.references, scores["reward"]).alarms
            else:
                self.monitor.calibrate(images, self.references, scores["reward"])
        best = self.stop_on is not None and self._compare(finite_mean(scores[self.stop_on]))
        return {"images": images, "scores": scores, "alarms": tuple(alarms), "best": best}

    def _compare(self, value: float) -> bool:
        """Whether it is the best so far; NaN, where nothing was scored, counts neither way."""
        better = value > self.best
        if not math.isnan(value):
            self.best, self.since_best = (value, 0) if better else (self.best, self.since_best + 1)
        return better

    def state_dict(self) -> dict[str, Any]:
        """The best value so far and the monitor."""
        monitor = None if self.monitor is None else self.monitor.state_dict()
        return {"best": self.best, "since_best": self.since_best, "monitor": monitor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken."""
        self.best, self.since_best = state["best"], state["since_best"]
        if self.monitor is not None and state["monitor"] is not None:
            self.monitor.load_state_dict(state["monitor"])


def image_grid(rows: Sequence[Tensor], *, columns: int = 8) -> Tensor:
    """Images side by side, one line per tensor: degraded, restored, ground truth.

    Args:
        rows: `[V, 3, H, W]` each, in [0, 1].
        columns: images per line, the first ones.

    Returns:
        `[3, lines * H, columns * W]`.

    Example:
        >>> image_grid([torch.zeros(3, 3, 4, 4), torch.ones(3, 3, 4, 4)], columns=2).shape
        torch.Size([3, 8, 8])
    """
    lines = [torch.cat(list(images[:columns].float().nan_to_num(0.0).clamp(0, 1)), 2) for images in rows]
    return torch.cat(lines, 1)


def save_grid(path: Path, validation: Validation, images: Tensor) -> None:
    """Write degraded, restored and true images, one line each, as a PNG."""
    pixels = image_grid([validation.degraded, images, validation.references]).mul(255).round().byte()
    with atomic_write(path) as file:
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, format="PNG")
