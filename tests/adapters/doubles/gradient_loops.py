"""Loops that follow a reward's gradient, as far as a loss can notice: AlignProp, VADER and ReNO."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class AlignPropTrainer:
    """Its training step, on a generator that is one tensor of pixels."""

    def __init__(self, reward_fn: str, pixels: nn.Parameter) -> None:
        if reward_fn not in ("hps", "aesthetic"):
            raise NotImplementedError(f"{reward_fn}: theirs knows two names; ours replaces its loss instead")
        self.reward_fn, self.pixels = reward_fn, pixels
        self.loss_fn: Callable[..., Any] = self.shipped_loss

    @staticmethod
    def shipped_loss(images: Tensor) -> tuple[Tensor, Tensor]:
        """Like its own losses: it takes [0, 1] for [-1, 1]."""
        rewards = ((images / 2) + 0.5).clamp(0, 1).mean((1, 2, 3))
        return -rewards, rewards

    def step(self, prompts: Sequence[str]) -> tuple[float, Tensor]:
        """The loss and the rewards that are logged."""
        with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
            images = self.pixels.sigmoid()  # denormalised to [0, 1] by its pipeline
            texts = (list(prompts),) if "hps" in self.reward_fn else ()
            loss, rewards = self.loss_fn(images, *texts)
            logged = rewards.detach().cpu().numpy()
            assert loss.shape == rewards.shape == (len(prompts),)
            loss = loss.mean() * 0.01
            loss.backward()
        return loss.item(), torch.from_numpy(logged)


def vader_step(
    loss_fn: Callable[..., Any], frames: Tensor, prompts: Sequence[str], *, reward: str
) -> tuple[float, float]:
    """Decoded frames `[B, 3, H, W]` in [-1, 1], in half precision; the scalars that are logged."""
    texts = () if reward == "aesthetic" else (list(prompts),)
    loss, rewards = loss_fn(frames.to(torch.bfloat16), *texts)
    logged = loss.repeat(len(prompts)).mean().item()
    loss.backward()
    return logged, rewards.item()


def clip_crop(image: Tensor) -> Tensor:
    """224 pixels and CLIP's normalisation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (nn.functional.interpolate(image, size=(224, 224), mode="bicubic") - mean) / std


class LatentNoiseTrainer:
    """ReNO's trainer, on a generator that shows its latents."""

    def __init__(self, reward_losses: Sequence[Any], iterations: int) -> None:
        self.reward_losses, self.iterations = reward_losses, iterations
        self.preprocess_fn: Callable[[Tensor], Tensor] = clip_crop

    def train(self, latents: nn.Parameter, prompt: str) -> list[dict[str, float]]:
        """What it logs in each iteration."""
        optimizer, logs = torch.optim.SGD([latents], 5.0), []
        for _ in range(self.iterations):
            optimizer.zero_grad()
            image = (latents / 2 + 0.5).clamp(0, 1)
            seen = self.preprocess_fn(image)
            total, log = torch.zeros((), dtype=latents.dtype), {}
            for reward_loss in self.reward_losses:
                loss = reward_loss(seen, prompt)
                total = total + loss * reward_loss.weighting
                log[reward_loss.name] = loss.item()
            logs.append(log)
            total.backward()
            torch.nn.utils.clip_grad_norm_(latents, 0.1)
            optimizer.step()
        return logs
