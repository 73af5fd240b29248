"""Supervised fine-tuning: the stage before RL, and the baseline that RL has to beat."""

import warnings
from pathlib import Path
from typing import Any

import torch

from iqareward.diffusion.checkpoint import append_line
from iqareward.diffusion.finite import TrainingError, require_usable_weights, step_if_finite
from iqareward.diffusion.objectives import sft_loss
from iqareward.diffusion.pairs import InputOrder, Pairs, read_batch
from iqareward.diffusion.policies import Policy
from iqareward.diffusion.progress import progress_bar
from iqareward.seeds import sub_seed

ORDER, NOISE = range(2)  # purposes of random numbers
MAX_FAILED_UPDATES = 5


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
    order = InputOrder(len(pairs), batch_size, sub_seed(seed, ORDER))
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
            noise_seed = sub_seed(seed, NOISE, update)
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
            if failures == MAX_FAILED_UPDATES:
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
