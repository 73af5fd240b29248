"""The reference loop: RL where inputs are hard, SFT as they come near their ground truth."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from iqareward.advantages import RewardMemory
from iqareward.difficulty import rmse
from iqareward.diffusion.batches import InputOrder
from iqareward.diffusion.checkpoint import load_state, save_lines, save_state, trained_weights
from iqareward.diffusion.data.pairs import Pairs
from iqareward.diffusion.experience import Experience, Sampling, collect, compare
from iqareward.diffusion.learner import Learner, Optimization
from iqareward.diffusion.noise import sub_seed
from iqareward.diffusion.policy import Policy, unwrapped
from iqareward.diffusion.policy_gradient import Objective, PolicyGradient
from iqareward.diffusion.progress import progress_bar
from iqareward.diffusion.validation import Validation, save_grid
from iqareward.losses import LossWeights
from iqareward.schedules.schedule import Weighter, check_signal
from iqareward.types import Reward
from iqareward.weighting import AdaptiveWeighter

# Purposes of random numbers, so that no two share any.
ORDER, ROLLOUT, LEARNING, CALIBRATION, VALIDATION = range(5)
CALIBRATION_UPDATES = 8  # batches whose inputs anchor the weighter


class DifficultyAdaptiveTrainer:
    """Trains a restoration model by RL on inputs that are hard for it and by SFT on those near their ground truth.

    Runs under accelerate: `accelerate launch` gives several GPUs, mixed precision comes from the `Accelerator`. After a
    kill at any moment `train(..., resume=True)` continues from the last checkpoint with the same numbers.

    Args:
        policy: the model after SFT.
        reward: scores the restored images; called with `images` and `references`.
        pairs: degraded images and their ground truth.
        output_dir: folder of checkpoints and sample grids.
        weighter: RL and SFT weights; `AdaptiveWeighter()` if not given. One that takes pass rates names the distance at
            which a rollout passes: `Schedule(gate, pass_distance=0.05)`.
        objective: how rewards become a loss; `PolicyGradient()` if not given.
        sampling: how inputs are restored.
        optimization: how the weights follow the losses.
        validation: what is measured on held-out inputs.
        memory: compares rewards with an input's own history instead of its group.
        metric: distance to the ground truth that difficulty is made of; not the reward.
        accelerator: of accelerate; a default one if not given.
        overlap: score a part of the inputs while the next is sampled (`Sampling.inputs_at_once`).
        show_progress: draw a progress bar.
        seed: of everything random.

    Raises:
        ValueError: `inputs_per_update` does not divide by the number of processes, or exceeds the number of pairs; or
            the weighter takes a signal that is not measured here, such as `NoiseAware`; or `memory` has fewer inputs.

    Example:
        >>> import tempfile, iqareward
        >>> from iqareward.diffusion.data.pairs import SyntheticPairs
        >>> from iqareward.diffusion.restorer import build_restorer
        >>> setting = build_restorer((8, 16)), iqareward.load("gmsd"), SyntheticPairs(16, size=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = DifficultyAdaptiveTrainer(*setting, output_dir=folder, show_progress=False)
        ...     print([line["update"] for line in trainer.train(1)])
        [0, 1]

    References:
        Xu et al., Enhancing Diffusion-based Restoration Models via Difficulty-Adaptive Reinforcement Learning with IQA
        Reward, 2025, https://arxiv.org/abs/2511.01645 (mechanism; formulas and details are ours)
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        pairs: Pairs,
        *,
        output_dir: Path | str,
        weighter: Weighter | None = None,
        objective: Objective | None = None,
        sampling: Sampling | None = None,
        optimization: Optimization | None = None,
        validation: Validation | None = None,
        memory: RewardMemory | None = None,
        metric: Callable[..., Tensor] = rmse,
        accelerator: Any = None,
        overlap: bool = False,
        show_progress: bool = True,
        seed: int = 0,
    ) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator() if accelerator is None else accelerator
        self.policy, self.reward, self.pairs, self.metric, self.seed = policy, reward, pairs, metric, seed
        self.weighter: Weighter = AdaptiveWeighter() if weighter is None else weighter
        check_signal("DifficultyAdaptiveTrainer", self.weighter, ("difficulty", "pass_rate"))
        if memory is not None and memory.num_inputs < len(pairs):
            raise ValueError(
                f"DifficultyAdaptiveTrainer expected a memory of {len(pairs)} inputs, got {memory.num_inputs}. "
                "Build it with RewardMemory(len(pairs))."
            )
        self.sampling, self.validation, self.memory = sampling or Sampling(), validation, memory
        self.output_dir, self.show_progress = Path(output_dir), show_progress
        self.options = optimization or Optimization()
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        if self.options.inputs_per_update % self.world:
            raise ValueError(
                f"DifficultyAdaptiveTrainer expected inputs_per_update divisible by the {self.world} processes, got "
                f"{self.options.inputs_per_update}."
            )
        self.order = InputOrder(len(pairs), self.options.inputs_per_update, sub_seed(seed, ORDER))
        self.learner = Learner(policy, objective or PolicyGradient(), self.options, self.accelerator)
        self.executor = ThreadPoolExecutor(1) if overlap else None
        self.updates, self.history = 0, []

    def train(
        self, num_updates: int, *, save_every: int = 50, validate_every: int = 50, resume: bool = False
    ) -> list[dict[str, Any]]:
        """Calibrate on the model as it is, then update it.

        Args:
            num_updates: updates in all, those before a resume included.
            save_every: updates between checkpoints.
            validate_every: updates between validations; there is one before the first update and one after the last.
            resume: continue from the checkpoint in `output_dir`, if there is one.

        Returns:
            The history: one dictionary of numbers per update; validations add keys that begin with "validation/".
        """
        if not (resume and self.load()):
            self.calibrate()
            self.history.append({"update": 0} | self.validate())
        if self.accelerator.log_with and not self.accelerator.trackers:
            self.accelerator.init_trackers("iqareward")
        shown = self.show_progress and self.accelerator.is_main_process
        with progress_bar("RL", num_updates, done=self.updates, shown=shown) as advance:
            while self.updates < num_updates and not (self.validation and self.validation.stopped):
                record = self.update()
                last = self.updates == num_updates
                if last or self.updates % validate_every == 0:
                    record |= self.validate()
                self.history.append(record)
                self.accelerator.log({name: value for name, value in record.items() if name != "alarms"}, self.updates)
                if last or self.updates % save_every == 0:
                    self.save()
                advance(record)
        return self.history

    def calibrate(self) -> None:
        """Tell the weighter how hard inputs are for the model before RL; most schedules have no such anchor."""
        anchor = getattr(self.weighter, "calibrate", None)
        if anchor is not None:
            batches = range(min(CALIBRATION_UPDATES, len(self.pairs) // self.options.inputs_per_update))
            anchor(torch.cat([self._signal(self.experience(batch, CALIBRATION)) for batch in batches]))

    def update(self) -> dict[str, Any]:
        """One optimiser step: restore and score, weigh, learn. Returns the numbers to log."""
        experience = self.experience(self.updates, ROLLOUT)
        active = experience.active if self.learner.objective.relative else None
        signal = self._signal(experience)
        weights = self.weighter(signal, active=active)
        seed = sub_seed(self.seed, LEARNING, self.updates)
        record = self.learner.step(experience, weights, update=self.updates, seed=seed)
        self.weighter.update(signal)
        self.updates += 1
        return {"update": self.updates} | record | self._figures(experience, weights)

    def _signal(self, experience: Experience) -> Tensor:
        """What the weighter goes by, `[B]`."""
        if self.weighter.signal == "difficulty":
            return experience.difficulty
        weighter: Any = self.weighter
        return experience.pass_rate(weighter.pass_distance)

    def experience(self, update: int, purpose: int) -> Experience:
        """The inputs of update number `update`, restored by this process, scored and compared with each other."""
        ids = self.order.ids(update, rank=self.rank, world=self.world)
        degraded, references = (images.to(self.accelerator.device) for images in self.pairs.batch(ids))
        trajectory, condition, rewards, distances = collect(
            self.policy,
            self.reward,
            degraded,
            references,
            ids,
            self.sampling,
            seed=sub_seed(self.seed, purpose, update),
            metric=self.metric,
            executor=self.executor,
        )
        groups = torch.tensor(ids, device=rewards.device).repeat_interleave(self.sampling.group_size)
        memory = self.memory if purpose == ROLLOUT else None
        advantages, active = compare(rewards, groups, std_floor=self.options.std_floor, memory=memory)
        active = active.view(len(ids), -1).any(1)
        return Experience(tuple(ids), references, condition, trajectory, rewards, distances, advantages, active)

    def validate(self) -> dict[str, Any]:
        """Judge the held-out inputs; save their restorations, and the model if it is the best so far."""
        if self.validation is None:
            return {}
        with self.learner.averaged():
            seed = sub_seed(self.seed, VALIDATION)
            found = self.validation(self.policy, self.reward, seed=seed, rank=self.rank, world=self.world)
            if self.accelerator.is_main_process:
                save_grid(self.output_dir / f"samples-{self.updates:06d}.png", self.validation, found["images"])
                if self.validation.since_best == 0 and self.validation.stop_on is not None:
                    save_file(trained_weights(unwrapped(self.policy.model)), self.output_dir / "best.safetensors")
        record = {f"validation/{name}": float(scores.nanmean()) for name, scores in found["scores"].items()}
        return record | {"alarms": "; ".join(found["alarms"])}

    def _figures(self, experience: Experience, weights: LossWeights) -> dict[str, float]:
        """Means over the inputs of all processes."""
        columns = {
            "reward": experience.rewards[-1].nanmean(),
            "difficulty": experience.difficulty.nanmean(),
            "rl_share": weights.rl.mean(),
            "sft_share": weights.sft.mean(),
            "active": experience.active.float().mean(),
        }
        means: Any = self.accelerator.reduce(torch.stack(list(columns.values())).float(), "mean")
        return dict(zip(columns, means.tolist(), strict=True))

    def save(self) -> None:
        """Write checkpoint and history of this moment over the last ones; only the main process writes."""
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts().items()}
        if self.accelerator.is_main_process:
            save_state(self.checkpoint, state | {"updates": self.updates, "history": self.history, "seed": self.seed})
            save_lines(self.history_file, self.history)
        self.accelerator.wait_for_everyone()

    def load(self) -> bool:
        """Continue from the checkpoint in `output_dir`; False if there is none.

        Raises:
            ValueError: it is of a run with another seed, model or weighter.
        """
        if not self.checkpoint.is_file():
            return False
        state = load_state(self.checkpoint)
        if state["seed"] != self.seed:
            raise ValueError(f"{self.checkpoint} is of a run with seed {state['seed']}, got seed {self.seed}.")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.updates, self.history = state["updates"], state["history"]
        return True

    def _parts(self) -> dict[str, Any]:
        """Everything with a state of its own."""
        parts = {"learner": self.learner, "weighter": self.weighter}
        optional = {"memory": self.memory, "validation": self.validation}
        return parts | {name: part for name, part in optional.items() if part is not None}

    @property
    def checkpoint(self) -> Path:
        """The file that `save` writes and `load` reads."""
        return self.output_dir / "checkpoint.pt"

    @property
    def history_file(self) -> Path:
        """The history up to the checkpoint, one JSON object a line, for people and plots."""
        return self.output_dir / "history.jsonl"
