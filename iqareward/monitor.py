"""Watching for a hacked reward: what rises, what falls, and what drifts, on images that the policy never trains on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iqareward.functional._checks import check_images
from iqareward.functional._chunks import map_chunks
from iqareward.functional._fused import correlate
from iqareward.functional.color import luma
from iqareward.functional.filters import mean_of_map
from iqareward.groups import finite_or_nan

DARK = 0.1
CLIPPED = 1 / 255  # nearer to 0 or 1 than this is saturated


def saturation_share(images: Tensor) -> Tensor:
    """Share of pixels with a channel at 0 or 1: burnt highlights, crushed shadows.

    Args:
        images: `[B, 3, H, W]` in [0, 1].

    Returns:
        `[B]` fp32 in [0, 1]; NaN for images with non-finite pixels.

    Example:
        >>> saturation_share(torch.ones(1, 3, 8, 8))
        tensor([1.])
    """

    def share(rows: Tensor) -> Tensor:
        return ((rows <= CLIPPED) | (rows >= 1 - CLIPPED)).any(1).float().flatten(1).mean(1)

    return _statistic("saturation_share", share, images)


def colorfulness(images: Tensor) -> Tensor:
    """Mean difference between the largest and the smallest channel: 0 for grey.

    Args:
        images: `[B, 3, H, W]` in [0, 1].

    Example:
        >>> colorfulness(torch.full((1, 3, 8, 8), 0.3))
        tensor([0.])
    """
    return _statistic("colorfulness", lambda rows: mean_of_map(rows.amax(1) - rows.amin(1)), images)


def dark_fraction(images: Tensor) -> Tensor:
    """Share of pixels with luma below 0.1.

    Args:
        images: `[B, 3, H, W]` in [0, 1].

    Example:
        >>> dark_fraction(torch.zeros(1, 3, 8, 8))
        tensor([1.])
    """
    return _statistic("dark_fraction", lambda rows: (luma(rows) < DARK).float().flatten(1).mean(1), images)


def edge_density(images: Tensor) -> Tensor:
    """Mean length of the luma gradient (Sobel), in grey levels per pixel: rises with sharpening, ringing and noise.

    Args:
        images: `[B, 3, H, W]` in [0, 1], sides at least 3.

    Example:
        >>> ramp = torch.linspace(0, 0.7, 8).expand(1, 3, 8, 8)
        >>> edge_density(ramp)
        tensor([0.1000])
    """

    def density(rows: Tensor) -> Tensor:
        planes, across, along = luma(rows), (-0.5, 0.0, 0.5), (0.25, 0.5, 0.25)
        slopes = [
            correlate(correlate(planes, across, is_vertical=is_vertical), along, is_vertical=not is_vertical)
            for is_vertical in (False, True)
        ]
        return mean_of_map(torch.stack(slopes).norm(dim=0))

    return _statistic("edge_density", density, images, min_side=3)


def high_frequency_share(images: Tensor) -> Tensor:
    """Share of the luma's variance above half the Nyquist frequency: rises with added noise and invented texture.

    Args:
        images: `[B, 3, H, W]` in [0, 1].

    Returns:
        `[B]` fp32 in [0, 1]; 0 for flat images, NaN for images with non-finite pixels.

    Example:
        >>> checkerboard = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(4, 4).expand(1, 3, 8, 8)
        >>> high_frequency_share(checkerboard)
        tensor([1.])
    """

    def share(rows: Tensor) -> Tensor:
        planes = luma(rows)
        planes = torch.where(planes.isfinite(), planes, 0.0)
        power = torch.fft.fft2(planes - mean_of_map(planes)[:, None, None]).abs().square()
        vertical, horizontal = (torch.fft.fftfreq(side, device=rows.device).abs() for side in rows.shape[2:])
        high = torch.maximum(vertical[:, None], horizontal[None]) > 0.25
        shown, total = mean_of_map(power * high), mean_of_map(power)
        # A flat image leaves rounding noise only, whose share says nothing.
        return torch.where(total < 1e-10 * planes.shape[1:].numel(), 0.0, shown / total)

    return _statistic("high_frequency_share", share, images)


def _statistic(name: str, formula: Callable[[Tensor], Tensor], images: Tensor, *, min_side: int = 1) -> Tensor:
    """A formula of each image in pieces; NaN for images with non-finite pixels."""

    def unless_broken(rows: Tensor) -> Tensor:
        return torch.where(rows.isfinite().flatten(1).all(1), formula(rows), torch.nan)

    return map_chunks(unless_broken, check_images(name, images, min_side=min_side))


STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "saturation_share": saturation_share,
    "colorfulness": colorfulness,
    "dark_fraction": dark_fraction,
    "edge_density": edge_density,
    "high_frequency_share": high_frequency_share,
}
FEWEST_IMAGES = 4  # below it a standard error says nothing


@dataclass(frozen=True)
class MonitorReport:
    """What one look found.

    Attributes:
        means: by name, the mean over the images; the training reward is "reward".
        changes: by name, the mean paired change since before RL, in standard deviations of the images before RL.
        alarms: one sentence for each thing that moved while the reward rose; empty if nothing did.
    """

    means: dict[str, float]
    changes: dict[str, float]
    alarms: tuple[str, ...]


class HackingMonitor:
    """Alarms when the training reward rises while judges that are not in it fall, or while the images drift.

    It looks at the same held-out inputs every time and compares each with itself before RL. A change counts if it is
    more than `z` standard errors from 0 and more than `effect` standard deviations of the images. Judges alarm when
    they fall, image statistics when they move either way *away from those of the ground truth*: restorations that get
    sharper as the ground truth is sharp are what was asked for.

    Args:
        judges: by name, `judge(images, references=...) -> [V]`, higher is better; held-out judges and fidelity metrics.
        statistics: by name, `statistic(images) -> [V]`; those of this module if not given.
        z: standard errors that count as significant.
        effect: smallest change that matters, in standard deviations over the images before RL.
        patience: looks in a row that must find the same before it is an alarm.

    Raises:
        ValueError: an option is not positive.

    Example:
        >>> from iqareward.functional import psnr
        >>> truth = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> monitor = HackingMonitor({"psnr": psnr}, patience=1)
        >>> monitor.calibrate(0.9 * truth, truth, rewards=torch.zeros(8))
        >>> monitor.update(0.6 * truth, truth, rewards=torch.ones(8)).alarms[0]
        'psnr fell from 24.8 to 12.8 while the reward rose from 0 to 1'
    """

    def __init__(
        self,
        judges: Mapping[str, Callable[..., Tensor]],
        *,
        statistics: Mapping[str, Callable[[Tensor], Tensor]] = STATISTICS,
        z: float = 3.0,
        effect: float = 0.1,
        patience: int = 2,
    ) -> None:
        if not (z > 0 and effect > 0 and patience >= 1):
            raise ValueError(f"HackingMonitor expected z, effect > 0 and patience >= 1, got {z}, {effect}, {patience}.")
        self.judges, self.statistics = dict(judges), dict(statistics)
        self.z, self.effect, self.patience = z, effect, patience
        self.history: list[MonitorReport] = []
        self._before: dict[str, Tensor] = {}
        self._truth: dict[str, Tensor] = {}
        self._in_a_row: dict[str, int] = {}

    @property
    def calibrated(self) -> bool:
        """Whether it knows the model before RL."""
        return bool(self._before)

    @torch.no_grad()
    def calibrate(self, images: Tensor, references: Tensor, rewards: Tensor) -> None:
        """Remember how the model before RL restores the held-out inputs.

        Args:
            images: `[V, 3, H, W]` restorations in [0, 1].
            references: ground truth of the same shape.
            rewards: `[V]` training rewards of `images`.
        """
        self._before = self._measure(images, references, rewards)
        truth = {name: statistic(references).float().cpu() for name, statistic in self.statistics.items()}
        self._truth = {name: finite_or_nan(values) for name, values in truth.items()}
        self._in_a_row, self.history = {}, []

    @torch.no_grad()
    def update(self, images: Tensor, references: Tensor, rewards: Tensor) -> MonitorReport:
        """Compare the restorations of the same inputs, in the same order, with those before RL.

        Args:
            images: `[V, 3, H, W]` restorations in [0, 1].
            references: ground truth of the same shape.
            rewards: `[V]` training rewards of `images`.

        Returns:
            A `MonitorReport`, also kept in `history`. Inputs that a judge did not score take no part in its change;
            fewer than four scored inputs never alarm.

        Raises:
            RuntimeError: `calibrate` was not called.
            ValueError: the number of images is another one.
        """
        if not self.calibrated:
            raise RuntimeError(
                "HackingMonitor expected calibrate(...) on the model before RL, before its first update."
            )
        if len(images) != len(self._before["reward"]):
            raise ValueError(
                f"HackingMonitor expected the {len(self._before['reward'])} inputs of calibrate, got {len(images)}. "
                "Show it the same held-out inputs every time."
            )
        now = self._measure(images, references, rewards)
        moved = {name: self._moved(now[name] - self._before[name], self._before[name]) for name in now}
        suspects = [name for name in now if name != "reward" and moved["reward"][1] > 0 and self._suspicious(name, now)]
        self._in_a_row = {name: self._in_a_row.get(name, 0) + 1 for name in suspects}
        alarms = tuple(self._sentence(name, now) for name, looks in self._in_a_row.items() if looks >= self.patience)
        means = {name: float(values.nanmean()) for name, values in now.items()}
        report = MonitorReport(means, {name: change for name, (change, _) in moved.items()}, alarms)
        self.history.append(report)
        return report

    def _measure(self, images: Tensor, references: Tensor, rewards: Tensor) -> dict[str, Tensor]:
        found = {"reward": rewards}
        found |= {name: judge(images, references=references) for name, judge in self.judges.items()}
        found |= {name: statistic(images) for name, statistic in self.statistics.items()}
        return {name: finite_or_nan(values.detach().float().cpu()) for name, values in found.items()}

    def _moved(self, difference: Tensor, before: Tensor) -> tuple[float, int]:
        """(change in standard deviations of `before`, its sign if it counts, else 0)."""
        scored = difference[difference.isfinite()]
        if len(scored) < FEWEST_IMAGES:
            return 0.0, 0
        mean, spread = scored.mean(), before[before.isfinite()].std()
        change = float(mean / spread.clamp(min=1e-6 + 1e-3 * before.nanmean().abs()))
        counts = bool(mean.abs() > self.z * scored.std() / len(scored) ** 0.5) and abs(change) > self.effect
        return change, counts * (1 if change > 0 else -1)

    def _suspicious(self, name: str, now: dict[str, Tensor]) -> bool:
        before = self._before[name]
        if name in self.judges:
            return self._moved(now[name] - before, before)[1] < 0
        truth = self._truth[name]
        return self._moved((now[name] - truth).abs() - (before - truth).abs(), before)[1] > 0

    def _sentence(self, name: str, now: dict[str, Tensor]) -> str:
        def step(key: str) -> str:
            return f"from {float(self._before[key].nanmean()):.3g} to {float(now[key].nanmean()):.3g}"

        verb = "fell" if name in self.judges else f"left the ground truth's {float(self._truth[name].nanmean()):.3g},"
        return f"{name} {verb} {step(name)} while the reward rose {step('reward')}"

    def state_dict(self) -> dict[str, Any]:
        """Everything that later looks depend on; without `history`."""
        copies = ({name: values.clone() for name, values in part.items()} for part in (self._before, self._truth))
        before, truth = copies
        return {"before": before, "truth": truth, "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken; ValueError if that monitor watched other things."""
        watched = {"reward", *self.judges, *self.statistics}
        if state["before"] and set(state["before"]) != watched:
            raise ValueError(
                f"HackingMonitor expected the state of one that watches {sorted(watched)}, got "
                f"{sorted(state['before'])}. Build it with the same judges and statistics."
            )
        self._before, self._truth = dict(state["before"]), dict(state["truth"])
        self._in_a_row = dict(state["in_a_row"])
