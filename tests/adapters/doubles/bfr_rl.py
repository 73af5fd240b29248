"""BFR_RL from the line that builds the reward to the gradient of its policy and of its likelihood term."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from tests.adapters.doubles.flow_grpo import STEPS, Accelerator, PerPromptStatTracker, collated


def rewards_module(server: Callable[[Tensor, Tensor], list[float]]) -> ModuleType:
    """`diffbir.rewards`: a server's answers in a mapping, of which `total_scores` counts. `server` answers here."""
    module = ModuleType("diffbir.rewards")

    def face_reward_remote(device):
        def fn(images, prompts, metadata):
            return {"total_scores": server(images, metadata["gt_images"]), "lpips": [0.0] * len(prompts)}, {}

        return fn

    def multi_score(device, score_dict):
        factories = {"face_reward_remote": face_reward_remote}
        fns = {name: factories[name](device) for name in score_dict}

        def fn(images, prompts, metadata, only_strict=True):
            details, total = {}, []
            for name, weight in score_dict.items():
                answers, _ = fns[name](images, prompts, metadata)
                if answers.get("total_scores") is None:
                    raise ValueError("no total_scores")
                details |= {**answers, name: answers["total_scores"]}
                weighted = [weight * score for score in answers["total_scores"]]
                total = [old + new for old, new in zip(total, weighted, strict=True)] if total else weighted
            return {**details, "avg": total}, {}

        return fn

    module.face_reward_remote, module.multi_score = face_reward_remote, multi_score
    return module


class Policy(nn.Module):
    """Restored latents whose mean is one parameter per row."""

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(num_rows))

    def mean(self, rows: Tensor) -> Tensor:
        return self.shift[rows].view(-1, 1, 1, 1).expand(-1, 4, 2, 2)


def epoch(
    diffbir: Any,
    batches: Sequence[tuple],
    cldm: Policy,
    accelerator: Accelerator,
    *,
    total: str,
    kl_beta: float = 0.0,
) -> dict[str, Any]:
    """One epoch of its loop, which takes the component `total` for its advantages, grouped by caption.

    A batch is (rows, images, captions, ground truths), images in [-1, 1]; the loop has no other metadata.
    """
    reward_fn = diffbir.rewards.multi_score(accelerator.device, {"face_reward_remote": 1.0})
    samples, captions = [], []
    with ThreadPoolExecutor(max_workers=8) as executor:
        for rows, final_images, caption, gt in batches:
            call = executor.submit(reward_fn, final_images, caption, {"gt_images": gt}, only_strict=True)
            latents = torch.arange(STEPS + 1.0).expand(len(rows), -1)[..., None, None, None].expand(-1, -1, 4, 2, 2)
            samples.append(
                {
                    "next_latents": latents[:, 1:], "log_probs": torch.full((len(rows), STEPS), torch.nan),
                    "condition": {"rows": rows}, "kl": torch.zeros(len(rows), STEPS), "rewards": call,
                    "gt_next_latents": torch.ones(len(rows), STEPS, 4, 2, 2),
                }
            )  # fmt: skip
            captions.extend(caption)
        for sample in samples:
            scored, _ = sample["rewards"].result()
            sample["rewards"] = {key: torch.as_tensor(value, device="cpu").float() for key, value in scored.items()}
    samples = collated(samples)
    samples["rewards"]["ori_avg"] = samples["rewards"][total]
    samples["rewards"][total] = samples["rewards"][total].unsqueeze(-1) - kl_beta * samples["kl"]
    gathered_rewards = {key: accelerator.gather(value).numpy() for key, value in samples["rewards"].items()}
    gathered_captions = captions
    advantages = PerPromptStatTracker(global_std=True).update(gathered_captions, gathered_rewards[total])
    own = torch.as_tensor(advantages).reshape(accelerator.num_processes, -1, STEPS)[accelerator.process_index]
    samples["advantages"] = own
    del samples["rewards"]

    mask = samples["advantages"].abs().sum(dim=1) != 0
    samples = {
        key: {name: rows[mask] for name, rows in value.items()} if isinstance(value, dict) else value[mask]
        for key, value in samples.items()
    }
    batch_indices = torch.randperm(len(samples["advantages"]))
    names = ("next_latents", "advantages", "gt_next_latents")  # its loop names the entries that it trains with
    sample_batch = {name: samples[name][batch_indices] for name in names}
    rows = samples["condition"]["rows"][batch_indices]
    for j in range(STEPS):
        mean = cldm.mean(rows)
        _d = Normal(mean, torch.ones_like(mean))
        log_prob = _d.log_prob(sample_batch["next_latents"][:, j]).mean((1, 2, 3))
        _g = sample_batch["gt_next_latents"][:, j]
        _reg = mean.new_zeros(())
        if j == STEPS - 1:
            _reg = (1.0 - (_d.log_prob(_g).flatten(1).mean(1) / 40.0).exp()).mean()
        advantage_j = sample_batch["advantages"][:, j].clamp(-5, 5)
        ratio = torch.exp(log_prob - log_prob.detach())
        policy_loss = torch.mean(torch.maximum(-advantage_j * ratio, -advantage_j * ratio.clamp(0.999, 1.001)))
        loss_total = policy_loss + 0.001 * _reg
        accelerator.backward(loss_total)
    return {"advantages": own, "rewards": gathered_rewards, "kept": int(mask.sum())}
