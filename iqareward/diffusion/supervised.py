"""Supervised training of a policy, before RL."""

import math
import warnings
from pathlib import Path
from typing import Any

import torch

from iqareward.diffusion.batches import Batch, read_ahead
from iqareward.diffusion.checkpoint import append_line
from iqareward.diffusion.finite import TrainingError
from iqareward.diffusion.learner import averaged_weights, shares_of
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.pairs import InputOrder, Pairs
from iqareward.diffusion.policies.core import Policy
from iqareward.diffusion.progress import progress_bar
from iqareward.diffusion.sharding import in_step
from iqareward.diffusion.updates import MakeOptimizer, Updates, adamw, supervising
from iqareward.seeds import sub_seed

ORDER, NOISE, DROPOUT = range(3)  # purposes of random numbers
_MAX_FAILED_UPDATES = 5


def supervised(
    policy: Policy,
    pairs: Pairs,
    *,
    num_updates: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float = 1e-4,
    optimizer: MakeOptimizer | None = None,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.0,
    rows_at_once: int | None = None,
    accelerator: Any = None,
    num_workers: int = 0,
    history_file: Path | None = None,
    show_progress: bool = True,
    seed: int = 0,
) -> list[float]:
    """Train the policy's model on its own supervised loss, with a cosine decay of the learning rate.

    The random numbers of an update follow from the seed, its number and the inputs' ids. An update whose gradient is
    not finite is skipped with a warning, and an input with a pixel that is not finite is left out of its update.

    Args:
        policy: The model; weights that do not require a gradient stay.
        pairs: Degraded images and their ground truth.
        num_updates: Optimiser steps.
        batch_size: Inputs per update, over all processes.
        learning_rate: Learning rate at the start; it falls to 0.
        weight_decay: Weight decay of AdamW.
        optimizer: Makes another optimiser than AdamW of the weights; the two options above are not used then.
        max_grad_norm: Longer gradients are shortened to this.
        ema_decay: Above 0, the model ends with the running average of its weights.
        rows_at_once: Inputs per pass through the network; all if None.
        accelerator: Accelerate's `Accelerator`; a default one if not given. Its trackers get the loss as "sft/loss".
        num_workers: Processes that read images ahead of need.
        history_file: Gets a JSON line per update; earlier content is removed.
        show_progress: Show a progress bar, or lines where there is no terminal.
        seed: Seed of all random numbers.

    Returns:
        The mean loss of each update.

    Raises:
        ValueError: There are fewer pairs than `batch_size`, or an input has no ground truth.
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

    accelerator = Accelerator() if accelerator is None else accelerator
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    order = InputOrder(len(pairs), batch_size, sub_seed(seed, ORDER))

    def cosine(made: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(
            made, lambda step: (1 + math.cos(math.pi * step / max(num_updates, 1))) / 2
        )

    make = optimizer or adamw(learning_rate, weight_decay)
    updates = Updates(policy, accelerator, make, cosine, max_grad_norm=max_grad_norm)
    average = averaged_weights(shares_of(updates.weights), ema_decay, use_ema_warmup=True) if ema_decay else None
    losses: list[float] = []
    failures, why = 0, ""
    if history_file is not None and accelerator.is_main_process:
        history_file.unlink(missing_ok=True)
    reader = read_ahead(pairs, order, range(num_updates), device, num_workers=num_workers, rank=rank, world=world)
    with progress_bar("SFT", num_updates, shown=show_progress and accelerator.is_main_process) as advance:
        for update, batches in enumerate(reader):
            ids = [input_id for batch in batches for input_id in batch.ids]
            # a process may have no input, if there are fewer than processes
            usable = torch.tensor([0.0, *(batch.usable.sum() for batch in batches)], device=device).sum()
            mean: Any = accelerator.reduce(usable, "mean")  # of the processes, whose gradients are averaged
            count = mean.clamp(min=1 / world)
            total = torch.zeros((), device=device)
            passes = [(part, True) for batch in batches for part in _passes(batch, rows_at_once)]
            if updates.sharded:
                (passes,) = in_step([[part for part, _ in passes]], ["SFT"], accelerator)
            for part, counts in passes:
                noise = Noise(part.ids, seed=sub_seed(seed, NOISE, update), device=device)
                with supervising(policy, seed, DROPOUT, update, *part.ids):
                    with torch.no_grad():
                        condition = policy.condition(part, noise.of(0))
                    losses_of = policy.sft_loss(part.references, condition, noise)  # pyright: ignore[reportArgumentType]
                loss = torch.where(part.usable & counts, losses_of, 0.0).sum() / count
                updates.backward(loss)
                total = total + loss.detach().float()
            (mean_loss,), norm, step = updates.step(total.view(1) / world, update=update + 1)
            failures = failures + 1 if step.failed else 0
            if step.moved and average is not None:
                average.step(shares_of(updates.weights))
            elif step.failed:
                everyone = sorted(gather_object(ids))
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
        average.copy_to(shares_of(updates.weights))
    return losses


def _passes(batch: Batch, rows_at_once: int | None) -> list[Batch]:
    """The batch in parts of at most `rows_at_once` inputs."""
    if batch.references is None:
        raise ValueError(f"supervised expected a ground truth for each input, got none for {batch.ids}.")
    size = rows_at_once or len(batch)
    return [batch.select(slice(start, start + size)) for start in range(0, len(batch), size)]
