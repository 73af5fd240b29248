"""Every kind of model in `examples/policies`, built there as users build it, with tiny networks of random weights.

`restored` gives what a policy's own sampler restores, and `reference` what the pipeline, the network or the paper's
equations in float64 make of the same inputs and noise.
"""

import contextlib
import copy
import importlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import diffusers
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.policies.nafnet import Residual
from iqareward.diffusion import Batch, Noise, Policy, rollout
from iqareward.diffusion.conditions import check_condition
from iqareward.diffusion.policies.core import evaluating
from iqareward.diffusion.policies.tokens import to_tokens
from tests.diffusion.policies import flow_pipelines as flow
from tests.diffusion.policies import paper_samplers as paper
from tests.diffusion.policies import sd_pipelines as sd


@dataclass(frozen=True)
class Kind:
    """A file of `examples/policies`, and the models in the field that it stands for."""

    models: str
    adds_noise: bool = True  # whether there is a forward process, for DiffusionNFT to learn from
    scale: int = 1
    num_steps: int = 4


KINDS = {
    "resshift": Kind("residual shifting, x4: ResShift, SinSR", scale=4, num_steps=15),
    "ir_sde": Kind("mean-reverting SDE in pixels: IR-SDE, Refusion", num_steps=100),
    "diffbir": Kind("latent ControlNet with captions, guidance, colour fix: DiffBIR, SeeSR, PASD"),
    "osediff": Kind("one step, LoRA in UNet and encoder, x4: OSEDiff, PiSA-SR", adds_noise=False, scale=4, num_steps=1),
    "gdpo_sr": Kind("one step from noised degraded latents, x4: GDPO-SR, InvSR", scale=4, num_steps=1),
    "upscaler": Kind("upscaler with noise level as class label, x4: StableDiffusionUpscale", scale=4),
    "sd3_controlnet": Kind("flow matching with ControlNet, guidance 7: SD3"),
    "flux_kontext": Kind("flow matching, edit model, packed tokens, LoRA: Flux Kontext"),
    "qwen_edit": Kind("flow matching, edit model, LoRA: Qwen-Image-Edit"),
    "swinir": Kind("feed-forward from a checkpoint, x2: SwinIR, HAT", adds_noise=False, scale=2, num_steps=1),
    "nafnet": Kind("feed-forward, own module: NAFNet, AdaIR, Restormer", adds_noise=False, num_steps=1),
}


def pixel_unet() -> nn.Module:
    """A UNet with 6 channels in and 3 out."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    return flow.seeded(lambda: diffusers.UNet2DModel(16, 6, 3, **sizes, **blocks), seed=7)


def vq_autoencoder() -> nn.Module:
    """A VQModel with factor 4 and 3 latent channels."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "latent_channels": 3,
        "num_vq_embeddings": 16,
        "scaling_factor": 1.0,
    }
    return flow.seeded(lambda: diffusers.VQModel(**blocks, **sizes), seed=8)


def swinir() -> nn.Module:
    """SwinIR x2 in windows of 4, with drop path."""
    from spandrel.architectures.SwinIR import SwinIR

    sizes = {"img_size": 8, "window_size": 4, "embed_dim": 12, "depths": [2], "num_heads": [2], "mlp_ratio": 2}
    return flow.seeded(lambda: SwinIR(**sizes, upscale=2, upsampler="pixelshuffledirect"), seed=9)


def cleaner() -> nn.Module:
    """NAFNet with two levels."""
    from spandrel.architectures.NAFNet import NAFNet

    return flow.seeded(lambda: NAFNet(width=8, enc_blk_nums=[1], middle_blk_num=1, dec_blk_nums=[1]), seed=10)


def _file(folder: Path, network: nn.Module, name: str = "model.safetensors") -> str:
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    if name.endswith(".pth"):
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name)
    return str(folder / name)


# What `from_pretrained` of each class gives, and the arguments of `build`.
_LOADED = {
    "resshift": {"UNet2DModel": pixel_unet, "VQModel": vq_autoencoder},
    "ir_sde": {"UNet2DModel": pixel_unet},
    "diffbir": {"StableDiffusionControlNetPipeline": sd.controlled},
    "osediff": {"StableDiffusionPipeline": sd.text_to_image},
    "gdpo_sr": {"StableDiffusionPipeline": sd.text_to_image},
    "upscaler": {"StableDiffusionUpscalePipeline": sd.upscaling},
    "sd3_controlnet": {
        "StableDiffusion3ControlNetPipeline": flow.sd3_controlnet,
        "SD3ControlNetModel": lambda: None,
    },
    "flux_kontext": {"FluxKontextPipeline": flow.flux_kontext},
    "qwen_edit": {"QwenImageEditPipeline": flow.qwen_edit},
}
_ARGUMENTS = {
    "diffbir": lambda folder: ("hub/id", _file(folder, cleaner())),
    "sd3_controlnet": lambda folder: ("hub/id", "hub/controlnet"),
    "swinir": lambda folder: (_file(folder, swinir()),),
    "nafnet": lambda folder: (_file(folder, flow.seeded(lambda: Residual(8), seed=11), "weights.pth"),),
}


def policy_of(kind: str) -> Policy:
    """The policy of the example file, in float32, always with the same weights."""
    example = importlib.import_module(f"examples.policies.{kind}")
    with contextlib.ExitStack() as stack, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of adapters
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, make in _LOADED.get(kind, {}).items():
            loaded = make()
            stack.enter_context(
                patch.object(getattr(diffusers, name), "from_pretrained", lambda *_, loaded=loaded, **__: loaded)
            )
        if kind == "nafnet":
            stack.enter_context(patch.object(example, "Residual", lambda: Residual(8)))
        return example.build(*_ARGUMENTS.get(kind, lambda folder: ("hub/id",))(folder))


def inputs(kind: str, count: int = 2, *, first: int = 0) -> Batch:
    """Smooth images of 8 bits with sides of 16, or 8 for super-resolution; captions of different lengths."""
    side, ids = (16 if KINDS[kind].scale == 1 else 8), tuple(range(first, first + count))
    rows = [torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(number)) for number in ids]
    coarse = torch.stack(rows).mul(255).round() / 255
    degraded, references = (
        nn.functional.interpolate(coarse, (size, size)) for size in (side, side * KINDS[kind].scale)
    )
    prompts = tuple("a cat" if number % 2 else "a very big dog" for number in ids)
    return Batch(ids, degraded, references.flip(1), prompts=prompts)


@torch.no_grad()
def parity(kind: str) -> float:
    """The largest difference between the restored images of the policy's own sampler and of the reference."""
    policy, batch, noise = policy_of(kind), inputs(kind), Noise((0, 1))
    condition = check_condition(policy.condition(batch, noise), 2, caller=kind)
    with evaluating(policy):
        path = rollout(policy, condition, noise, num_steps=KINDS[kind].num_steps)
        ours = policy.decode(path.sample, condition)
    assert ours.shape == batch.references.shape
    fresh = [noise(index, path.sample.shape[1:]).double() for index in range(len(path.schedule))]
    theirs = _REFERENCES[kind](policy, batch, condition, path.latents[0], fresh)
    return float((ours.clamp(0, 1) - theirs.clamp(0, 1)).abs().max())


def _resshift(policy, batch, condition, start, noises):
    exact, first = paper.exact(policy), Noise((0, 1))("start", start.shape[1:]).double()
    anchor = nn.functional.interpolate(batch.degraded, scale_factor=4, mode="bicubic").clamp(0, 1)
    anchor = exact.autoencoder.vae.encode(2 * anchor.double() - 1).latents
    latents = paper.resshift(exact.model, anchor, 2 * batch.degraded.double() - 1, [first, *noises])
    return (exact.autoencoder.vae.decode(latents).sample + 1) / 2


def _ir_sde(policy, batch, condition, start, noises):
    first = Noise((0, 1))("start", start.shape[1:]).double()
    return paper.ir_sde(paper.exact(policy).model, batch.degraded.double(), [first, *noises])


def _diffbir(policy, batch, condition, start, noises):
    exact = paper.exact(policy)
    cleaned = copy.deepcopy(policy.cleaner.model).double()(batch.degraded.double()).clamp(0, 1)
    embeddings = [condition[name]["prompt"].double() for name in ("negative", "prompts")]
    latents = paper.spaced(exact, cleaned, embeddings, start.double(), noises, guidance=4.0)
    images = (exact.autoencoder.vae.decode(latents / exact.autoencoder.vae.config.scaling_factor).sample + 1) / 2
    return images - paper.low_frequencies(images) + paper.low_frequencies(cleaned)


def _one_step(policy, batch, condition, start, noises):
    exact, scale = paper.exact(policy), policy.autoencoder.vae.config.scaling_factor
    degraded = nn.functional.interpolate(batch.degraded.double(), scale_factor=4, mode="bicubic").clamp(0, 1)
    latents = exact.encoder.vae.encode(2 * degraded - 1).latent_dist.mean * scale
    alpha_bars = policy.process.scheduler.alphas_cumprod.double()
    if policy.noise_timestep is not None:
        level = alpha_bars[policy.noise_timestep]
        latents = level.sqrt() * latents + (1 - level).sqrt() * start.double()
    level = alpha_bars[policy.timestep]
    noise = exact.unet(latents, policy.timestep, condition["prompts"]["prompt"].double()).sample
    clean = (latents - (1 - level).sqrt() * noise) / level.sqrt()
    images = (exact.autoencoder.vae.decode(clean / scale).sample + 1) / 2
    target, own = degraded.flatten(2), images.flatten(2)
    own = (own - own.mean(2, True)) / (own.std(2, keepdim=True) + 1e-5) * target.std(2, keepdim=True)
    return (own + target.mean(2, True)).view_as(images)


def _upscaler(policy, batch, condition, start, noises):
    pipeline = sd.upscaling()
    shaped = batch.degraded.shape
    fresh = Noise((0, 1))("low_res", shaped[1:])
    with patch(
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_upscale.randn_tensor", lambda *_, **__: fresh
    ):
        return pipeline(
            image=2 * batch.degraded - 1,
            num_inference_steps=4,
            guidance_scale=9.0,
            noise_level=20,
            latents=start,
            prompt_embeds=condition["prompts"]["prompt"],
            negative_prompt_embeds=condition["negative"]["prompt"],
            output_type="pt",
        ).images


def _sd3_controlnet(policy, batch, condition, start, noises):
    prompts, negative = condition["prompts"], condition["negative"]
    return flow.sd3_controlnet()(
        control_image=2 * batch.degraded - 1,
        num_inference_steps=4,
        guidance_scale=7.0,
        latents=start,
        prompt_embeds=prompts["prompt"],
        pooled_prompt_embeds=prompts["pooled"],
        negative_prompt_embeds=negative["prompt"],
        negative_pooled_prompt_embeds=negative["pooled"],
        output_type="pt",
    ).images


def _flux_kontext(policy, batch, condition, start, noises):
    return flow.flux_kontext()(
        image=batch.degraded,
        num_inference_steps=4,
        latents=to_tokens(start),
        prompt_embeds=condition["prompts"]["prompt"],
        pooled_prompt_embeds=condition["prompts"]["pooled"],
        height=16,
        width=16,
        max_area=16**2,
        _auto_resize=False,
        output_type="pt",
    ).images


def _qwen_edit(policy, batch, condition, start, noises):
    pipeline, negative = flow.qwen_edit(), condition["negative"]
    processor = pipeline.image_processor
    ones = torch.ones(negative["prompt"].shape[:2], dtype=torch.long)  # diffusers before 0.38 wants a mask
    # The pipeline would make every picture as large as 1024x1024.
    with patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (16, 16, None)):
        return pipeline(
            image=processor.numpy_to_pil(processor.pt_to_numpy(batch.degraded)),
            num_inference_steps=4,
            true_cfg_scale=4.0,
            latents=to_tokens(start),
            prompt_embeds=condition["prompts"]["prompt"],
            prompt_embeds_mask=condition["prompts"]["mask"],
            negative_prompt_embeds=negative["prompt"],
            negative_prompt_embeds_mask=ones if negative["mask"] is None else negative["mask"],
            height=16,
            width=16,
            output_type="pt",
        ).images


def _swinir(policy, batch, condition, start, noises):
    padded = nn.functional.pad(batch.degraded, (0, 7, 0, 7), mode="reflect")
    padded = nn.functional.pad(padded, (0, 1, 0, 1), mode="replicate").double()
    return swinir().double()(padded)[..., :16, :16]


def _nafnet(policy, batch, condition, start, noises) -> Tensor:
    return flow.seeded(lambda: Residual(8), seed=11).double()(batch.degraded.double())


_REFERENCES = {
    "resshift": _resshift,
    "ir_sde": _ir_sde,
    "diffbir": _diffbir,
    "osediff": _one_step,
    "gdpo_sr": _one_step,
    "upscaler": _upscaler,
    "sd3_controlnet": _sd3_controlnet,
    "flux_kontext": _flux_kontext,
    "qwen_edit": _qwen_edit,
    "swinir": _swinir,
    "nafnet": _nafnet,
}
