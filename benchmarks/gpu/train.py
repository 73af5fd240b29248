"""The reference loop on a ControlNet of Stable Diffusion 1.5's size: seconds of an update, and the reward's share."""

import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

import iqareward
from benchmarks.gpu.device import CUDA, DEVICE, Row, gap, patched, peak_gib, seconds, waits, wall_ms
from benchmarks.gpu.mllm import qalign_network
from benchmarks.gpu.run import Clock, release
from iqareward.diffusion import (
    DDIM,
    Autoencoder,
    ControlNetPolicy,
    DifficultyAdaptiveTrainer,
    FixedPrompt,
    RolloutConfig,
    TrainConfig,
)
from iqareward.diffusion.checkpoint import trained_weights
from tests.diffusion.train_tiny import trainer


def run(clock: Clock) -> None:
    clock.step("resume", resume, need=5, most=60)
    model = clock.prepare("judge", partial(qalign_network, clock.tiny), most=60)
    for overlap in (False, True) if model is not None else ():
        key = "sd1.5 controlnet" + ", overlap" * overlap
        clock.step(key, partial(updates, clock, model, overlap), need=12, most=80)
        release()
    clock.step("vae decode", partial(decode_memory, clock.tiny), need=4)


def fresh_accelerator(**options: Any) -> Accelerator:
    """accelerate refuses another precision in the same process unless its shared state is forgotten."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(**options)


def resume() -> Row:
    """A small policy: three updates at once, and two and one after a restart."""
    with tempfile.TemporaryDirectory() as folder:
        make = partial(trainer, reward=iqareward.load("gmsd"), validation=None, accelerator=fresh_accelerator())
        whole, first, second = (make(Path(folder) / name) for name in ("whole", "parts", "parts"))
        whole.train(3)
        first.train(2, save_every=1)
        second.train(3, resume=True)
    weights, others = (trained_weights(run.policy.model) for run in (whole, second))
    off = max(gap(weights[name], others[name]) for name in weights)
    return {"equal": off == 0, "largest_gap": off, "device": str(whole.accelerator.device)}


def autoencoder(tiny: bool) -> Autoencoder:
    """Of Stable Diffusion 1.5's size."""
    widths, groups = ((16, 32, 32, 32), 4) if tiny else ((128, 256, 512, 512), 32)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    with DEVICE:
        vae = diffusers.AutoencoderKL(
            down_block_types=down, up_block_types=up, block_out_channels=widths, layers_per_block=2,
            norm_num_groups=groups,
        )  # fmt: skip
    return Autoencoder(vae.to(torch.bfloat16))


@torch.no_grad()
def decode_memory(tiny: bool) -> Row:
    """What decoding all rollouts of one update takes; the piece that is decoded at once sets the peak."""
    made, found = autoencoder(tiny), {}
    for rows in (1, 2) if tiny else (8, 32, 64):
        call = partial(made.decode, torch.randn(rows, 4, *(4, 4) if tiny else (64, 64), device=DEVICE))
        found[f"{rows} rows"] = {"peak_gib": peak_gib(call), "wall_ms": wall_ms(call, 1)}
        release()
    return found


class Noise:
    """Eight blurred noise images with noise on top."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        low, rng = self.side // 8, torch.Generator().manual_seed(index)
        coarse = torch.rand(1, 3, low, low, generator=rng)
        true = torch.nn.functional.interpolate(coarse, size=(self.side, self.side), mode="bicubic")[0].clamp(0, 1)
        return {"lq": (true + 0.1 * torch.randn(true.shape, generator=rng)).clamp(0, 1), "gt": true}


def controlnet_trainer(tiny: bool, reward: Any, overlap: bool) -> DifficultyAdaptiveTrainer:
    """4 inputs x 4 rollouts x 10 steps at 512, the ControlNet in float32 under autocast, the UNet in bfloat16."""
    small = {
        "block_out_channels": (16, 32), "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "norm_num_groups": 4, "cross_attention_dim": 16,
    }  # fmt: skip
    with DEVICE:
        unet = diffusers.UNet2DConditionModel(sample_size=64, **(small if tiny else {"cross_attention_dim": 768}))
        control = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=3)
        prompt = FixedPrompt({"prompt": torch.randn(1, 77, 16 if tiny else 768)})
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    process = DDIM.from_scheduler(scheduler)
    policy = ControlNetPolicy(control, unet.to(torch.bfloat16), autoencoder(tiny), process, prompt)
    return DifficultyAdaptiveTrainer(
        policy, reward, Noise(32 if tiny else 512), output_dir=tempfile.mkdtemp(), show_progress=False, overlap=overlap,
        accelerator=fresh_accelerator(mixed_precision="bf16"),
        rollout_config=RolloutConfig(group_size=2 if tiny else 4, num_steps=2 if tiny else 10, inputs_at_once=2),
        train_config=TrainConfig(inputs_per_update=4, rows_at_once=4 if tiny else 2),
    )  # fmt: skip


def updates(clock: Clock, model: Any, overlap: bool) -> Row:
    """Seconds of an update; without overlap also where they go, in one more that waits after every part."""
    reward = iqareward.QAlignReward(model, batch_size=32)
    run = controlnet_trainer(clock.tiny, reward, overlap)
    found: Row = {"rollouts": 4 * run.rollout_config.group_size, "calibrate_s": round(seconds(run.calibrate), 2)}
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    took = found["update_s"] = [round(seconds(run.update), 3)]
    while len(took) < (1 if clock.tiny else 3) and clock.left() > 4 * took[-1]:
        took.append(round(seconds(run.update), 3))
    found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    if not overlap and (clock.tiny or clock.left() > 6 * took[-1]):
        spent: dict[str, float] = {}
        parts = {"collect": (run, "experiences"), "decode": (run.policy.autoencoder, "decode"),
                 "reward": (type(reward), "__call__"), "learn": (run.learner, "learn")}  # fmt: skip
        with ExitStack() as stack:
            for key, (owner, name) in parts.items():
                stack.enter_context(patched(owner, name, stopwatch(f"{key}_s", getattr(owner, name), spent)))
            run.update()
        found |= {key: round(value, 3) for key, value in spent.items()}
        found["waits"] = waits(run.update, warm=0)
    return found


def stopwatch(key: str, method: Any, spent: dict[str, float]) -> Any:
    """The method; the seconds of its calls, with the wait for their results, are added up in `spent`."""

    def timed(*arguments: Any, **options: Any) -> Any:
        answer: list[Any] = []
        spent[key] = spent.get(key, 0.0) + seconds(lambda: answer.append(method(*arguments, **options)))
        return answer[0]

    return timed
