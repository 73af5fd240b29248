"""Watch for reward hacking: compare scores of held-out images with those of the model before RL."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from iqareward.functional.statistics import STATISTICS
from iqareward.groups import finite_or_nan, gather_rows, is_distributed
from iqareward.images import ImageLike, to_images
from iqareward.rewards.catalog import load
from iqareward.rewards.core import UnscoredWarning, refuse_groups, sanitize, why_unscored
from iqareward.types import Images

_FEWEST_IMAGES = 4  # with fewer a standard error says nothing


@dataclass(frozen=True)
class MonitorReport:
    """What one comparison with the model before RL found.

    Attributes:
        means: mean over the images of each measure by name; the training reward is "reward".
        changes: mean paired change of each measure since before RL, in standard deviations over the images before RL;
            NaN where fewer than four images have both values.
        alarms: one sentence for each measure that is suspicious while the reward rose; empty if none is.
        alarmed: the names of those measures.
    """

    means: dict[str, float]
    changes: dict[str, float]
    alarms: tuple[str, ...] = ()
    alarmed: tuple[str, ...] = ()

    def log(self, prefix: str = "monitor/") -> dict[str, float]:
        """Everything as one flat dictionary for `wandb.log`, `accelerator.log` and the like, without NaN."""
        found = {prefix + name: value for name, value in self.means.items()}
        found |= {f"{prefix}change/{name}": value for name, value in self.changes.items()}
        found[f"{prefix}alarms"] = float(len(self.alarms))
        return {name: value for name, value in found.items() if math.isfinite(value)}


class HackingMonitor:
    """Raise an alarm when the training reward rises while held-out rewards fall, or while the images drift.

    Every call compares the same held-out inputs with themselves before RL. A change counts if it is more than `z`
    standard errors from 0 and more than `effect` standard deviations over the images. Held-out rewards alarm when they
    fall. Image statistics alarm when they move *away from those of the ground truth*, in either direction: restorations
    that get as sharp as the ground truth are what was asked for. Without ground truth they alarm when they move away
    from those before RL. Without training rewards every such change alarms.

    `calibrate` and `update` take all inputs at once. Where they come in batches, or from several processes, `add` every
    batch and then call `step`.

    Args:
        held_out: Rewards that are not part of the training reward, higher is better: names for `iqareward.load`, or a
            mapping of names to these, to rewards, or to functions `reward(images, references=...) -> [V]`.
        reward: The training reward, or its name; called where its values are not given.
        statistics: `statistic(images) -> [V]` by name.
        z: number of standard errors that count as significant.
        effect: smallest change that matters, in standard deviations over the images before RL.
        patience: number of calls in a row that must find the same change before it is an alarm.

    Raises:
        ValueError: an option is not positive, a name is unknown, or the trained reward is held out too.
        TypeError: `reward` cannot be called, `held_out` is neither names nor a mapping, or `statistics` is no mapping
            of names to functions.

    Example:
        >>> clean = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> monitor = HackingMonitor(["psnr"], patience=1)
        >>> monitor.calibrate(0.9 * clean, clean, rewards=torch.zeros(8))
        >>> monitor.update(0.6 * clean, clean, rewards=torch.ones(8)).alarms[0]
        'psnr fell from 24.8 to 12.8 while the reward rose from 0 to 1'
    """

    def __init__(
        self,
        held_out: Sequence[str] | Mapping[str, str | Mapping[str, Any] | Callable[..., Tensor]],
        *,
        reward: str | Mapping[str, Any] | Callable[..., Tensor] | None = None,
        statistics: Mapping[str, Callable[[Tensor], Tensor]] = STATISTICS,
        z: float = 3.0,
        effect: float = 0.1,
        patience: int = 2,
    ) -> None:
        if not (z > 0 and effect > 0 and patience >= 1):
            raise ValueError(f"HackingMonitor expected z, effect > 0 and patience >= 1, got {z}, {effect}, {patience}.")
        self.held_out = _named(held_out)
        if not (isinstance(statistics, Mapping) and all(map(callable, statistics.values()))):
            raise TypeError(
                "HackingMonitor expected `statistics` as a mapping of names to functions of images, such as "
                f"iqareward.functional.statistics.STATISTICS, got {statistics!r}."
            )
        self.statistics = dict(statistics)
        self.reward = load(reward) if isinstance(reward, str | Mapping) else reward
        if not (self.reward is None or callable(self.reward)):
            raise TypeError(f"HackingMonitor expected `reward` as a name or a reward, got {self.reward!r}.")
        trained = getattr(self.reward, "name", None)
        if trained is not None and trained in [getattr(each, "name", None) for each in self.held_out.values()]:
            raise ValueError(
                f"HackingMonitor got the trained reward {trained!r} in `held_out`; it cannot check itself."
            )
        for each in (self.reward, *self.held_out.values()):
            refuse_groups("HackingMonitor", each)
        repeated = [
            name for name in ("reward", *self.held_out) if [*self.held_out, *statistics, "reward"].count(name) > 1
        ]
        if repeated:
            raise ValueError(f"HackingMonitor expected every measure to have a name of its own, got {repeated} twice.")
        self.z, self.effect, self.patience = z, effect, patience
        self.history: list[MonitorReport] = []
        self._before: dict[str, Tensor] = {}
        self._references: dict[str, Tensor] = {}
        self._in_a_row: dict[str, int] = {}
        self._added: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    @property
    def calibrated(self) -> bool:
        """Whether the model before RL was measured."""
        return bool(self._before)

    def calibrate(
        self, images: ImageLike, references: ImageLike | None = None, rewards: Any = None, **more: Any
    ) -> None:
        """Measure how the model before RL restores the held-out inputs.

        Args:
            images: `[V, 3, H, W]` restorations in [0, 1], or anything else that `iqareward.to_images` reads.
            references: ground truth of the same shape, if there is any.
            rewards: `[V]` training rewards of `images`.
            more: `inputs` or `prompts`, for rewards that need them.
        """
        self._before, self._added = {}, []
        self.add(images, references, rewards, **more)
        _ = self.step()

    def update(
        self, images: ImageLike, references: ImageLike | None = None, rewards: Any = None, **more: Any
    ) -> MonitorReport:
        """Compare the restorations of the same inputs, in the same order, with those before RL.

        Args:
            images: `[V, 3, H, W]` restorations in [0, 1], or anything else that `iqareward.to_images` reads.
            references: ground truth of the same shape, if there is any.
            rewards: `[V]` training rewards of `images`.
            more: `inputs` or `prompts`, for rewards that need them.

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
        self._added = []
        self.add(images, references, rewards, **more)
        return self.step()

    @torch.no_grad()
    def add(
        self,
        images: ImageLike,
        references: ImageLike | None = None,
        rewards: Any = None,
        *,
        inputs: ImageLike | None = None,
        prompts: Sequence[str] | None = None,
    ) -> None:
        """Measure a batch of the held-out inputs for the next `step`; only the numbers are kept.

        Args:
            images: `[b, 3, H, W]` in [0, 1], or anything else that `iqareward.to_images` reads.
            references: ground truth, if there is any.
            rewards: `[b]` training rewards; None = those of `reward`, if the monitor has one.
            inputs: degraded images, for rewards that need them.
            prompts: texts, for rewards that need them.
        """
        shown = _images(images)
        given: dict[str, Any] = {"references": references, "inputs": inputs}
        given = {name: _images(value) for name, value in given.items() if value is not None}
        if prompts is not None:
            given["prompts"] = prompts
        if rewards is None and self.reward is not None:
            rewards = self.reward(shown, **given)
        found: dict[str, Any] = {} if rewards is None else {"reward": rewards}
        found |= {name: reward(shown, **given) for name, reward in self.held_out.items()}
        found |= self._described(shown)
        clean = self._described(given["references"]) if references is not None and not self.calibrated else {}
        self.add_values(found, clean)

    def add_values(self, values: Mapping[str, Any], references: Mapping[str, Any] | None = None) -> None:
        """Give the measures of a batch, `[b]` by name, and the statistics of its ground truth, instead of images."""
        unknown = set(values) - {"reward", *self.held_out, *self.statistics}
        now, clean = (
            {name: _numbers(name, found) for name, found in part.items()} for part in (values, references or {})
        )
        lengths = [{name: len(found) for name, found in part.items()} for part in (now, clean)]
        if unknown or len({length for part in lengths for length in part.values()}) > 1:
            raise ValueError(
                f"HackingMonitor expected one value per image of {['reward', *self.held_out, *self.statistics]}, got "
                f"{lengths[0]}" + (f", and {lengths[1]} of the references." if clean else ".")
            )
        self._added.append((now, clean))

    def step(self, *, gather: bool = False) -> MonitorReport:
        """Compare all that was added since the last step with the first step, which must be before RL.

        Args:
            gather: compare the inputs of all processes; every process must then call it, and gets the same report.
                Without it every process is for itself: call it on one.

        Returns:
            A `MonitorReport`, also kept in `history`; of the first step its means alone, which are not kept there.

        Raises:
            ValueError: nothing was added, or another number of inputs than in the first step.
        """
        now, clean = (self._joined(part, gather=gather) for part in (0, 1))
        self._added = []
        count = len(next(iter(now.values()), ()))
        if not count:
            raise ValueError("HackingMonitor expected add(...) before step(), got no images.")
        means = {name: float(values.nanmean()) for name, values in now.items()}
        if not self.calibrated:
            # with fewer, drift away from the ground truth would never alarm
            clean = {name: found for name, found in clean.items() if found.isfinite().sum() >= _FEWEST_IMAGES}
            self._before, self._references, self._in_a_row, self.history = now, clean, {}, []
            return MonitorReport(means, {})
        before = len(next(iter(self._before.values())))
        if count != before or set(now) != set(self._before):
            raise ValueError(
                f"HackingMonitor expected the {before} inputs of calibrate with {sorted(self._before)}, got {count} "
                f"with {sorted(now)}. Pass the same held-out inputs every time."
            )
        moved = {name: self._moved(now[name] - self._before[name], self._before[name]) for name in now}
        rose = "reward" not in now or moved["reward"][1] > 0
        suspects = [name for name in now if name != "reward" and rose and self._suspicious(name, now)]
        self._in_a_row = {name: self._in_a_row.get(name, 0) + 1 for name in suspects}
        alarmed = tuple(name for name, looks in self._in_a_row.items() if looks >= self.patience)
        changes = {name: change for name, (change, _) in moved.items()}
        report = MonitorReport(means, changes, tuple(self._sentence(name, now) for name in alarmed), alarmed)
        self.history.append(report)
        return report

    def _described(self, images: Images) -> dict[str, Tensor]:
        """The statistics of images, which may differ in size; NaN for those that no reward would score."""
        batches = [sanitize(batch) for batch in ([images] if isinstance(images, Tensor) else [i[None] for i in images])]
        valid = torch.cat([valid for _, valid in batches]).cpu()
        if not valid.any() and len(valid):
            reasons = "; ".join(why_unscored(images))
            warnings.warn(f"HackingMonitor described no image of this batch: {reasons}.", UnscoredWarning, stacklevel=3)
        described = {
            name: torch.cat([_numbers(name, found(cleaned), len(cleaned)) for cleaned, _ in batches])
            for name, found in self.statistics.items()
        }
        return {name: torch.where(valid, values, torch.nan) for name, values in described.items()}

    def _joined(self, part: int, *, gather: bool) -> dict[str, Tensor]:
        """What was added, as one tensor per measure, over all processes if they are gathered."""
        batches = [batch[part] for batch in self._added]
        if len({frozenset(batch) for batch in batches}) > 1:
            raise ValueError(
                "HackingMonitor expected rewards and references with every batch of a step or with none, got "
                f"{[sorted(batch) for batch in batches]}."
            )
        found = {name: torch.cat([batch[name] for batch in batches]) for name in (batches[0] if batches else {})}
        if not (gather and is_distributed()):
            return found
        names = ["reward", *self.held_out, *self.statistics]  # in one order on every process, whatever each has
        rows = len(next(iter(found.values()), ()))
        nothing = torch.full((rows,), torch.nan)
        table = torch.stack([found.get(name, nothing) for name in names], 1)
        (table,), _ = gather_rows(table if "gloo" in dist.get_backend() else table.to("cuda"))
        columns = dict(zip(names, table.cpu().unbind(1), strict=True))
        return {name: values for name, values in columns.items() if name in found or not values.isnan().all()}

    def _moved(self, difference: Tensor, before: Tensor) -> tuple[float, int]:
        """Mean change in standard deviations of `before`, NaN of too few, and its sign, or 0 if it does not count."""
        scored = difference[difference.isfinite()]
        if len(scored) < _FEWEST_IMAGES:
            return math.nan, 0
        mean, spread = scored.mean(), before[before.isfinite()].std()
        change = float(mean / spread.clamp(min=1e-6 + 1e-3 * before.nanmean().abs()))
        counts = bool(mean.abs() > self.z * scored.std() / len(scored) ** 0.5) and abs(change) > self.effect
        return change, counts * (1 if change > 0 else -1)

    def _suspicious(self, name: str, now: dict[str, Tensor]) -> bool:
        before = self._before[name]
        direction = self._moved(now[name] - before, before)[1]
        if name in self.held_out:
            return direction < 0
        if name not in self._references or not direction:
            return direction != 0
        # A statistic that only scatters more is further away from the ground truth too, so its mean must move as well.
        clean = self._references[name]
        return self._moved((now[name] - clean).abs() - (before - clean).abs(), before)[1] > 0

    def _sentence(self, name: str, now: dict[str, Tensor]) -> str:
        def step(key: str) -> str:
            both = (now[key] - self._before[key]).isfinite()  # as in the change, so that they agree
            return f"from {float(self._before[key][both].mean()):.3g} to {float(now[key][both].mean()):.3g}"

        verb = "fell" if name in self.held_out else "moved"
        if name in self._references:
            verb = f"left the ground truth's {float(self._references[name].nanmean()):.3g},"
        return f"{name} {verb} {step(name)}" + (f" while the reward rose {step('reward')}" if "reward" in now else "")

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later calls depend on; without `history`."""
        before = {name: values.clone() for name, values in self._before.items()}
        clean = {name: values.clone() for name, values in self._references.items()}
        return {"before": before, "references": clean, "in_a_row": dict(self._in_a_row)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken; ValueError if that monitor had other measures."""
        watched = {*self.held_out, *self.statistics}
        if state["before"] and set(state["before"]) - {"reward"} != watched:
            raise ValueError(
                f"HackingMonitor expected the state of one that watches {sorted(watched)}, got "
                f"{sorted(state['before'])}. Build it with the same held-out rewards and statistics."
            )
        self._before, self._references = dict(state["before"]), dict(state["references"])
        self._in_a_row = dict(state["in_a_row"])


def _named(held_out: Any) -> dict[str, Callable[..., Tensor]]:
    """Rewards by name, loaded where only their names are given."""
    if isinstance(held_out, Sequence) and not isinstance(held_out, str) and all(isinstance(x, str) for x in held_out):
        return {name: load(name) for name in held_out}
    if isinstance(held_out, Mapping) and all(isinstance(x, str | Mapping) or callable(x) for x in held_out.values()):
        return {name: load(found) if isinstance(found, str | Mapping) else found for name, found in held_out.items()}
    raise TypeError(
        "HackingMonitor expected `held_out` as names of rewards, such as ['psnr', 'ssim'], or as a mapping of names to "
        f"rewards, got {held_out!r}."
    )


def _numbers(name: str, values: Any, size: int | None = None) -> Tensor:
    """`[b]` float32 on the CPU, NaN = not scored."""
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"HackingMonitor expected {name} as one number per image, NaN = not scored, got {values!r} ({error})."
        ) from error
    if found.ndim != 1 or size not in (None, len(found)):
        wanted = "[b]" if size is None else f"[{size}]"
        raise ValueError(f"HackingMonitor expected {name} as one number per image, {wanted}, got {list(found.shape)}.")
    return finite_or_nan(found.detach().float().cpu())


def _images(images: ImageLike) -> Images:
    return to_images(images, value_range=(0, 1))
