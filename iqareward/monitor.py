"""Watch for reward hacking: compare scores of held-out images with those of the model before RL."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iqareward.functional._checks import check_images
from iqareward.functional._chunks import map_chunks
from iqareward.functional._fused import correlate
from iqareward.functional.color import luma
from iqareward.functional.filters import mean_of_map
from iqareward.groups import finite_or_nan

_DARK = 0.1
_CLIPPED = 1 / 255  # a channel nearer to 0 or 1 than this is saturated
_FEWEST_IMAGES = 4  # with fewer a standard error says nothing


def _saturation_share(images: Tensor) -> Tensor:
    return ((images <= _CLIPPED) | (images >= 1 - _CLIPPED)).any(1).float().flatten(1).mean(1)


def _colorfulness(images: Tensor) -> Tensor:
    return mean_of_map(images.amax(1) - images.amin(1))


def _dark_fraction(images: Tensor) -> Tensor:
    return (luma(images) < _DARK).float().flatten(1).mean(1)


def _edge_density(images: Tensor) -> Tensor:
    planes, across, along = luma(images), (-0.5, 0.0, 0.5), (0.25, 0.5, 0.25)  # Sobel
    slopes = [
        correlate(correlate(planes, across, is_vertical=is_vertical), along, is_vertical=not is_vertical)
        for is_vertical in (False, True)
    ]
    return mean_of_map(torch.stack(slopes).norm(dim=0))


def _high_frequency_share(images: Tensor) -> Tensor:
    planes = luma(images)
    planes = torch.where(planes.isfinite(), planes, 0.0)
    power = torch.fft.fft2(planes - mean_of_map(planes)[:, None, None]).abs().square()
    vertical, horizontal = (torch.fft.fftfreq(side, device=images.device).abs() for side in images.shape[2:])
    high = torch.maximum(vertical[:, None], horizontal[None]) > 0.25
    shown, total = mean_of_map(power * high), mean_of_map(power)
    # A flat image leaves rounding noise only, whose share says nothing.
    return torch.where(total < 1e-10 * planes.shape[1:].numel(), 0.0, shown / total)


def _statistic(name: str, formula: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply a formula to the images in pieces; NaN for images with non-finite pixels."""

    def unless_broken(rows: Tensor) -> Tensor:
        return torch.where(rows.isfinite().flatten(1).all(1), formula(rows), torch.nan)

    return map_chunks(unless_broken, check_images(name, images, min_side=3))


STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    name: partial(_statistic, name, formula)
    for name, formula in {
        "saturation_share": _saturation_share,
        "colorfulness": _colorfulness,
        "dark_fraction": _dark_fraction,
        "edge_density": _edge_density,
        "high_frequency_share": _high_frequency_share,
    }.items()
}
"""Image statistics by name; each maps images `[B, 3, H, W]` in [0, 1] with sides of at least 3 to `[B]` in fp32.

- `saturation_share`: share of pixels with a channel at 0 or 1 (burnt highlights, crushed shadows).
- `colorfulness`: mean difference between the largest and the smallest channel.
- `dark_fraction`: share of pixels with luma below 0.1.
- `edge_density`: mean length of the luma gradient, in grey levels per pixel; rises with sharpening, ringing and noise.
- `high_frequency_share`: share of the luma's variance above half the Nyquist frequency; rises with added noise and
  invented texture, 0 for flat images.
"""


@dataclass(frozen=True)
class MonitorReport:
    """What one comparison with the model before RL found.

    Attributes:
        means: mean over the images of each measure by name; the training reward is "reward".
        changes: mean paired change of each measure since before RL, in standard deviations over the images before RL.
        alarms: one sentence for each measure that is suspicious while the reward rose; empty if none is.
    """

    means: dict[str, float]
    changes: dict[str, float]
    alarms: tuple[str, ...]


class HackingMonitor:
    """Raise an alarm when the training reward rises while held-out rewards fall, or while the images drift.

    Every call compares the same held-out inputs with themselves before RL. A change counts if it is more than `z`
    standard errors from 0 and more than `effect` standard deviations over the images. Judges alarm when they fall.
    Image statistics alarm when they move *away from those of the ground truth*, in either direction: restorations that
    get as sharp as the ground truth are what was asked for.

    Args:
        held_out: `reward(images, references=...) -> [V]` by name, higher is better: rewards and fidelity metrics
            that are not part of the training reward.
        statistics: `statistic(images) -> [V]` by name.
        z: number of standard errors that count as significant.
        effect: smallest change that matters, in standard deviations over the images before RL.
        patience: number of calls in a row that must find the same change before it is an alarm.

    Raises:
        ValueError: an option is not positive.
        TypeError: `held_out` or `statistics` is not a mapping of names to functions.

    Example:
        >>> from iqareward.functional import psnr
        >>> clean = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> monitor = HackingMonitor({"psnr": psnr}, patience=1)
        >>> monitor.calibrate(0.9 * clean, clean, rewards=torch.zeros(8))
        >>> monitor.update(0.6 * clean, clean, rewards=torch.ones(8)).alarms[0]
        'psnr fell from 24.8 to 12.8 while the reward rose from 0 to 1'
    """

    def __init__(
        self,
        held_out: Mapping[str, Callable[..., Tensor]],
        *,
        statistics: Mapping[str, Callable[[Tensor], Tensor]] = STATISTICS,
        z: float = 3.0,
        effect: float = 0.1,
        patience: int = 2,
    ) -> None:
        if not (z > 0 and effect > 0 and patience >= 1):
            raise ValueError(f"HackingMonitor expected z, effect > 0 and patience >= 1, got {z}, {effect}, {patience}.")
        for argument, measures in (("held_out", held_out), ("statistics", statistics)):
            if not (isinstance(measures, Mapping) and all(map(callable, measures.values()))):
                raise TypeError(
                    f"HackingMonitor expected `{argument}` as a mapping of names to functions of images, such as "
                    f"{{'psnr': iqareward.load('psnr')}} for `held_out`, got {measures!r}."
                )
        self.held_out, self.statistics = dict(held_out), dict(statistics)
        self.z, self.effect, self.patience = z, effect, patience
        self.history: list[MonitorReport] = []
        self._before: dict[str, Tensor] = {}
        self._references: dict[str, Tensor] = {}
        self._in_a_row: dict[str, int] = {}

    @property
    def calibrated(self) -> bool:
        """Whether `calibrate` was called."""
        return bool(self._before)

    @torch.no_grad()
    def calibrate(self, images: Tensor, references: Tensor, rewards: Tensor) -> None:
        """Measure how the model before RL restores the held-out inputs.

        Args:
            images: `[V, 3, H, W]` restorations in [0, 1].
            references: ground truth of the same shape.
            rewards: `[V]` training rewards of `images`.
        """
        self._before = self._measure(images, references, rewards)
        clean = {name: statistic(references).float().cpu() for name, statistic in self.statistics.items()}
        self._references = {name: finite_or_nan(values) for name, values in clean.items()}
        self._in_a_row, self.history = {}, []

    @torch.no_grad()
    def update(self, images: Tensor, references: Tensor, rewards: Tensor) -> MonitorReport:
        """Compare the restorations of the same inputs, in the same order, with those before RL.

        Args:
            images: `[V, 3, H, W]` restorations in [0, 1].
            references: ground truth of the same shape.
            rewards: `[V]` training rewards of `images`.

        Returns:
            A `MonitorReport`, also kept in `history`. Inputs without a score are left out of a comparison; with fewer
            than four scored inputs there is no alarm.

        Raises:
            RuntimeError: `calibrate` was not called.
            ValueError: the number of images differs from that of `calibrate`.
        """
        if not self.calibrated:
            raise RuntimeError(
                "HackingMonitor expected calibrate(...) on the model before RL, before its first update."
            )
        if len(images) != len(self._before["reward"]):
            raise ValueError(
                f"HackingMonitor expected the {len(self._before['reward'])} inputs of calibrate, got {len(images)}. "
                "Pass the same held-out inputs every time."
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
        found |= {name: reward(images, references=references) for name, reward in self.held_out.items()}
        found |= {name: statistic(images) for name, statistic in self.statistics.items()}
        return {name: finite_or_nan(values.detach().float().cpu()) for name, values in found.items()}

    def _moved(self, difference: Tensor, before: Tensor) -> tuple[float, int]:
        """Mean change in standard deviations of `before`, and its sign, or 0 if it does not count."""
        scored = difference[difference.isfinite()]
        if len(scored) < _FEWEST_IMAGES:
            return 0.0, 0
        mean, spread = scored.mean(), before[before.isfinite()].std()
        change = float(mean / spread.clamp(min=1e-6 + 1e-3 * before.nanmean().abs()))
        counts = bool(mean.abs() > self.z * scored.std() / len(scored) ** 0.5) and abs(change) > self.effect
        return change, counts * (1 if change > 0 else -1)

    def _suspicious(self, name: str, now: dict[str, Tensor]) -> bool:
        before = self._before[name]
        if name in self.held_out:
            return self._moved(now[name] - before, before)[1] < 0
        clean = self._references[name]
        return self._moved((now[name] - clean).abs() - (before - clean).abs(), before)[1] > 0

    def _sentence(self, name: str, now: dict[str, Tensor]) -> str:
        def step(key: str) -> str:
            return f"from {float(self._before[key].nanmean()):.3g} to {float(now[key].nanmean()):.3g}"

        verb = (
            "fell"
            if name in self.held_out
            else f"left the ground truth's {float(self._references[name].nanmean()):.3g},"
        )
        return f"{name} {verb} {step(name)} while the reward rose {step('reward')}"

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later calls depend on; without `history`."""
        before = {name: values.clone() for name, values in self._before.items()}
        clean = {name: values.clone() for name, values in self._references.items()}
        return {"before": before, "references": clean, "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken; ValueError if that monitor had other measures."""
        watched = {"reward", *self.held_out, *self.statistics}
        if state["before"] and set(state["before"]) != watched:
            raise ValueError(
                f"HackingMonitor expected the state of one that watches {sorted(watched)}, got "
                f"{sorted(state['before'])}. Build it with the same held-out rewards and statistics."
            )
        self._before, self._references = dict(state["before"]), dict(state["references"])
        self._in_a_row = dict(state["in_a_row"])
