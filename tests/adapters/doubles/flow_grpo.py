"""Flow-GRPO, DiffusionNFT with Edit-R1, and the DDPO scripts, from the call of the reward to the policy's gradient.

The policy has one number per row, so that its gradient tells what each row contributed.
"""

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

STEPS, CLIP_RANGE, ADV_CLIP_MAX = 2, 1e-3, 5.0


def rewards_module(*, takes_ref_images: bool = False, refuses_none: bool = False) -> ModuleType:
    """A module like `flow_grpo.rewards`: factories, and a `multi_score` whose table nobody can reach."""
    module = ModuleType("flow_grpo.rewards")

    def jpeg_compressibility():
        return lambda images, prompts, metadata: ([float(len(prompt)) for prompt in prompts], {})

    def pickscore_score(device):
        return lambda images, prompts, metadata: (images.float().mean(dim=(1, 2, 3)), {})

    def multi_score(device, score_dict):
        if refuses_none and not score_dict:  # as DiffusionOPSD
            raise ValueError("at least one reward is needed")
        table = {"jpeg_compressibility": module.jpeg_compressibility, "pickscore": module.pickscore_score}
        fns = {}
        for name in score_dict:
            factory = table[name]
            wants_device = "device" in factory.__code__.co_varnames
            fns[name] = factory(device) if wants_device else factory()

        def run(images, prompts, metadata):
            details, total = {}, []
            for name, weight in score_dict.items():
                scores, _ = fns[name](images, prompts, metadata)
                details[name] = scores
                weighted = [weight * score for score in scores]
                total = [old + new for old, new in zip(total, weighted, strict=True)] if total else weighted
            return {**details, "avg": total}, {}

        def old(images, prompts, metadata, only_strict=True):
            assert isinstance(only_strict, bool)
            return run(images, prompts, metadata)

        def new(images, prompts, metadata, ref_images=None, only_strict=True):
            return run(images, prompts, metadata)

        return new if takes_ref_images else old

    for function in (jpeg_compressibility, pickscore_score, multi_score):
        setattr(module, function.__name__, function)
    return module


class Accelerator:
    """`accelerate.Accelerator`: its place among the processes, `gather` and `backward`."""

    device = torch.device("cpu")

    @property
    def num_processes(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def process_index(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def gather(self, rows: Tensor) -> Tensor:
        if not dist.is_initialized():
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.num_processes)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class Policy(nn.Module):
    """A transformer whose output for row i is its parameter i everywhere; the row travels as its prompt's embedding."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.shift, self.weight = nn.Parameter(torch.zeros(num_rows)), torch.ones(1, 1)

    def forward(
        self, hidden_states, timestep, encoder_hidden_states, pooled_projections=None, return_dict=True
    ) -> tuple[Tensor]:
        assert not return_dict
        assert len(timestep) == len(hidden_states) == len(encoder_hidden_states)
        rows = nn.functional.linear(encoder_hidden_states, self.weight)  # refuses half embeddings outside of autocast
        return (self.shift[rows[:, 0].long()].view(-1, 1, 1, 1).expand_as(hidden_states),)

    def log_prob(self, sample: dict[str, Tensor], j: int) -> Tensor:
        """Of the step that was sampled; its derivative after the row's parameter is 1 at 0."""
        drift = self(
            hidden_states=sample["latents"][:, j],
            timestep=sample["timesteps"][:, j],
            encoder_hidden_states=sample["prompt_embeds"],
            pooled_projections=sample["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
        offset = sample["next_latents"][:, j] - sample["latents"][:, j] - drift
        return -offset.square().mean((1, 2, 3)) / 2


class VAE:
    """Brightness is the only thing that its latents keep."""

    dtype, device = torch.float32, torch.device("cpu")
    config = SimpleNamespace(shift_factor=0.1, scaling_factor=2.0)

    def encode(self, images: Tensor) -> Any:
        latents = images.mean((1, 2, 3), keepdim=True).expand(-1, 4, 2, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))


class Pipeline:
    """What the scripts hold of a diffusers pipeline."""

    def __init__(self, num_rows: int) -> None:
        self.transformer, self.vae = Policy(num_rows), VAE()


class PerPromptStatTracker:
    """Advantages against the rewards of the same key, which the scripts take from the prompt's text."""

    def __init__(self, global_std: bool = False) -> None:
        self.global_std = global_std

    def update(self, prompts: Sequence[Any], rewards: Any) -> np.ndarray:
        prompts, rewards = np.array(prompts), np.array(rewards, dtype=np.float64)
        advantages = np.empty_like(rewards)
        for prompt in np.unique(prompts):
            own = prompts == prompt
            spread = np.std(rewards if self.global_std else rewards[own], axis=0, keepdims=True)
            advantages[own] = (rewards[own] - rewards[own].mean(axis=0, keepdims=True)) / (spread + 1e-4)
        return advantages


class EditStatTracker(PerPromptStatTracker):
    """Edit-R1's: it also returns each row's standard deviation and mean, by which inputs are left out."""

    def update(self, prompts: Sequence[Any], rewards: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        advantages = super().update(prompts, rewards)
        prompts, stds, means = np.array(prompts), np.empty_like(advantages), np.empty_like(advantages)
        for prompt in np.unique(prompts):
            own = prompts == prompt
            stds[own], means[own] = np.std(rewards[own]), np.mean(rewards[own])
        return advantages, stds, means


def encoded(prompts: Sequence[str]) -> Tensor:
    """Prompts as token ids of one length."""
    return torch.tensor([list(prompt.encode().ljust(32)) for prompt in prompts])


def decoded(ids: np.ndarray) -> list[str]:
    return [bytes(row.astype(np.uint8)).decode().rstrip() for row in ids]


def collated(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One tensor for each entry, and for each component of the rewards; the rows of the first sample name them."""
    return {
        key: {name: torch.cat([sample[key][name] for sample in samples]) for name in value}
        if isinstance(value, dict)
        else torch.cat([sample[key] for sample in samples])
        for key, value in samples[0].items()
    }


def flow_grpo_epoch(
    reward_fn: Callable[..., Any],
    batches: Sequence[tuple],
    pipeline: Pipeline,
    accelerator: Accelerator,
    stat_tracker: Any,
    *,
    num_batches: int = 1,
    only_strict: bool = True,
    main_reward: str = "avg",
) -> dict[str, Any]:
    """One epoch of the scripts: sample, score in eight threads, gather, normalise, leave rows out, and train.

    A batch is (rows, images, prompts, metadata), or with the source images of the edit scripts after that.
    train_qwenimage_edit_plus.py passes `only_strict=False`; train_sd3_gardo.py trains on `config.main_reward`.
    """
    transformer, samples, autocast = pipeline.transformer, [], functools.partial(torch.autocast, "cpu", torch.bfloat16)
    with ThreadPoolExecutor(max_workers=8) as executor, torch.no_grad(), autocast():
        for rows, images, prompts, prompt_metadata, *ref_images in batches:
            rewards = executor.submit(reward_fn, images, prompts, prompt_metadata, *ref_images, only_strict=only_strict)
            steps = torch.arange(STEPS + 1.0).expand(len(rows), -1)[..., None, None, None].expand(-1, -1, 4, 2, 2)
            sample = {
                "prompt_embeds": rows[:, None].bfloat16(), "pooled_prompt_embeds": rows,
                "timesteps": torch.tensor([1000.0, 500.0]).repeat(len(rows), 1),
                "latents": steps[:, :-1], "next_latents": steps[:, 1:],
            }  # fmt: skip
            log_probs = torch.stack([transformer.log_prob(sample, j) for j in range(STEPS)], dim=1)
            samples.append(
                {
                    **sample,
                    "prompt_ids": encoded(prompts),
                    "log_probs": log_probs,
                    "rewards": rewards,
                }
            )
        for sample in samples:
            scored, _ = sample["rewards"].result()
            sample["rewards"] = {key: torch.as_tensor(value, device="cpu").float() for key, value in scored.items()}
    samples = collated(samples)
    samples["rewards"]["avg"] = samples["rewards"][main_reward]
    samples["rewards"]["ori_avg"] = samples["rewards"]["avg"]
    samples["rewards"]["avg"] = samples["rewards"]["avg"].unsqueeze(1).repeat(1, STEPS)
    gathered_rewards = {key: accelerator.gather(value).numpy() for key, value in samples["rewards"].items()}
    curves = {f"reward_{key}": value.mean() for key, value in gathered_rewards.items()}
    prompts = decoded(accelerator.gather(samples["prompt_ids"]).numpy())
    advantages = stat_tracker.update(prompts, gathered_rewards["avg"])
    advantages = torch.as_tensor(advantages)
    own = advantages.reshape(accelerator.num_processes, -1, STEPS)[accelerator.process_index]
    samples["advantages"] = own
    del samples["rewards"]
    del samples["prompt_ids"]

    mask = samples["advantages"].abs().sum(dim=1) != 0
    lacking = -int(mask.sum()) % num_batches
    if lacking <= int((~mask).sum()):  # some rows come back, so that the batches are equal
        mask[torch.where(~mask)[0][torch.randperm(int((~mask).sum()))[:lacking]]] = True
    samples = {key: value[mask] for key, value in samples.items()}
    kept, result = len(samples["timesteps"]), {"curves": curves, "rewards": gathered_rewards, "advantages": own}
    if not kept:
        return {**result, "kept": 0}
    order = torch.randperm(kept)
    batched = {key: value[order].reshape(num_batches, -1, *value.shape[1:]) for key, value in samples.items()}
    for number in range(num_batches):
        sample = {key: value[number] for key, value in batched.items()}
        for j in range(STEPS):
            clipped_advantages = sample["advantages"][:, j].clamp(-ADV_CLIP_MAX, ADV_CLIP_MAX)
            with autocast():
                log_prob = transformer.log_prob(sample, j)
            ratio = torch.exp(log_prob - sample["log_probs"][:, j])
            plain, clipped = (
                -clipped_advantages * factor for factor in (ratio, ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE))
            )
            policy_loss = torch.mean(torch.maximum(plain, clipped))
            loss = policy_loss
            accelerator.backward(loss)
    return {**result, "kept": kept}


def sampling_phase(reward_fn: Callable[..., Any], batches: Sequence[tuple]) -> dict[str, np.ndarray]:
    """The gathered components of an epoch; a batch is (images, prompts, metadata), maybe with the source images."""
    starts = np.cumsum([0, *(len(batch[1]) for batch in batches)])
    rows = [torch.arange(*ends) for ends in itertools.pairwise(starts)]
    numbered = [(ids, *batch) for ids, batch in zip(rows, batches, strict=True)]
    pipeline = Pipeline(int(starts[-1]))
    gathered = flow_grpo_epoch(reward_fn, numbered, pipeline, Accelerator(), PerPromptStatTracker())["rewards"]
    gathered["avg"] = gathered.pop("ori_avg")
    return gathered


def evaluation(
    reward_fn: Callable[..., Any], batches: Sequence[tuple], accelerator: Accelerator
) -> dict[str, np.floating]:
    """The scripts' evaluation: the same function with the metadata of the test set, and a curve per component."""
    components: defaultdict[str, list[np.ndarray]] = defaultdict(list)
    with ThreadPoolExecutor(max_workers=8) as executor:
        for images, prompts, prompt_metadata, *ref_images in batches:
            call = executor.submit(reward_fn, images, prompts, prompt_metadata, *ref_images, only_strict=False)
            for key, value in call.result()[0].items():
                components[key].append(accelerator.gather(torch.as_tensor(value)).numpy())
    found = {key: np.concatenate(values) for key, values in components.items()}
    return {f"eval_reward_{key}": np.mean(value[value != -10]) for key, value in found.items()}


def nft_epoch(
    reward_fn: Callable[..., Any],
    batches: Sequence[tuple],
    pipeline: Pipeline,
    accelerator: Accelerator,
    stat_tracker: Any,
    *,
    beta: float = 0.1,
    targets: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """One epoch of DiffusionNFT, and of Edit-R1 with its source images and tracker: advantages become r in [0, 1].

    r weighs the way towards the sampled latents against that away from them, or DiffusionOPSD's two targets.
    """
    enable_amp, mixed_precision_dtype = True, torch.bfloat16
    torch_autocast = functools.partial(torch.autocast, "cpu")
    rank, world_size, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    transformer_ddp, samples_data_list = pipeline.transformer, []
    autocast = functools.partial(torch_autocast, enabled=enable_amp, dtype=mixed_precision_dtype)
    with ThreadPoolExecutor(max_workers=8) as executor, torch.no_grad(), autocast():
        for rows, images, prompts, prompt_metadata, *ref_images in batches:
            future = executor.submit(reward_fn, images, prompts, prompt_metadata, *ref_images, only_strict=True)
            latents = torch.ones(len(rows), STEPS + 1, 4, 2, 2)
            samples_data_list.append(
                {
                    "prompt_ids": encoded(prompts),
                    "prompt_embeds": rows[:, None].bfloat16(),
                    "pooled_prompt_embeds": rows,
                    "timesteps": torch.tensor([1000.0, 500.0]).repeat(len(rows), 1),
                    "latents_clean": latents[:, -1],
                    "rewards": future,
                }
            )
        for item in samples_data_list:
            scored, _ = item["rewards"].result()
            item["rewards"] = {key: torch.as_tensor(value, device=device).float() for key, value in scored.items()}
    collated_samples = collated(samples_data_list)
    collated_samples["rewards"]["avg"] = collated_samples["rewards"]["avg"].unsqueeze(1).repeat(1, STEPS)
    gathered_rewards_dict = {}
    for key, value in collated_samples["rewards"].items():
        gathered_rewards_dict[key] = accelerator.gather(value).numpy()
    curves = {f"reward_{key}": value.mean() for key, value in gathered_rewards_dict.items()}
    prompts_all_decoded = decoded(accelerator.gather(collated_samples["prompt_ids"]).numpy())
    advantages = stat_tracker.update(prompts_all_decoded, gathered_rewards_dict["avg"])
    valid = np.ones(1)
    if isinstance(advantages, tuple):
        advantages, stds, means = advantages
        valid = (stds > 0.05) & (means < 0.9)
    valid = np.broadcast_to(valid, advantages.shape)
    for name, values in (("advantages", advantages), ("valid_mask", valid)):
        own = values.reshape(world_size, -1, STEPS)[rank]
        collated_samples[name] = torch.from_numpy(own.copy()).to(device)
    own = collated_samples["advantages"]
    del collated_samples["rewards"]
    del collated_samples["prompt_ids"]

    order = torch.randperm(len(own))
    train_sample_batch = {key: value[order] for key, value in collated_samples.items()}
    for j_idx in range(STEPS):
        x0 = train_sample_batch["latents_clean"]
        t = (train_sample_batch["timesteps"][:, j_idx] / 1000).view(-1, 1, 1, 1)
        xt = (1 - t) * x0 + t * torch.randn_like(x0)
        with autocast():
            prediction = transformer_ddp(
                hidden_states=xt,
                timestep=train_sample_batch["timesteps"][:, j_idx],
                encoder_hidden_states=train_sample_batch["prompt_embeds"],
                pooled_projections=train_sample_batch["pooled_prompt_embeds"],
                return_dict=False,
            )[0]
        before = prediction.detach()
        r = (train_sample_batch["advantages"][:, j_idx] / ADV_CLIP_MAX / 2 + 0.5).clamp(0, 1)
        towards, away = (
            (xt - t * ((1 - sign * beta) * before + sign * beta * prediction) - target).square().mean((1, 2, 3))
            for sign, target in zip((1, -1), targets or (x0, x0), strict=True)
        )
        mask = train_sample_batch["valid_mask"][:, j_idx].float()
        each = (r * towards + (1 - r) * away) * mask / beta
        policy_loss = (each * ADV_CLIP_MAX).sum() / mask.sum().clamp(min=1)
        loss = policy_loss
        loss.backward()
    return {"curves": curves, "rewards": gathered_rewards_dict, "advantages": own}


def opsd_epoch(
    rewards: ModuleType, reward_fn: dict[str, float], batches: Sequence[tuple], pipeline: Pipeline
) -> dict[str, Any]:
    """DiffusionOPSD: the first name of `config.reward_fn` says whose gradient makes the targets, here two constants."""
    accelerator = Accelerator()
    fn, differentiable = rewards.multi_score(accelerator.device, reward_fn), list(reward_fn.keys())[0]  # noqa: RUF015
    assert differentiable in ("pickscore", "aesthetic")
    return nft_epoch(fn, batches, pipeline, accelerator, PerPromptStatTracker(), targets=(1.5, 0.5))


class DDPOStatTracker:
    """ddpo-pytorch's tracker: its buffer has the dtype of the rewards."""

    def update(self, prompts: Sequence[str], rewards: np.ndarray) -> np.ndarray:
        prompts, advantages = np.array(prompts), np.empty_like(rewards)
        for prompt in np.unique(prompts):
            own = prompts == prompt
            advantages[own] = (rewards[own] - rewards.mean()) / (rewards.std() + 1e-6)
        return advantages


def _ddpo_gradient(advantages: np.ndarray) -> Tensor:
    """Of DDPO's loss at ratio 1 after each row's log-probability."""
    log_probs = torch.zeros(len(advantages), requires_grad=True)
    found, ratio = torch.as_tensor(advantages).clamp(-ADV_CLIP_MAX, ADV_CLIP_MAX), torch.exp(log_probs)
    torch.mean(torch.maximum(-found * ratio, -found * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE))).backward()
    return log_probs.grad


def ddpo_epoch(rewards: ModuleType, reward_fn: str, batches: Sequence[tuple]) -> tuple[np.ndarray, Tensor]:
    """ddpo-pytorch: the reward by its name in the module, two threads, and the gradient of its loss."""
    fn = getattr(rewards, reward_fn)()
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(fn, *batch) for batch in batches]
        results = [future.result() for future in futures]
    scores = torch.cat([torch.as_tensor(found, device="cpu") for found, _ in results]).numpy()
    assert all(f"{score:.2f}" for score in results[-1][0])  # captions of the logged images
    prompts = [prompt for batch in batches for prompt in batch[1]]
    return scores, _ddpo_gradient(DDPOStatTracker().update(prompts, scores))


def trl_ddpo_step(
    reward_function: Callable[..., Any],
    images: Tensor,
    prompts: tuple[str, ...],
    *,
    async_reward_computation: bool = False,
) -> Tensor:
    """TRL's DDPOTrainer up to 0.23, without statistics per prompt: the gradient of its loss."""
    pairs = [[images, prompts, tuple({} for _ in prompts)]]
    if async_reward_computation:
        with ThreadPoolExecutor(max_workers=2) as executor:
            found = executor.map(lambda pair: reward_function(*pair), pairs)
            scored = [(reward.result(), metadata.result()) for reward, metadata in found]
    else:
        scored = [reward_function(*pair) for pair in pairs]
    rewards = torch.cat([torch.as_tensor(reward, device="cpu") for reward, _ in scored]).numpy()
    return _ddpo_gradient((rewards - rewards.mean()) / (rewards.std() + 1e-8))


def trl_alignprop_step(reward_function: Callable[..., Any], images: Tensor, prompts: tuple[str, ...]) -> None:
    """TRL's AlignPropTrainer up to 0.23: the loss is hard-coded."""
    rewards, _ = reward_function(images, prompts, tuple({} for _ in prompts))
    (10.0 - rewards.mean()).backward()
