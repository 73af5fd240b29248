"""Turn experiences into optimiser steps: RL where inputs are hard, SFT as they come near their ground truth."""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iqareward.diffusion.checkpoint import load_trained_weights, training_weights
from iqareward.diffusion.conditions import select
from iqareward.diffusion.finite import TrainingError, is_count, require_options
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.objectives import Objective
from iqareward.diffusion.policies.core import Policy, Versions, evaluating
from iqareward.diffusion.rollouts import Experience
from iqareward.diffusion.sharding import in_step, local, sharded_like, share_of
from iqareward.diffusion.updates import MakeOptimizer, MakeSchedule, Updates, adamw, supervising
from iqareward.seeds import sub_seed
from iqareward.weighting import GradientBalance, LossWeights, gradient_norm

OBJECTIVE, SFT, DROPOUT = 1, 2, 3  # purposes of random numbers


@dataclass(frozen=True)
class TrainConfig:
    """Options of the optimiser and of the mixed RL and SFT loss.

    Args:
        learning_rate: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        optimizer: Makes another optimiser, e.g. `lambda weights: bnb.optim.AdamW8bit(weights, lr=1e-5)`; the two
            options above are not used then.
        lr_schedule: Makes a learning-rate schedule of the optimiser, stepped with it, e.g. one of diffusers'
            `get_scheduler`; constant if not given.
        max_grad_norm: Longer gradients are shortened to this.
        inputs_per_update: Inputs whose rollouts are sampled for one update, over all processes.
        minibatches: Optimiser steps that share the inputs of an update.
        epochs: How often the rollouts of an update are used.
        rows_at_once: Rollouts, or inputs in SFT, per pass through the network; fewer take less memory and give the same
            step, except for the masks of dropout in SFT. All if None.
        kl_beta: Weight of the divergence from the policy before RL.
        sft_scale: Factor of the SFT loss; "balanced" makes both gradients equally long (`GradientBalance`), measured on
            the first parts of the update, so it depends on `rows_at_once` and the number of processes.
        balance_every: Updates between two measurements of the gradients.
        std_floor: If the rewards of an input spread no more than this, it has no RL signal; set it to the noise of the
            reward.
        ema_decay: Decay of the averaged weights that validation uses; 0 uses the weights themselves.
        max_failed_updates: Failed updates in a row before the run stops. An update fails if its gradient is not finite,
            and is then skipped, or if the reward scores no image.

    Raises:
        ValueError: An option is out of its range.

    Example:
        >>> TrainConfig(inputs_per_update=8, minibatches=4, epochs=2).kl_beta  # eight optimiser steps per update
        0.0
    """

    learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    optimizer: MakeOptimizer | None = None
    lr_schedule: MakeSchedule | None = None
    max_grad_norm: float = 1.0
    inputs_per_update: int = 8
    minibatches: int = 1
    epochs: int = 1
    rows_at_once: int | None = 4
    kl_beta: float = 0.0
    sft_scale: float | str = 1.0
    balance_every: int = 10
    std_floor: float = 0.0
    ema_decay: float = 0.0
    max_failed_updates: int = 5

    def __post_init__(self) -> None:
        scale, count = self.sft_scale, "as an integer >= 1"
        requirements = {
            "learning_rate": ("in (0, inf)", 0 < self.learning_rate < math.inf),
            "weight_decay": ("in [0, inf)", 0 <= self.weight_decay < math.inf),
            "max_grad_norm": ("in (0, inf]", self.max_grad_norm > 0),
            "inputs_per_update": (count, is_count(self.inputs_per_update)),
            "minibatches": (count, is_count(self.minibatches)),
            "epochs": (count, is_count(self.epochs)),
            "rows_at_once": (f"{count}, or None", self.rows_at_once is None or is_count(self.rows_at_once)),
            "kl_beta": ("in [0, inf)", 0 <= self.kl_beta < math.inf),
            "sft_scale": (
                "in [0, inf), or 'balanced'",
                scale == "balanced" if isinstance(scale, str) else 0 <= scale < math.inf,
            ),
            "balance_every": (count, is_count(self.balance_every)),
            "std_floor": ("in [0, inf]", self.std_floor >= 0),
            "ema_decay": ("in [0, 1)", 0 <= self.ema_decay < 1),
            "max_failed_updates": (count, is_count(self.max_failed_updates)),
        }
        require_options(self, requirements)


@dataclass(frozen=True)
class _Part:
    """Some inputs of an experience, with their weights `[b]`."""

    experience: Experience
    inputs: slice
    weights: LossWeights

    def pieces(self, first: int, stop: int, size: int | None) -> list[slice]:
        """Slices of at most `size` rows."""
        size = size or stop - first
        return [slice(start, min(start + size, stop)) for start in range(first, stop, size)]


class _Pass(NamedTuple):
    """A pass forward and back: rows of a part, the term of the objective, and what each row's loss is multiplied by."""

    part: _Part
    rows: slice
    term: int
    share: float


def _weights_of(weights: LossWeights, rows: slice, first: int, counts: bool) -> LossWeights:
    """The weights of some rows, which are numbered from `first`; 0 if their pass does not count."""
    own = weights.rows(slice(rows.start - first, rows.stop - first))
    return own if counts else LossWeights(torch.zeros_like(own.rl), torch.zeros_like(own.sft))


class Learner:
    """Takes the optimiser steps of an update."""

    def __init__(self, policy: Policy, objective: Objective, config: TrainConfig, accelerator: Any) -> None:
        self.policy, self.objective, self.options, self.accelerator = policy, objective, config, accelerator
        make = config.optimizer or adamw(config.learning_rate, config.weight_decay)
        self.updates = Updates(policy, accelerator, make, config.lr_schedule, max_grad_norm=config.max_grad_norm)
        self.weights = self.updates.weights
        if self.updates.sharded and config.sft_scale == "balanced":
            raise ValueError(
                "The trainer expected, with FSDP, a number as sft_scale, got 'balanced', which measures gradients of "
                "whole weights. Measure the scale once without FSDP, or set one."
            )
        compared = config.kl_beta > 0 or objective.needs_reference
        self.versions = Versions(policy, reference=compared, old=objective.keeps_old)
        self.balance = GradientBalance() if config.sft_scale == "balanced" else None
        self.ema = averaged_weights(self._shares, config.ema_decay) if config.ema_decay else None

    @property
    def _shares(self) -> list[Tensor]:
        """What this process has of the weights: all of them, if the model is not sharded."""
        return shares_of(self.weights)

    def learn(
        self, experiences: Sequence[Experience], weights: LossWeights, *, update: int, seed: int
    ) -> dict[str, Any]:
        """Take the optimiser steps of one update.

        A step whose gradient is not finite leaves weights, averages and the optimiser as they are, in all processes
        alike.

        Args:
            experiences: The inputs of this process, parted by their sizes.
            weights: `[B]` RL and SFT weights of all of them, in this order.
            update: Number of the update.
            seed: Seed of the noise of both losses.

        Returns:
            Means over the inputs of all processes that have a weight: `rl_loss`, `sft_loss`, `kl`; `ratio`, the mean
            distance of importance ratios from 1; `grad_norm` before clipping; `skipped`, the share of steps whose
            gradient was not finite; and `problem`, the reason in words. While a scaler of fp16 searches its scale,
            steps are skipped without a problem.
        """
        records: list[dict[str, Any]] = []
        steps = self.options.epochs * self.options.minibatches
        for step in range(steps):
            parts = _minibatch(experiences, weights, step % self.options.minibatches, self.options.minibatches)
            measure = self.balance is not None and step == 0 and update % self.options.balance_every == 0
            records.append(self._step(parts, update=update, seed=sub_seed(seed, step), measure=measure))
        if self.objective.keeps_old:
            self.versions.follow(self.objective.old_decay(update))
        problems = [record.pop("problem") for record in records]
        counts = [record.pop("count") for record in records]
        means = {name: sum(record[name] for record in records) / steps for name in ("grad_norm", "skipped")}
        for name in ("rl_loss", "sft_loss", "kl", "ratio"):
            means[name] = sum(record[name] for record in records) / max(sum(counts), 1)
        return means | {"problem": next((text for text in problems if text), "")}

    def _step(self, parts: Sequence[_Part], *, update: int, seed: int, measure: bool) -> dict[str, Any]:
        taking_part = torch.cat([part.weights.taking_part for part in parts])
        # Over all processes, divided by their number because gradients are averaged: an input counts alike everywhere.
        everyones: Any = self.accelerator.reduce(taking_part.sum().float(), "mean")
        count = everyones.clamp(min=1 / self.accelerator.num_processes)
        rl_passes, sft_passes = self._rl_passes(parts), self._sft_passes(parts)
        if self.updates.sharded:
            rl_steps, sft_steps = in_step([rl_passes, sft_passes], ["RL", "SFT"], self.accelerator)
        else:
            rl_steps, sft_steps = ([(each, True) for each in kind] for kind in (rl_passes, sft_passes))
        rl = self._reinforce(rl_steps, count, seed, measure)
        sft = self._supervise(sft_steps, count, seed, measure)
        if self.balance is not None and measure:
            # a process may have measured none, for instance because its inputs have no ground truth
            nothing = torch.zeros(2, device=count.device)
            found = [
                nothing if each.norm is None else torch.stack([each.norm.float(), count.new_ones(())])
                for each in (rl, sft)
            ]
            sums, counts = self.accelerator.reduce(torch.stack(found, 1), "sum").unbind()
            rl_norm, sft_norm = (sums / counts).unbind()
            self.balance.update(rl_norm=rl_norm, sft_norm=sft_norm)
        figures = torch.stack([rl.loss, sft.loss, rl.kl, rl.ratio, taking_part.sum().float()])
        totals, norm, step = self.updates.step(figures, update=update + 1)
        *sums, total = totals
        names = ("rl_loss", "sft_loss", "kl", "ratio")
        record: dict[str, Any] = dict(zip(names, sums, strict=True)) | {"count": total}
        record |= {"grad_norm": norm, "skipped": float(not step.moved), "problem": ""}
        if step.moved and self.ema is not None:
            self.ema.step(self._shares)
        elif step.failed:
            record["problem"] = f"skipped, because the {self._cause([*rl.watched, *sft.watched], parts)} is not finite"
        return record

    def _rl_passes(self, parts: Sequence[_Part]) -> list[_Pass]:
        """The rollouts and terms of each pass of the RL loss."""
        passes: list[_Pass] = []
        for part in parts:
            size, at_once = part.experience.group_size, self.options.rows_at_once
            terms = list(self.objective.terms(part.experience))
            if not terms:
                raise TrainingError(
                    f"{type(self.objective).__name__} has nothing to learn from: no step of the rollouts is "
                    "stochastic. Raise `eta` of RolloutConfig, widen its window, or take another objective."
                )
            if at_once is not None and self.objective.whole_groups:
                at_once = max(at_once // size, 1) * size
            rows = part.pieces(part.inputs.start * size, part.inputs.stop * size, at_once)
            passes += [_Pass(part, piece, term, 1 / (size * len(terms))) for piece in rows for term in terms]
        return passes

    def _sft_passes(self, parts: Sequence[_Part]) -> list[_Pass]:
        """The inputs of each pass of the SFT loss: those that have a ground truth."""
        return [
            _Pass(part, piece, 0, 1.0)
            for part in parts
            if part.experience.batch.references is not None
            for piece in part.pieces(part.inputs.start, part.inputs.stop, self.options.rows_at_once)
        ]

    def _reinforce(self, passes: Sequence[tuple[_Pass, bool]], count: Tensor, seed: int, measure: bool) -> "_Figures":
        """Add the gradient of the RL loss, pass by pass."""
        found, rollouts, last = _Figures.none(count.device), None, None
        with evaluating(self.policy):
            for (part, piece, term, share), counts in passes:
                size = part.experience.group_size
                if rollouts is None or last != (id(part), piece):
                    rollouts, last = part.experience.rollouts(piece, seed=sub_seed(seed, OBJECTIVE)), (id(part), piece)
                per_row = LossWeights(*(each.repeat_interleave(size) for each in part.weights))
                own = _weights_of(per_row, piece, part.inputs.start * size, counts)
                rl = self.objective(self.policy, rollouts, term, versions=self.versions, kl=self.options.kl_beta > 0)
                if measure and found.norm is None:
                    found.norm = gradient_norm(rl.loss.mean(), self.weights)
                loss = own.rl * torch.where(own.rl > 0, rl.loss, 0.0)
                loss = loss + self.options.kl_beta * torch.where(own.taking_part, rl.kl, 0.0)
                self.updates.backward(loss.sum() * share / count)
                counted = own.taking_part
                found.add(rl.loss, counted, share)
                found.kl = found.kl + torch.where(counted, rl.kl.detach(), 0.0).sum() * share
                if rl.ratio is not None:
                    off = (rl.ratio.detach() - 1).abs()
                    found.ratio = found.ratio + torch.where(counted, off, 0.0).sum() * share
                found.watch(rl.loss, rollouts.batch.ids)
        return found

    def _supervise(self, passes: Sequence[tuple[_Pass, bool]], count: Tensor, seed: int, measure: bool) -> "_Figures":
        """Add the gradient of the SFT loss, pass by pass."""
        found, scale = _Figures.none(count.device), self._sft_scale
        for (part, piece, _, _), counts in passes:
            own = _weights_of(part.weights, piece, part.inputs.start, counts)
            batch = part.experience.batch.select(piece)
            noise = Noise(batch.ids, seed=sub_seed(seed, SFT), device=count.device)
            assert batch.references is not None, "selected from a batch that has them"
            # Seeded by the inputs, so that dropout does not depend on how processes share them.
            with supervising(self.policy, seed, DROPOUT, *batch.ids):
                losses = self.policy.sft_loss(batch.references, select(part.experience.condition, piece), noise)
            if measure and found.norm is None:
                found.norm = gradient_norm(losses.mean(), self.weights)
            loss = scale * own.sft * torch.where(own.sft > 0, losses, 0.0)
            self.updates.backward(loss.sum() / count)
            found.add(losses, own.taking_part, 1.0)
            found.watch(losses, batch.ids)
        return found

    @property
    def _sft_scale(self) -> float | Tensor:
        scale = self.options.sft_scale if self.balance is None else self.balance.sft_scale
        assert not isinstance(scale, str), "'balanced' has a balance"
        return scale

    def _cause(self, watched: Sequence[tuple[Tensor, tuple[int, ...]]], parts: Sequence[_Part]) -> str:
        """What made a gradient not finite: the inputs of any process whose loss shows it, or else all."""
        from accelerate.utils import gather_object

        bad = [
            input_id
            for losses, ids in watched
            for input_id, finite in zip(ids, losses.isfinite().tolist(), strict=True)
            if not finite
        ]
        ids = [input_id for part in parts for input_id in part.experience.batch.ids[part.inputs]]
        everyones_bad, everyone = gather_object(bad), gather_object(ids)
        if everyones_bad:
            return f"loss of inputs {sorted(set(everyones_bad))}"
        return f"gradient over inputs {sorted(set(everyone))}"

    def named_weights(self) -> dict[str, Tensor]:
        """The weights that train, by name, as they are."""
        return {name: weight.detach() for name, weight in training_weights(self.policy.model).items()}

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Within this context the model has its averaged weights, if it keeps any."""
        if self.ema is None:
            yield
            return
        self.ema.store(self._shares)
        self.ema.copy_to(self._shares)
        try:
            yield
        finally:
            self.ema.restore(self._shares)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on; of a sharded model, in shares."""
        ema = None if self.ema is None else self.ema.state_dict()
        if ema is not None:
            pairs = zip(ema["shadow_params"], self.weights, strict=True)
            ema = ema | {"shadow_params": [sharded_like(share, weight) for share, weight in pairs]}
        return {
            "model": {name: weight.to("cpu", copy=True) for name, weight in self.named_weights().items()},
            "updates": self.updates.state_dict(),
            "versions": self.versions.state_dict(),
            "balance": None if self.balance is None else self.balance.state_dict(),
            "ema": ema,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken, with the learning rate and decays of this learner."""
        load_trained_weights(self.policy.model, state["model"])
        self.updates.load_state_dict(state["updates"])
        self.versions.load_state_dict(state["versions"])
        if self.options.optimizer is None and self.options.lr_schedule is None:
            for group in self.updates.optimizer.param_groups:
                group["lr"], group["weight_decay"] = self.options.learning_rate, self.options.weight_decay
        if self.balance is not None and state["balance"] is not None:
            self.balance.load_state_dict(state["balance"])
        if self.ema is not None:
            if state["ema"] is None:
                self.ema = averaged_weights(self._shares, self.options.ema_decay)
            else:
                pairs = zip(state["ema"]["shadow_params"], self.weights, strict=True)
                shares = [share_of(value, weight) for value, weight in pairs]
                self.ema.load_state_dict(state["ema"] | {"shadow_params": shares})
            self.ema.decay = self.options.ema_decay
            self.ema.to(self.accelerator.device)
        if self.balance is not None and self.balance.rl_norm is not None and self.balance.sft_norm is not None:
            device = self.accelerator.device
            self.balance.rl_norm, self.balance.sft_norm = (
                norm.to(device) for norm in (self.balance.rl_norm, self.balance.sft_norm)
            )


@dataclass
class _Figures:
    """What is logged of one of the two losses: sums over inputs that have a weight."""

    loss: Tensor
    kl: Tensor
    ratio: Tensor
    watched: list[tuple[Tensor, tuple[int, ...]]]  # losses and the ids of their rows
    norm: Tensor | None = None  # of the gradient of the first piece

    @classmethod
    def none(cls, device: torch.device) -> "_Figures":
        zero = torch.zeros((), device=device)
        return cls(zero, zero, zero, [])

    def add(self, losses: Tensor, counted: Tensor, share: float) -> None:
        self.loss = self.loss + torch.where(counted, losses.detach().float(), 0.0).sum() * share

    def watch(self, losses: Tensor, ids: tuple[int, ...]) -> None:
        self.watched.append((losses.detach(), ids))


def _minibatch(experiences: Sequence[Experience], weights: LossWeights, place: int, parts: int) -> list[_Part]:
    """Minibatch `place` of `parts`: a share of all inputs, in order, parted by experience."""
    total = sum(map(len, experiences))
    first, stop = total * place // parts, total * (place + 1) // parts
    found, before = [], 0
    for experience in experiences:
        low, high = max(first - before, 0), min(stop - before, len(experience))
        if low < high:
            found.append(_Part(experience, slice(low, high), weights.rows(slice(before + low, before + high))))
        before += len(experience)
    return found


def shares_of(weights: Sequence[Tensor]) -> list[Tensor]:
    """What this process has of weights, as `averaged_weights` takes it, which only copies what needs no gradient."""
    return [local(weight).requires_grad_() for weight in weights]


def averaged_weights(weights: Sequence[Tensor], decay: float, **options: Any) -> Any:
    """The running average of weights, as diffusers keeps it."""
    from diffusers.training_utils import EMAModel

    return EMAModel(weights, decay=decay, **options)  # pyright: ignore[reportArgumentType]
