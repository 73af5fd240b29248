"""Turn losses into optimiser steps: the mixed updates of RL, and the supervised training before it."""

import copy
import math
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iqareward.diffusion.checkpoint import append_line, load_trained_weights, trained_weights
from iqareward.diffusion.finite import TrainingError, is_count, require_options, require_usable_weights, step_if_finite
from iqareward.diffusion.objectives import Objective, RLTerm, sft_loss
from iqareward.diffusion.pairs import InputOrder, Pairs, read_batch
from iqareward.diffusion.policies import Policy, unwrapped
from iqareward.diffusion.progress import progress_bar
from iqareward.diffusion.rollouts import Experience
from iqareward.seeds import sub_seed
from iqareward.weighting import GradientBalance, LossWeights, gradient_norm, mixed_loss

OBJECTIVE, SFT = 1, 2  # purposes of random numbers in RL
SFT_ORDER, SFT_NOISE = 0, 1  # and in `supervised`
_MAX_FAILED_UPDATES = 5


@dataclass(frozen=True)
class TrainConfig:
    """Options of the optimiser and of the mixed RL and SFT loss.

    Args:
        learning_rate: Learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        max_grad_norm: Longer gradients are shortened to this.
        inputs_per_update: Inputs of one optimiser step, over all processes.
        micro_batch: Inputs per backward pass; fewer take less memory and give the same step.
        kl_beta: Weight of the divergence from the policy before RL.
        sft_scale: Factor of the SFT loss; "balanced" makes both gradients equally long (`GradientBalance`), measured on
            the first part of the update, so it depends on `micro_batch` and the number of processes.
        balance_every: Updates between two measurements of the gradients.
        std_floor: If the rewards of an input spread no more than this, it has no RL signal; set it to the noise of the
            reward.
        ema_decay: Decay of the averaged weights that validation uses; 0 uses the weights themselves.
        max_failed_updates: Failed updates in a row before the run stops. An update fails if its gradient is not finite,
            and is then skipped, or if the reward scores no image.

    Raises:
        ValueError: An option is out of its range.

    Example:
        >>> TrainConfig(inputs_per_update=8, micro_batch=2, sft_scale="balanced").kl_beta
        0.0
    """

    learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    inputs_per_update: int = 8
    micro_batch: int | None = None
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
            "micro_batch": (f"{count}, or None", self.micro_batch is None or is_count(self.micro_batch)),
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


class Learner:
    """Takes optimiser steps; the policy's module is replaced by the one that accelerate prepares."""

    def __init__(self, policy: Policy, objective: Objective, config: TrainConfig, accelerator: Any) -> None:
        self.policy, self.objective, self.options, self.accelerator = policy, objective, config, accelerator
        adapters = hasattr(policy.model, "disable_adapter")
        # `reference_policy` takes no gradient of it. Its weights keep their flag: torch.matmul chooses another kernel
        # for weights without one, and the divergence of the same weights would then not be exactly zero.
        frozen = copy.deepcopy(policy.model) if config.kl_beta and not adapters else None
        self.frozen = None if frozen is None else accelerator.prepare_model(frozen, evaluation_mode=True)
        weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
        rate, decay = config.learning_rate, config.weight_decay
        optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=decay)
        policy.model, self.optimizer = accelerator.prepare(policy.model, optimizer)
        self.weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
        self.balance = GradientBalance() if config.sft_scale == "balanced" else None
        self.ema = _average(self.weights, config.ema_decay) if config.ema_decay else None

    def step(self, experience: Experience, weights: LossWeights, *, update: int, seed: int) -> dict[str, Any]:
        """Compute the terms of the loss part by part, then move the weights once, if the gradient is finite.

        Otherwise weights, averages and the optimiser stay as they are, in all processes alike.

        Args:
            experience: The inputs of this process.
            weights: `[B]` RL and SFT weights.
            update: Number of the optimiser step.
            seed: Seed of the noise of both losses.

        Returns:
            Means over the inputs of all processes that have a weight: `rl_loss`, `sft_loss`, `kl`; `grad_norm` before
            clipping; `skipped`, 1 if the gradient was not finite; and `problem`, the reason in words. While a scaler
            of fp16 searches its scale, steps are skipped without a problem.
        """
        terms, size = list(self.objective.terms(experience)), self.options.micro_batch or len(experience)
        parts = [slice(start, min(start + size, len(experience))) for start in range(0, len(experience), size)]
        work = [(part, term) for part in parts for term in terms]
        measure = self.balance is not None and update % self.options.balance_every == 0
        losses: list[Tensor] = []
        for number, (part, term) in enumerate(work):
            whole = number == len(work) - 1
            with nullcontext() if whole else self.accelerator.no_sync(self.policy.model):
                inputs = experience.select(part)
                rl, sft = self._losses(inputs, term, seed)
                if measure and number == 0:
                    self._balance(rl.loss.mean(), sft.mean())
                share = len(inputs) / len(experience) / len(terms)
                loss = self._mixed(rl, sft, LossWeights(weights.rl[part], weights.sft[part]))
                self.accelerator.backward(loss * share)
            losses.append(torch.stack([rl.loss, sft, rl.kl]).detach())
        norm = self.accelerator.clip_grad_norm_(self.weights, self.options.max_grad_norm)
        counted = torch.cat([(weights.rl + weights.sft > 0)[part] for part, _ in work])
        sums = torch.where(counted, torch.cat(losses, 1), 0.0).sum(1)
        # The only wait before the step. Reduced, the figures are the same everywhere, and so is what follows from them.
        reduced = self.accelerator.reduce(torch.cat([sums, counted.sum().view(1), norm.float().view(1)]), "sum")
        *means, count, norm = reduced.tolist()
        record: dict[str, Any] = {
            name: mean / max(count, 1) for name, mean in zip(("rl_loss", "sft_loss", "kl"), means, strict=True)
        }
        record["grad_norm"] = norm / self.accelerator.num_processes
        step = step_if_finite(self.accelerator, self.optimizer, norm)
        record |= {"skipped": int(not step.moved), "problem": ""}
        if step.moved:
            self._check_and_average(update, record["grad_norm"])
        elif step.failed:
            ids = [input_id for part, _ in work for input_id in experience.ids[part]]
            record["problem"] = f"skipped, because the {_cause(torch.cat(losses, 1), ids)} is not finite"
        return record

    def _check_and_average(self, update: int, norm: float) -> None:
        rate = self.options.learning_rate
        require_usable_weights(self.weights, update=update + 1, norm=norm, learning_rate=rate)
        if self.ema is not None:
            self.ema.step(self.weights)

    def _losses(self, experience: Experience, term: int, seed: int) -> tuple[RLTerm, Tensor]:
        """The RL term and the SFT loss `[B]`, both with fresh noise for every term."""
        kl = self.options.kl_beta > 0
        rl = self.objective(self.policy, experience, term, seed=sub_seed(seed, OBJECTIVE), frozen=self.frozen, kl=kl)
        ids, references, condition = experience.ids, experience.references, experience.condition
        return rl, sft_loss(self.policy, ids, references, condition, seed=sub_seed(seed, SFT), term=term)

    def _mixed(self, rl: RLTerm, sft: Tensor, weights: LossWeights) -> Tensor:
        scale = self.options.sft_scale if self.balance is None else self.balance.sft_scale
        assert not isinstance(scale, str), "'balanced' has a balance"
        return mixed_loss(rl.loss, sft, weights, rl.kl, beta=self.options.kl_beta, sft_scale=scale)

    def _balance(self, rl_loss: Tensor, sft_loss: Tensor) -> None:
        assert self.balance is not None, "only called to balance"
        norms = torch.stack([gradient_norm(loss, self.weights) for loss in (rl_loss, sft_loss)])
        rl_norm, sft_norm = self.accelerator.reduce(norms, "mean").unbind()
        self.balance.update(rl_norm=rl_norm, sft_norm=sft_norm)

    def named_weights(self) -> dict[str, Tensor]:
        """The weights that train, by name, as they are."""
        named = unwrapped(self.policy.model).named_parameters()
        return {name: weight.detach() for name, weight in named if weight.requires_grad}

    @contextmanager
    def averaged(self) -> Generator[None]:
        """Within this context the model has its averaged weights, if it keeps any."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.weights)
        self.ema.copy_to(self.weights)
        try:
            yield
        finally:
            self.ema.restore(self.weights)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        scaler = self.accelerator.scaler
        return {
            "model": trained_weights(unwrapped(self.policy.model)),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "balance": None if self.balance is None else self.balance.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken, with the learning rate and decays of this learner."""
        load_trained_weights(unwrapped(self.policy.model), state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = self.options.learning_rate, self.options.weight_decay
        for name, own in (("balance", self.balance), ("ema", self.ema), ("scaler", self.accelerator.scaler)):
            if own is not None and state[name] is not None:
                own.load_state_dict(state[name])
        if self.ema is not None:
            if state["ema"] is None:
                self.ema = _average(self.weights, self.options.ema_decay)
            self.ema.decay = self.options.ema_decay
            self.ema.to(self.accelerator.device)
        if self.balance is not None and self.balance.rl_norm is not None and self.balance.sft_norm is not None:
            device = self.accelerator.device
            self.balance.rl_norm, self.balance.sft_norm = (
                norm.to(device) for norm in (self.balance.rl_norm, self.balance.sft_norm)
            )


def _cause(losses: Tensor, ids: Sequence[int]) -> str:
    """What made a gradient not finite: the inputs of any process whose `losses` `[3, N]` show it, or else all."""
    from accelerate.utils import gather_object

    finite = losses.isfinite().all(0).tolist()
    bad = gather_object([input_id for input_id, good in zip(ids, finite, strict=True) if not good])
    everyone = gather_object(list(ids))
    return f"loss of inputs {sorted(set(bad))}" if bad else f"gradient over inputs {sorted(set(everyone))}"


def _average(weights: Sequence[Tensor], decay: float) -> Any:
    from diffusers.training_utils import EMAModel

    return EMAModel(weights, decay=decay)  # pyright: ignore[reportArgumentType]


def supervised(
    policy: Policy,
    pairs: Pairs,
    *,
    num_updates: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 1e-4,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.0,
    accelerator: Any = None,
    history_file: Path | None = None,
    show_progress: bool = True,
    seed: int = 0,
) -> list[float]:
    """Train the policy's model on its own supervised loss, with AdamW and a cosine decay of the learning rate.

    The random numbers of an update follow from the seed, its number and the inputs' ids. `policy.model` is the bare
    module again when this returns, ready for `DifficultyAdaptiveTrainer`. An update whose gradient is not finite is
    skipped with a warning, and an input with a pixel that is not finite is left out of its update.

    Args:
        policy: The model; weights that do not require a gradient stay.
        pairs: Degraded images and their ground truth.
        num_updates: Optimiser steps.
        batch_size: Inputs per update, over all processes.
        learning_rate: Learning rate at the start; it falls to 0.
        weight_decay: Weight decay of AdamW.
        max_grad_norm: Longer gradients are shortened to this.
        ema_decay: Above 0, the model ends with the running average of its weights.
        accelerator: Accelerate's `Accelerator`; a default one if not given. Its trackers get the loss as "sft/loss".
        history_file: Gets a JSON line per update; earlier content is removed.
        show_progress: Show a progress bar, or lines where there is no terminal.
        seed: Seed of all random numbers.

    Returns:
        The mean loss of each update.

    Raises:
        ValueError: There are fewer pairs than `batch_size`.
        TrainingError: A step made weights that are not finite; or five updates in a row, or the last one, were skipped.

    Example:
        >>> from iqareward.diffusion import SyntheticPairs, build_restorer
        >>> options = {"num_updates": 2, "batch_size": 2, "learning_rate": 1e-3, "show_progress": False}
        >>> len(supervised(build_restorer((8, 16)), SyntheticPairs(4, size=16), **options))
        2

    References:
        Loshchilov, Hutter, Decoupled Weight Decay Regularization, 2017, https://arxiv.org/abs/1711.05101
    """
    from accelerate import Accelerator
    from accelerate.utils import gather_object
    from diffusers.training_utils import EMAModel

    accelerator = Accelerator() if accelerator is None else accelerator
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    order = InputOrder(len(pairs), batch_size, sub_seed(seed, SFT_ORDER))
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=weight_decay)
    policy.model, optimizer = accelerator.prepare(policy.model, optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, max(num_updates, 1))
    average = EMAModel(weights, decay=ema_decay, use_ema_warmup=True) if ema_decay else None
    losses: list[float] = []
    failures, why = 0, ""
    if history_file is not None and accelerator.is_main_process:
        history_file.unlink(missing_ok=True)
    with progress_bar("SFT", num_updates, shown=show_progress and accelerator.is_main_process) as advance:
        for update in range(num_updates):
            ids = order.ids(update, rank=rank, world=world)
            degraded, references, usable = read_batch(pairs, ids, device)
            noise_seed = sub_seed(seed, SFT_NOISE, update)
            with torch.no_grad():
                condition = policy.condition(degraded)
            losses_of = sft_loss(policy, ids, references, condition, seed=noise_seed)
            loss = (usable * losses_of).sum() / usable.sum().clamp(min=1)
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(weights, max_grad_norm)
            figures: Any = accelerator.reduce(torch.stack([norm.float(), loss.detach().float()]), "mean")
            norm, mean_loss = figures.tolist()
            step = step_if_finite(accelerator, optimizer, norm)
            schedule.step()
            failures = failures + 1 if step.failed else 0
            if step.moved:
                require_usable_weights(weights, update=update + 1, norm=norm, learning_rate=learning_rate)
                if average is not None:
                    average.step(weights)
            elif step.failed:
                everyone = sorted(gather_object(list(ids)))
                why = f"the gradient over inputs {everyone} is not finite"
                warnings.warn(f"update {update + 1} of SFT: skipped, because {why}", RuntimeWarning, stacklevel=2)
            record = {"update": update + 1, "sft_loss": mean_loss, "grad_norm": norm, "skipped": int(not step.moved)}
            if history_file is not None and accelerator.is_main_process:
                append_line(history_file, record)
            accelerator.log({"sft/loss": mean_loss, "sft/grad_norm": norm}, update + 1)
            if failures == _MAX_FAILED_UPDATES:
                break
            losses.append(mean_loss)
            advance(record)
    policy.model = accelerator.unwrap_model(policy.model, keep_fp32_wrapper=False)
    if failures:
        raise TrainingError(
            f"SFT ended with failed updates: {why}, {failures} times in a row. The weights may be finite and yet "
            f"useless. Look at those inputs, and lower learning_rate, which is {learning_rate:g}."
        )
    if average is not None:
        average.copy_to(weights)
    return losses
