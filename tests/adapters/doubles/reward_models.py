"""Loops that build their own reward models, and what follows: DanceGRPO, MixGRPO, VideoX-Fun, imscore, SRPO."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn


def group_advantages(rewards: Tensor, generations: int) -> Tensor:
    """z-scores within consecutive groups."""
    groups = rewards.view(-1, generations)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-8)).flatten()


def policy_gradient(advantages: Tensor) -> Tensor:
    """The gradient to the log-probability of each sample, of the clipped loss that is taken sample by sample."""
    log_probs = nn.Parameter(torch.zeros(len(advantages)))
    for row, advantage in enumerate(advantages.clamp(-5.0, 5.0)):
        ratio = (log_probs[row] - log_probs[row].detach()).exp()
        torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - 1e-4, 1 + 1e-4)).mean().backward()
    assert log_probs.grad is not None
    return log_probs.grad


def dancegrpo(
    script: str,
    slot: SimpleNamespace,
    images: Tensor,
    captions: Sequence[str],
    folder: Path,
    *,
    generations: int | None = 2,
    suffix: str = ".jpg",
    weigh: Callable[[dict[str, Tensor]], Any] = lambda samples: None,
) -> tuple[Tensor, Tensor]:
    """One image at a time: what a script writes, what it asks of its slot, and the policy gradient that follows.

    Args:
        script: "flux", which writes PNG, or "sd", which resizes to 512 pixels and writes `suffix`.
        slot: the names that the script builds: `reward_model`, and for HPSv2 `processor` and `preprocess_val`.
        images: `[B, 3, H, W]` in [0, 1].
        captions: one per image.
        folder: where the script writes.
        generations: `--num_generations` with `--use_group`; None = the advantages of the whole batch.
        suffix: the end of the file name in train_grpo_sd.py.
        weigh: what a user does with `samples` after the advantages are computed.

    Returns:
        The rewards that are gathered and logged, and the gradient to the log-probability of each sample.
    """
    rewards = []
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        levels = 255 * image.movedim(0, -1)
        if script == "flux":
            picture, path = Image.fromarray(levels.round().byte().numpy()), str(folder / f"flux_0_{index}.png")
        else:  # rounded down
            picture = Image.fromarray(levels.byte().numpy()).resize((512, 512))
            path = str(folder / f"image-{index}-0-rank-0{suffix}")
        picture.save(path)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            if hasattr(slot, "processor"):  # hpsv2
                seen = picture if script == "flux" else Image.open(path).convert("RGB")
                pixels = slot.preprocess_val(seen).unsqueeze(0).to(device="cpu", non_blocking=True)
                text = slot.processor([caption]).to(device="cpu", non_blocking=True)
                outputs = slot.reward_model(pixels, text)
                score = torch.diagonal(outputs["image_features"] @ outputs["text_features"].T)
            else:  # hpsv3
                score = slot.reward_model.reward([path], [caption])
                if score.ndim == 2:
                    score = score[:, 0]
        rewards.append(score)
    joined = torch.cat(rewards, dim=0).to(torch.float32)
    gathered = torch.zeros_like(joined).copy_(joined)
    assert gathered.shape == (len(images),)
    if generations is None:
        advantages = (joined - gathered.mean()) / (gathered.std() + 1e-8)
    else:
        advantages = group_advantages(joined, generations)
    samples = {"rewards": joined, "advantages": advantages, "final_advantages": advantages.clone()}
    weigh(samples)
    return gathered, policy_gradient(samples["advantages" if script == "flux" else "final_advantages"])


FLAGS = {
    "HPSClipRewardModel": "hps_weight",
    "CLIPScoreRewardModel": "clip_score_weight",
    "ImageRewardModel": "image_reward_weight",
    "PickScoreRewardModel": "pick_score_weight",
}


def mixgrpo_weights(models: Sequence[Any], flags: dict[str, float]) -> dict[str, float]:
    """Its weights by class name, whose sum is 1."""
    weights = {type(model).__name__: flags.get(FLAGS.get(type(model).__name__, ""), 1.0) for model in models}
    total = sum(weights.values())
    if total > 0:
        return {name: weight / total for name, weight in weights.items()}
    return {type(model).__name__: 1.0 / len(models) for model in models}


def mixgrpo_rewards(
    images: Sequence[Image.Image], prompts: Sequence[str], models: Sequence[Any], weights: dict[str, float]
) -> tuple[list[float], list[int], dict[str, list[float]]]:
    """`compute_reward`: a thread per model, calls by class name, and reward 0 for whoever fails."""

    def one(model: Any) -> tuple[list[float], list[int]]:
        name = type(model).__name__
        try:
            if name in ("HPSClipRewardModel", "ImageRewardModel", "PickScoreRewardModel"):
                rewards = model(images, prompts)
            elif name == "CLIPScoreRewardModel":
                rewards = model(prompts, images)
            else:
                raise ValueError(f"unknown model {name}")
            assert len(rewards) == len(prompts)
            return rewards, [1] * len(rewards)
        except Exception as error:
            raise ValueError(f"{name}: {error}") from error

    rewards: dict[str, list[float]] = {}
    good: dict[str, list[int]] = {}
    with ThreadPoolExecutor(max_workers=len(models)) as pool:
        futures = {pool.submit(one, model): type(model).__name__ for model in models}
        for future in as_completed(futures):
            name = futures[future]
            try:
                rewards[name], good[name] = future.result()
            except Exception:
                rewards[name], good[name] = [0.0] * len(prompts), [0] * len(prompts)
    merged, successes = [0.0] * len(prompts), [0] * len(prompts)
    for index in range(len(prompts)):
        if all(good[name][index] == 1 for name in weights if name in good):
            merged[index] = sum(weights[name] * rewards[name][index] for name in weights if name in rewards)
            successes[index] = 1
    return merged, successes, rewards


def mixgrpo(
    models: Sequence[Any],
    flags: dict[str, float],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    generations: int,
    mix: str = "advantage_aggr",
    weigh: Callable[[dict[str, Any]], Any] = lambda samples: None,
) -> tuple[Any, Tensor]:
    """What is gathered and logged of images that are scored one at a time, and the policy gradient that follows."""
    weights = mixgrpo_weights(models, flags)
    merged: list[Tensor] = []
    apart: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for image, prompt in zip(images, prompts, strict=True):
            total, _, rewards = mixgrpo_rewards([image], [prompt], models, weights)
            merged.append(torch.tensor(total, dtype=torch.float32))
            for name, values in rewards.items():
                apart.setdefault(name, []).append(torch.tensor(values, dtype=torch.float32))
    if mix == "reward_aggr":
        gathered = torch.cat(merged)
        samples = {"rewards": gathered, "advantages": group_advantages(gathered, generations)}
    else:
        gathered = {name: torch.cat(values) for name, values in apart.items()}
        parts = [weights[name] * group_advantages(values, generations) for name, values in gathered.items()]
        samples = {"rewards": gathered, "advantages": torch.stack(parts).sum(0)}
    weigh(samples)
    return gathered, policy_gradient(samples["advantages"])


def videox_grpo(
    module: Any,
    reward_fn: str,
    reward_fn_kwargs: str,
    images: Tensor,
    texts: Sequence[str],
    *,
    weigh: Callable[[Tensor], Tensor] = lambda advantages: advantages,
) -> tuple[dict[str, float], Tensor]:
    """What VideoX-Fun's train_grpo_lora.py logs of batches of two images, and the policy gradient."""
    names, kwargs = [name.strip() for name in reward_fn.split(",")], json.loads(reward_fn_kwargs)
    kwargs = kwargs if any(name in kwargs for name in names) else {names[0]: kwargs}
    for device in ("cpu", torch.device("cpu")):  # the first only downloads
        models = {name: getattr(module, name)(device=device, dtype=torch.bfloat16, **kwargs[name]) for name in names}
    collected, prompts = [], []
    for pixels, text in zip(images.split(2), [list(texts[row : row + 2]) for row in range(0, len(texts), 2)]):
        for index, prompt in enumerate(text):
            text[index] = f"<|im_start|>user\n{prompt}<|im_end|>\n"  # its encoder changes the list
        collected.append({name: model.get_reward(pixels.unsqueeze(2), text) for name, model in models.items()})
        prompts += text
    logs, advantages = {}, torch.zeros(len(images))
    for name in names:
        gathered = torch.cat([rewards[name] for rewards in collected], dim=0)
        logs |= {f"{name}_reward_mean": gathered.mean().item()}
        rewards = torch.from_numpy(gathered.cpu().float().numpy())
        for prompt in set(prompts):
            rows = torch.tensor([other == prompt for other in prompts])
            centred = rewards[rows] - rewards[rows].mean()
            advantages[rows] += centred / (rewards.std(correction=0) + 1e-4) / len(names)
    advantages = weigh(advantages.to(torch.bfloat16)).unsqueeze(1).repeat(1, 3)
    kept = advantages.abs().sum(1) != 0
    gradient = torch.zeros(len(images))
    gradient[kept] = policy_gradient(advantages[kept, 0].float())
    return logs, gradient


def videox_reward_lora(
    module: Any, reward_fn: str, reward_fn_kwargs: str, decoded: nn.Parameter, prompts: Sequence[str]
) -> dict[str, float]:
    """What VideoX-Fun's train_reward_lora.py logs of a step on decoded frames `[B, 3, T, H, W]` in [-1, 1]."""
    loss_fn = getattr(module, reward_fn)(device="cpu", dtype=torch.bfloat16, **json.loads(reward_fn_kwargs))
    optimizer = torch.optim.SGD([decoded], 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        frames = (decoded.to(torch.bfloat16) / 2 + 0.5).clamp(0, 1)
        loss, reward = loss_fn(frames, list(prompts))
        average = loss.repeat(len(prompts)).mean(), reward.repeat(len(prompts)).mean()
        loss.backward()
    nn.utils.clip_grad_norm_([decoded], 1.0)
    optimizer.step()
    return {"train_loss": average[0].item(), "train_reward": average[1].item(), "step_reward": reward.detach().item()}


def imscore_step(model: Any, pixels: nn.Parameter, prompts: Sequence[str]) -> float:
    """The post-training step of its README, on a generator that is one tensor of pixels; the loss."""
    optimizer = torch.optim.SGD([pixels], 1.0)
    optimizer.zero_grad()
    scores = model.score(pixels, list(prompts))
    assert scores.shape == (len(prompts),)
    loss = -scores.mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def srpo_step(
    model: Any,
    decoded: nn.Parameter,
    positive: str,
    caption: str,
    *,
    script: str,
    k: float = 0.1,
    discount: float = 0.5,
) -> tuple[list[float], list[Tensor]]:
    """Losses and gradients of one step of SRPO.py ("flux": denoising, inversion) or SRPO_Qwen.py ("qwen": denoising).

    Args:
        model: the reward model.
        decoded: `[1, 3, H, W]` in [-1, 1], what the generator decodes.
        positive: the caption with a control word.
        caption: the caption.
        script: "flux", which clamps the image, or "qwen", which stretches it to [0, 1].
        k: the discount of SRPO.py, inside the score.
        discount: the discount of SRPO_Qwen.py, outside.
    """
    model.eval()
    model.requires_grad_(False)
    (trained,) = [weight for weight in [decoded, *model.parameters()] if weight.requires_grad]
    image = decoded.to(torch.bfloat16)  # its decoder runs under autocast
    with torch.autocast("cpu", torch.bfloat16):
        if script == "flux":
            image = (image / 2 + 0.5).clamp(0, 1)
            forward = model.SRP_cfg([positive], [caption], image, torch.tensor([k]))
            inverse = model.SRP_cfg([caption], [positive], image, torch.tensor([k]))
            losses = [torch.relu(-outputs + 0.7).mean() for outputs in (forward, inverse)]
        else:
            image = (image - image.min()) / (image.max() - image.min())
            losses = [(-model.SRP_cfg([positive], [caption], image, 0.0) * torch.tensor([discount])).mean()]
    pulls = [torch.autograd.grad(loss, trained, retain_graph=True)[0] for loss in losses]
    return [loss.item() for loss in losses], pulls
