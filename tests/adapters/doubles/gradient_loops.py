"""Loops that follow a reward's gradient, and what they do with the loss: AlignProp, VADER and ReNO."""

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def alignprop_module() -> SimpleNamespace:
    """Its module: two factories, which download their models, and the trainer, which calls one of them."""
    module = SimpleNamespace(downloads=[])

    def aesthetic_loss_fn(**options: Any) -> Callable[..., Any]:
        module.downloads.append("CLIP and the aesthetic head")

        def loss_fn(images: Tensor) -> tuple[Tensor, Tensor]:
            rewards = ((images / 2) + 0.5).clamp(0, 1).mean((1, 2, 3))  # takes [0, 1] for [-1, 1]
            return -rewards * options["grad_scale"], rewards

        return loss_fn

    def hps_loss_fn(inference_dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
        module.downloads.append("HPSv2")
        return lambda images, prompts: None

    class AlignPropTrainer:
        """Its training step, on a generator that is one tensor of pixels before a sigmoid."""

        def __init__(self, pixels: nn.Parameter, reward_fn: str, loss_coeff: float = 0.01) -> None:
            self.pixels, self.reward_fn, self.loss_coeff = pixels, reward_fn, loss_coeff
            self.optimizer = torch.optim.AdamW([pixels], 0.01, weight_decay=0.0)
            device, dtype = torch.device("cpu"), torch.bfloat16
            if reward_fn == "hps":
                self.loss_fn = module.hps_loss_fn(dtype, device)
            elif reward_fn == "aesthetic":
                self.loss_fn = module.aesthetic_loss_fn(
                    grad_scale=1.0, aesthetic_target=None, accelerator=None, torch_dtype=dtype, device=device
                )
            else:
                raise NotImplementedError

        def step(self, prompts: Sequence[str]) -> dict[str, float]:
            """What it logs."""
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
                images = self.pixels.sigmoid()  # its pipeline denormalises to [0, 1]
                texts = (list(prompts),) if "hps" in self.reward_fn else ()
                loss, rewards = self.loss_fn(images, *texts)
                logged = torch.cat([rewards]).detach().cpu().numpy()  # gathered
                loss = loss.mean() * self.loss_coeff
                loss.backward()
                nn.utils.clip_grad_norm_([self.pixels], 1.0)
                self.optimizer.step()
            return {"reward_mean": float(logged.mean()), "reward_std": float(logged.std()), "loss": loss.item()}

    module.aesthetic_loss_fn, module.hps_loss_fn = aesthetic_loss_fn, hps_loss_fn
    module.AlignPropTrainer = AlignPropTrainer
    return module


def vader_step(
    loss_fn: Callable[..., Any], frames: nn.Parameter, prompts: Sequence[str], *, reward_fn: str
) -> dict[str, float]:
    """What it logs of a step on decoded frames `[B, 3, H, W]` in [-1, 1], cast to the model's half precision."""
    optimizer = torch.optim.SGD([frames], 1.0)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = frames.to(torch.bfloat16)
        without = reward_fn in ("aesthetic", "rainy", "snowy", "objectDetection", "compression_score")
        loss, rewards = loss_fn(half) if without else loss_fn(half, list(prompts))
    average = loss.repeat(len(prompts)).mean()  # gathered
    loss.backward()
    nn.utils.clip_grad_norm_([frames], 1.0)
    optimizer.step()
    return {
        "avg_loss": average.item(),
        "step_loss": loss.detach().item(),
        "step_reward": rewards.detach().item(),
    }


def clip_crop(image: Tensor) -> Tensor:
    """224 pixels and CLIP's normalisation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (nn.functional.interpolate(image, size=(224, 224), mode="bicubic") - mean) / std


class LatentNoiseTrainer:
    """ReNO's trainer, on a generator that shows its latents in half precision."""

    def __init__(self, reward_losses: Sequence[Any], n_iters: int) -> None:
        self.reward_losses, self.n_iters = reward_losses, n_iters
        self.preprocess_fn: Callable[[Tensor], Tensor] = clip_crop

    def train(
        self, latents: nn.Parameter, prompt: str, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, dict[str, float], dict[str, float]]:
        """The best image, and the losses that were logged first and for that image."""
        best_loss, best_image, logs, best = math.inf, None, [], {}
        for iteration in range(self.n_iters):
            optimizer.zero_grad()
            image = (latents / 2 + 0.5).clamp(0, 1).half()
            total, log = 0, {}
            seen = self.preprocess_fn(image)
            for reward_loss in self.reward_losses:
                loss = reward_loss(seen, prompt)
                total += loss * reward_loss.weighting
                log[reward_loss.name] = loss.item()
            log["total"] = reached = total.item()
            norm = torch.linalg.vector_norm(latents).float()
            total += (0.01 * (0.5 * norm**2 - (latents[0].numel() - 1) * norm.log())).to(total.dtype)
            logs.append(log)
            if reached < best_loss:
                best_loss, best_image, best = reached, image, log
            if iteration != self.n_iters - 1:
                total.backward()
                nn.utils.clip_grad_norm_(latents, 0.1)
                optimizer.step()
        return best_image.detach().float(), logs[0], best
