"""The trainer: RL where inputs are hard, SFT as restorations come near their ground truth."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from iqareward.advantages import RewardMemory
from iqareward.atomic import atomic_write
from iqareward.difficulty import rmse
from iqareward.diffusion.batches import Batch, batches, read_ahead
from iqareward.diffusion.checkpoint import (
    CHECKPOINT,
    append_line,
    described,
    differences,
    exclusive,
    latest,
    load_state,
    previous,
    save_lines,
    save_state,
    trained_weights,
)
from iqareward.diffusion.finite import TrainingError, agreed, finite_mean, require_finite
from iqareward.diffusion.learner import Learner, TrainConfig
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.objectives import ClippedPolicyGradient, Objective
from iqareward.diffusion.pairs import InputOrder, Pairs
from iqareward.diffusion.policies.core import Policy, evaluating
from iqareward.diffusion.progress import note, progress_bar
from iqareward.diffusion.rollouts import (
    Experience,
    RolloutConfig,
    collect,
    compare,
    input_distances,
    reference_distances,
    scored_alone,
)
from iqareward.diffusion.sharding import unsharded, whole
from iqareward.diffusion.validation import Validation, save_grid
from iqareward.groups import finite_or_nan
from iqareward.rewards.batching import Overlapped
from iqareward.schedules import Weighter, check_signal
from iqareward.seeds import sub_seed
from iqareward.types import Reward, needs
from iqareward.weighting import AdaptiveWeighter, LossWeights

# Purposes of random numbers, so that no two share any.
ORDER, ROLLOUT, LEARNING, CALIBRATION, VALIDATION = range(5)
_CALIBRATION_UPDATES = 8  # batches whose inputs anchor the weighter


class DifficultyAdaptiveTrainer:
    """Trains a restoration model by RL on inputs that are hard for it and by SFT on those near their ground truth.

    Runs under accelerate: `accelerate launch` gives several GPUs, mixed precision comes from the `Accelerator`. After a
    kill at any moment `train(..., resume=True)` continues from the last checkpoint with the same numbers. An update
    whose gradient is not finite changes nothing, an input with a pixel that is not finite takes no part, and weights
    that are not finite are never saved.

    Args:
        policy: The model after SFT.
        reward: Scores the restored images; called with `images` and with what it takes of `references`, `inputs` (the
            degraded images), `prompts`, `ids` and `tasks`. Or several rewards by name, each normalised within the
            rollouts of an input before they are added (GDPO).
        pairs: Degraded images and their ground truth, any data set as `Pairs` describes it.
        output_dir: Folder for checkpoints, history and sample grids.
        weighter: Gives RL and SFT weights; `AdaptiveWeighter()` if not given. One that takes pass rates names the
            distance at which a rollout passes: `Schedule(partial(gate, direction="hard_to_rl"), pass_distance=0.05)`.
        objective: How rewards become a loss; `ClippedPolicyGradient()` if not given.
        rollout_config: How inputs are restored.
        train_config: How the weights follow the losses.
        validation: What is measured on held-out inputs.
        memory: Compares rewards with an input's own history instead of its group.
        metric: Distance to the ground truth that difficulty is made of; not the reward.
        reward_weights: Weight of each of several rewards by name; 1 if not given.
        input_quality: A reward of the degraded images; difficulty is how far they are from its upper bound. For data
            without ground truth, for which there is no SFT.
        reachable: Rewards and difficulty compare with the ground truth encoded and decoded, which is the best that a
            latent model can reach; SFT learns from the ground truth itself.
        accelerator: Accelerate's `Accelerator`; a default one if not given.
        sft_updates: Updates of SFT before; trackers count them first.
        num_workers: Processes that read images ahead of need.
        overlap: Score a part of the inputs while the next is sampled (`RolloutConfig.inputs_at_once`), by `Overlapped`.
            For a reward that takes much of an update; with Q-Align on the same H100, 1.4 % of one, it gained nothing.
        show_progress: Show a progress bar, or lines where there is no terminal.
        seed: Seed of all random numbers.

    Raises:
        TypeError: With `overlap`, a reward that lacks an attribute of `Reward`.
        ValueError: `inputs_per_update` does not divide by the number of processes, or exceeds the number of pairs; or
            the weighter names no signal, or takes pass rates without a `pass_distance`; or `memory` has fewer inputs.

    Example:
        >>> import tempfile, iqareward
        >>> from iqareward.diffusion import SyntheticPairs, build_restorer
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
        reward: Reward | Mapping[str, Reward],
        pairs: Pairs,
        *,
        output_dir: Path | str,
        weighter: Weighter | None = None,
        objective: Objective | None = None,
        rollout_config: RolloutConfig | None = None,
        train_config: TrainConfig | None = None,
        validation: Validation | None = None,
        memory: RewardMemory | None = None,
        metric: Callable[..., Tensor] = rmse,
        reward_weights: Mapping[str, float] | None = None,
        input_quality: Reward | None = None,
        reachable: bool = False,
        accelerator: Any = None,
        sft_updates: int = 0,
        num_workers: int = 0,
        overlap: bool = False,
        show_progress: bool = True,
        seed: int = 0,
    ) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator() if accelerator is None else accelerator
        self.policy, self.pairs, self.metric, self.seed = policy, pairs, metric, seed
        self.rewards = dict(reward) if isinstance(reward, Mapping) else {"reward": reward}
        self.reward_weights = _checked_weights(self.rewards, reward_weights)
        self.distance = reference_distances(metric) if input_quality is None else input_distances(input_quality)
        self.reachable, self.num_workers = reachable, num_workers
        self.weighter: Weighter = AdaptiveWeighter() if weighter is None else weighter
        check_signal("DifficultyAdaptiveTrainer", self.weighter, ("difficulty", "pass_rate"))
        if memory is not None and memory.num_inputs < len(pairs):
            raise ValueError(
                f"DifficultyAdaptiveTrainer expected a memory of {len(pairs)} inputs, got {memory.num_inputs}. "
                "Build it with RewardMemory(len(pairs))."
            )
        self.rollout_config, self.validation, self.memory = rollout_config or RolloutConfig(), validation, memory
        self.output_dir, self.show_progress, self.sft_updates = Path(output_dir), show_progress, sft_updates
        self.train_config = train_config or TrainConfig()
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        shares = self.world * self.train_config.minibatches
        if self.train_config.inputs_per_update % shares:
            raise ValueError(
                f"DifficultyAdaptiveTrainer expected inputs_per_update divisible by {self.world} processes times "
                f"{self.train_config.minibatches} minibatches, got {self.train_config.inputs_per_update}."
            )
        for each in self.rewards.values():
            if overlap and not isinstance(each, Reward):
                raise TypeError(
                    "DifficultyAdaptiveTrainer expected, with overlap=True, a reward with `name`, `bounds` and the "
                    f"other attributes of `Reward`, got {type(each).__name__}. Wrap it in FullReference or NoReference."
                )
            if needs(each, "ids") and self.rollout_config.group_size < 2:
                raise ValueError(
                    f"DifficultyAdaptiveTrainer expected a group_size of at least 2 for {each.name}, which compares "
                    "the rollouts of an input, got 1."
                )
        objective = objective or ClippedPolicyGradient()
        if objective.relative and self.rollout_config.group_size < 2 and memory is None:
            raise ValueError(
                f"DifficultyAdaptiveTrainer expected, for {type(objective).__name__}, a group_size of at least 2, "
                "because it compares the rollouts of an input, got 1. Raise it, give a RewardMemory, or take an "
                "objective such as DirectRewardGradient."
            )
        config = self.train_config
        self.order = InputOrder(
            len(pairs), config.inputs_per_update, sub_seed(seed, ORDER), minibatches=config.minibatches
        )
        self.learner = Learner(policy, objective, self.train_config, self.accelerator)
        self.scorers = [Overlapped(each) if overlap else each for each in self.rewards.values()]
        self.updates, self.history, self.failures = 0, [], 0
        self._reader: Iterator[list[Batch]] | None = None
        self.proven = False  # whether an update has gone well since the last checkpoint
        # Taken now, because a weighter may change as it is used.
        self.settings: dict[str, Any] = {
            "seed": seed,
            "num_inputs": len(pairs),
            "pairs": described(pairs),
            "policy": described(policy, without=("model", "process")),
            "process": described(getattr(policy, "process", None)),
            "mixed_precision": str(self.accelerator.mixed_precision),
            "reward": described(reward),
            "reward_weights": described(self.reward_weights),
            "input_quality": described(input_quality),
            "reachable": reachable,
            "metric": described(metric),
            "objective": described(self.learner.objective),
            # Without what changes memory only: it has to change where memory has run out.
            "rollout_config": described(self.rollout_config, without=("inputs_at_once",)),
            "train_config": described(self.train_config, without=("rows_at_once",)),
            "weighter": described(self.weighter, without=tuple(self.weighter.state_dict())),
            "memory": described(memory),
            "validation": described(validation),
        }

    def train(
        self,
        num_updates: int,
        *,
        save_every: int = 50,
        validate_every: int = 50,
        resume: bool = False,
        allow_changes: bool = False,
    ) -> list[dict[str, Any]]:
        """Calibrate on the model as it is, then update it.

        Args:
            num_updates: Updates in all, those before a resume included.
            save_every: Updates between checkpoints; one that is due waits for an update that did not fail.
            validate_every: Updates between validations; there is one before the first update and one after the last.
            resume: Continue from the checkpoint in `output_dir`, if there is one.
            allow_changes: Resume although settings differ from those of the checkpoint; see `load`.

        Returns:
            The history: one dictionary of numbers per update; validations add keys that begin with "validation/", and
            "alarms" says in words what was wrong.

        Raises:
            ValueError: `output_dir` holds a run and `resume` is False, another run uses it, or the checkpoint is
                damaged or of other settings.
            TrainingError: Too many updates in a row failed, or the last one, or weights are no longer finite. It names
                the checkpoint to resume from; `history` has the updates so far.
        """
        with exclusive(self.output_dir, self.accelerator):
            begun = self._begun()
            if begun is not None and not resume:
                raise ValueError(
                    f"{self.output_dir} holds a run: {begun.name}. Go on with resume=True, or choose another folder."
                )
            self.accelerator.wait_for_everyone()  # all have looked before one writes
            if self.accelerator.log_with and not self.accelerator.trackers:
                self.accelerator.init_trackers("iqareward")
            if not (resume and self.load(allow_changes=allow_changes)):
                self.calibrate()
                self.history.append({"update": 0} | self._ceiling() | self.validate())
                self._log(self.history[0])
                self.save()
            elif self.accelerator.is_main_process:
                save_lines(self.history_file, self.history)  # without the updates that a kill has lost
            try:
                self._updates(num_updates, save_every, validate_every)
            except TrainingError as error:
                raise TrainingError(f"{error} {self._where_to_go_on()}") from error
            finally:
                self._reader = None  # ends its workers; an `update` of the caller reads for itself
        return self.history

    def _updates(self, num_updates: int, save_every: int, validate_every: int) -> None:
        shown, due = self.show_progress and self.accelerator.is_main_process, False
        record: dict[str, Any] = {}
        self._reader = read_ahead(
            self.pairs,
            self.order,
            range(self.updates, num_updates),
            self.accelerator.device,
            num_workers=self.num_workers,
            rank=self.rank,
            world=self.world,
        )
        with progress_bar("RL", num_updates, done=self.updates, shown=shown) as advance:
            while self.updates < num_updates and not (self.validation and self.validation.stopped):
                record = self.update()
                last = self.updates == num_updates
                if last or self.updates % validate_every == 0:
                    found = self.validate()
                    alarms = [text for text in (record["alarms"], found.get("alarms")) if text]
                    record |= found | {"alarms": "; ".join(alarms)}
                self.history.append(record)
                self._log(record)
                if self.accelerator.is_main_process:
                    append_line(self.history_file, record)
                last = last or (self.validation is not None and self.validation.stopped)
                due = due or last or self.updates % save_every == 0
                # Weights can be finite and yet too large to work with, which shows when the next update fails. Without
                # checkpoints while updates fail, the previous one always has weights that trained on.
                if due and not self.failures:
                    self.save()
                    due = False
                advance(record)
        if self.failures:
            raise TrainingError(f"The run ended with failed updates, {self.failures} in a row: {record['alarms']}.")

    def _log(self, record: dict[str, Any]) -> None:
        numbers = {name: value for name, value in record.items() if name != "alarms"}
        self.accelerator.log(numbers, self.sft_updates + self.updates)

    def calibrate(self) -> None:
        """Tell the weighter how hard the inputs are for the model before RL; most schedules do not need it."""
        anchor = getattr(self.weighter, "calibrate", None)
        if anchor is not None:
            found = []
            for number in range(min(_CALIBRATION_UPDATES, len(self.pairs) // self.train_config.inputs_per_update)):
                ids = self.order.ids(number, rank=self.rank, world=self.world)
                read = batches(self.pairs, ids, self.accelerator.device)
                found += [each.difficulty for each in self.experiences(read, number, CALIBRATION)]
            anchor(torch.cat(found))

    @torch.no_grad()
    def _ceiling(self) -> dict[str, float]:
        """The rewards of the ground truth, and of what the policy can reach of it, for the first inputs."""
        ids = self.order.ids(0, rank=self.rank, world=self.world)
        nothing = torch.full((1,), torch.nan, device=self.accelerator.device)
        found = {f"{kind}/{name}": [nothing] for name in self.rewards for kind in ("truth", "ceiling")}
        for batch in batches(self.pairs, ids, self.accelerator.device):
            if batch.references is None:
                continue
            with evaluating(self.policy), unsharded(self.policy.model):
                condition = self.policy.condition(batch, self._noise(batch, CALIBRATION))
                reached = self.policy.reconstruct(batch.references, condition).float().clamp(0, 1)
            for name, reward in self.rewards.items():
                found[f"truth/{name}"].append(scored_alone(reward, batch.references, batch))
                found[f"ceiling/{name}"].append(scored_alone(reward, reached, batch))
        means = self._means({name: torch.cat(values) for name, values in found.items()})
        means = {name: mean for name, mean in means.items() if not math.isnan(mean)}
        if self.show_progress and self.accelerator.is_main_process:
            reached = [
                f"{name} {means[f'truth/{name}']:.4g}, encoded and decoded {means[f'ceiling/{name}']:.4g}"
                for name in self.rewards
                if f"ceiling/{name}" in means
            ]
            no_truth = "No ground truth, so no SFT; difficulty is that of the degraded images."
            note(f"The ground truth scores {'; '.join(reached)}." if reached else no_truth)
        return means

    def update(self) -> dict[str, Any]:
        """Restore and score the inputs of an update, weigh and learn. Returns the numbers to log."""
        ids = self.order.ids(self.updates, rank=self.rank, world=self.world)
        read = next(self._reader) if self._reader else batches(self.pairs, ids, self.accelerator.device)
        experiences = self.experiences(read, self.updates, ROLLOUT)
        usable = torch.cat([each.batch.usable for each in experiences])
        has_signal = torch.cat([each.has_signal for each in experiences])
        signal = self._signal(experiences)
        relative = self.learner.objective.relative
        weights = self.weighter(**signal, has_signal=has_signal if relative else None, valid=usable)
        record = self.learner.learn(
            experiences, weights, update=self.updates, seed=sub_seed(self.seed, LEARNING, self.updates)
        )
        self.weighter.update(**signal)
        self.updates += 1
        record = {"update": self.updates} | record | self._figures(experiences, weights)
        return record | {"alarms": self._alarms(record, experiences)}

    def _alarms(self, record: dict[str, Any], experiences: Sequence[Experience]) -> str:
        """What went wrong in an update, as a warning and as text for the history; an error after too many failures."""
        from accelerate.utils import gather_object

        failures, ids = [record.pop("problem")], [each for part in experiences for each in part.batch.ids]
        for name in self.rewards:
            if record["scored" if len(self.rewards) == 1 else f"scored/{name}"] == 0:
                failures.append(f"{self._name(name)} scored no image, so RL had nothing to learn from it")
        failures = [text for text in failures if text]
        self.failures = self.failures + 1 if failures else 0
        self.proven = self.proven or not failures
        if self.failures >= self.train_config.max_failed_updates:
            raise TrainingError(
                f"{self.failures} updates in a row failed, the last with inputs {sorted(gather_object(ids))}: "
                f"{'; '.join(failures)}. Look at the reward and those inputs."
            )
        notes: list[str] = []
        if record["left_out"]:
            usable = torch.cat([part.batch.usable for part in experiences]).tolist()
            bad = [each for each, good in zip(ids, usable, strict=True) if not good]
            everyones = sorted(gather_object(bad))
            notes = [f"left out {record['left_out']:g} inputs whose pixels are not all finite: {everyones}"]
        alarms = "; ".join([*failures, *notes])
        if alarms:
            warnings.warn(f"update {self.updates}: {alarms}", RuntimeWarning, stacklevel=2)
        return alarms

    def _where_to_go_on(self) -> str:
        """The newest checkpoint that was followed by a good update, and how to use it."""
        older = previous(self.checkpoint)
        if self.proven or not older.is_file():
            return f"{self.checkpoint} is from before that: fix the cause and go on from there with resume=True."
        return (
            f"No update has gone well since {self.checkpoint}, so its weights may be the cause. {older} is of weights "
            f"that trained without failure: fix the cause and move it over {self.checkpoint.name} to go on from there."
        )

    def _name(self, name: str) -> str:
        return getattr(self.rewards[name], "name", name) if len(self.rewards) == 1 else name

    def _signal(self, experiences: Sequence[Experience]) -> dict[str, Tensor]:
        """The argument `[B]` that the weighter takes, by name."""
        if self.weighter.signal == "difficulty":
            return {"difficulty": torch.cat([each.difficulty for each in experiences])}
        weighter: Any = self.weighter
        return {"pass_rate": torch.cat([each.pass_rate(weighter.pass_distance) for each in experiences])}

    def _noise(self, batch: Batch, purpose: int) -> Noise:
        return Noise(batch.ids, seed=sub_seed(self.seed, purpose), device=self.accelerator.device)

    def experiences(self, read: Sequence[Batch], update: int, purpose: int) -> list[Experience]:
        """Inputs restored by this process, scored and compared with each other; one experience per size."""
        seed = sub_seed(self.seed, purpose, update)
        # in this order: weights are exchanged while they are sharded
        with evaluating(self.policy), self.learner.versions.sampling(), unsharded(self.policy.model):
            sampled = [
                collect(
                    self.policy,
                    self.scorers,
                    batch,
                    self.rollout_config,
                    seed=seed,
                    distance=self.distance,
                    reachable=self.reachable,
                )
                for batch in read
            ]
        return compare(
            sampled,
            self.rollout_config,
            weights=self.reward_weights,
            std_floor=self.train_config.std_floor,
            memory=self.memory if purpose == ROLLOUT else None,
        )

    def validate(self) -> dict[str, Any]:
        """Score the held-out inputs; save their restorations, and the model if it is the best so far."""
        if self.validation is None:
            return {}
        with self.learner.averaged():
            with agreed(self.accelerator):
                require_finite(f"The model after update {self.updates}", self.learner.named_weights())
            seed = sub_seed(self.seed, VALIDATION)
            with unsharded(self.policy.model):
                found = self.validation(
                    self.policy, self.rewards, self.reward_weights, seed=seed, rank=self.rank, world=self.world
                )
            best = trained_weights(self.policy.model) if found["best"] else None
            if self.accelerator.is_main_process:
                self.output_dir.mkdir(parents=True, exist_ok=True)
                grid = self.validation.grid(found["images"], found["scores"]["reward"], update=self.updates)
                file, step = self.output_dir / f"samples-{self.updates:06d}.png", self.sft_updates + self.updates
                save_grid(grid, file, self.accelerator.trackers, step=step)
                if best is not None:
                    with atomic_write(self.output_dir / "best.safetensors") as file:
                        file.write(safetensors.torch.save(best))
        record = {f"validation/{name}": finite_mean(scores) for name, scores in found["scores"].items()}
        return record | {"alarms": "; ".join(found["alarms"])}

    def _figures(self, experiences: Sequence[Experience], weights: LossWeights) -> dict[str, float]:
        """What is logged of the inputs of all processes."""
        rewards = torch.cat([each.rewards[-1] for each in experiences])
        parts = torch.cat([each.parts[:, -1] for each in experiences], 1)
        usable = torch.cat([each.batch.usable for each in experiences])
        columns = {
            "reward": rewards,
            "scored": rewards.isfinite().float(),
            "difficulty": torch.cat([each.difficulty for each in experiences]),
            "rl_share": weights.rl,
            "sft_share": weights.sft,
            "has_signal": torch.cat([each.has_signal for each in experiences]).float(),
            "usable": usable.float(),
        }
        if len(self.rewards) > 1:
            for name, scores in zip(self.rewards, parts, strict=True):
                columns |= {f"reward/{name}": scores, f"scored/{name}": scores.isfinite().float()}
        means = self._means(columns)
        left_out = round((1 - means.pop("usable")) * self.train_config.inputs_per_update)
        return means | {"left_out": left_out}

    def _means(self, columns: Mapping[str, Tensor]) -> dict[str, float]:
        """Means of the finite values over the inputs of all processes; NaN if there are none."""
        if not columns:
            return {}
        finite = [finite_or_nan(values.float()) for values in columns.values()]
        rows = [torch.stack([values.nansum(), values.isfinite().sum()]) for values in finite]
        totals: Any = self.accelerator.reduce(torch.stack(rows), "sum")
        pairs = zip(columns, totals.tolist(), strict=True)
        return {name: total / count if count else float("nan") for name, (total, count) in pairs}

    def save(self) -> None:
        """Write checkpoint and history, and keep the previous checkpoint; only the main process writes.

        A TrainingError, and nothing written, if a weight, an average or the state of the optimiser is not finite.
        """
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts().items()}
        with agreed(self.accelerator):
            require_finite(f"The state after update {self.updates}", {"learner": state["learner"]})
        state["learner"] = whole(state["learner"], keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            state |= {"updates": self.updates, "history": self.history, "settings": self.settings}
            save_state(self.checkpoint, state)
            save_lines(self.history_file, self.history)
        self.proven = False
        self.accelerator.wait_for_everyone()

    def load(self, *, allow_changes: bool = False) -> bool:
        """Continue from the checkpoint in `output_dir`; False if there is none.

        Args:
            allow_changes: Take the new settings where they differ. A weighter, memory or validation that was built in
                another way starts anew; the weights, the optimiser and the history go on.

        Raises:
            ValueError: The checkpoint is damaged, or of other settings or another model; the trainer stays as it was.
        """
        file = self._begun()
        if file is None:
            return False
        state = load_state(file)
        kinds = {"updates": int, "history": list, "settings": dict}
        if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in kinds.items()):
            raise ValueError(
                f"{file} expected a checkpoint of DifficultyAdaptiveTrainer with {', '.join(kinds)}, got something "
                "else. Move it away, or choose another output_dir."
            )
        changed = differences(state["settings"], self.settings)
        if changed and not allow_changes:
            raise ValueError(
                f"{file} is of a run with other settings: {'; '.join(f'{k} {v}' for k, v in changed.items())}. Restore "
                "them, choose another output_dir, or go on with the new ones by allow_changes=True."
            )
        anew = {name.partition(".")[0] for name in changed}
        parts = {name: part for name, part in self._parts().items() if name not in anew}
        before = {name: part.state_dict() for name, part in parts.items()}
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except Exception as error:
            for name, part in parts.items():
                part.load_state_dict(before[name])
            if isinstance(error, (LookupError, TypeError, AttributeError)):  # a part is not what it should be
                raise ValueError(
                    f"{file} expected a checkpoint of DifficultyAdaptiveTrainer, got one that cannot be loaded: "
                    f"{type(error).__name__} {error}. Move it away, or choose another output_dir."
                ) from error
            raise
        self.updates, self.history, self.failures, self.proven = state["updates"], state["history"], 0, False
        if "weighter" in anew:
            self.calibrate()
        return True

    def _begun(self) -> Path | None:
        """The newest checkpoint; a ValueError in all processes if they do not see the same files."""
        from accelerate.utils import gather_object

        found = latest(self.checkpoint)
        seen = gather_object([None if found is None else found.name])
        if len(set(seen)) > 1:
            raise ValueError(
                f"DifficultyAdaptiveTrainer expected the same files in {self.output_dir} for all processes, got "
                f"{seen} as the newest checkpoint. Choose an output_dir on a file system that all machines share."
            )
        return found

    def _parts(self) -> dict[str, Any]:
        """Everything that has a state."""
        parts = {"learner": self.learner, "weighter": self.weighter}
        optional = {"memory": self.memory, "validation": self.validation}
        return parts | {name: part for name, part in optional.items() if part is not None}

    @property
    def checkpoint(self) -> Path:
        """The file that `save` writes and `load` reads."""
        return self.output_dir / CHECKPOINT

    @property
    def history_file(self) -> Path:
        """The history, one JSON object per line, written as each update ends."""
        return self.output_dir / "history.jsonl"


def _checked_weights(rewards: Mapping[str, Any], weights: Mapping[str, float] | None) -> list[float]:
    """The weight of each reward, in order."""
    unknown = sorted(set(weights or {}) - set(rewards))
    if not rewards or unknown:
        raise ValueError(
            f"DifficultyAdaptiveTrainer expected `reward_weights` of {list(rewards)}, got {unknown or 'no reward'}."
        )
    return [float((weights or {}).get(name, 1.0)) for name in rewards]
