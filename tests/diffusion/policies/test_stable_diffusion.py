"""Policies on the networks of Stable Diffusion: each is its pipeline, step for step, and trains what it is to train."""

import diffusers
import pytest
import torch
from accelerate import Accelerator
from torch.testing import assert_close

from iqareward.diffusion import (
    Autoencoder,
    Batch,
    ControlNetPolicy,
    FixedPrompt,
    Noise,
    OneStepPolicy,
    StableDiffusionPolicy,
    UpscalePolicy,
    add_lora,
    match_colours,
    rollout,
)
from iqareward.diffusion.conditions import check_condition, repeat, select
from iqareward.diffusion.policies.core import evaluating
from iqareward.diffusion.rollouts import replay
from tests.diffusion.policies.sd_pipelines import BETAS, SIZE, controlled, text_to_image, upscaling

PROMPTS = ("a cat", "dog on mat", "rain")
GUIDED = {"guidance_scale": 3.0, "negative_prompt": "bad"}
NOISED = {"timestep": 600, "noise_timestep": 300}
BUILD = {
    "controlnet": lambda **options: ControlNetPolicy.from_pipeline(controlled(), **GUIDED, **options),
    "controlnet-unet": lambda **options: ControlNetPolicy.from_pipeline(
        controlled(), train="unet", lora_rank=2, **options
    ),
    "controlnet-both": lambda **options: ControlNetPolicy.from_pipeline(
        controlled(), train="both", colour_fix="adain", scale=2, **options
    ),
    "upscale": lambda **options: UpscalePolicy.from_pipeline(upscaling(), **GUIDED, **options),
    "one-step": lambda **options: OneStepPolicy.from_pipeline(
        text_to_image(), lora_rank=2, scale=4, colour_fix="wavelet", **options
    ),
    "one-step-encoder": lambda **options: OneStepPolicy.from_pipeline(text_to_image(), train="encoder", **options),
    "one-step-both": lambda **options: OneStepPolicy.from_pipeline(
        text_to_image(), train="both", lora_rank=2, **GUIDED, **options
    ),
    "one-step-noised": lambda **options: OneStepPolicy.from_pipeline(text_to_image(), lora_rank=2, **NOISED, **options),
}
EULER = {name: value for name, value in BETAS.items() if name.startswith("beta")}
KINDS = pytest.mark.parametrize("kind", BUILD)
SCALES = {"controlnet-both": 2, "upscale": 4, "one-step": 4}


def built(kind, **options):
    """A policy by name; new adapters begin with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILD[kind](**options)


def inputs(count=2, *, prompts=True, scale=1) -> Batch:
    """Random images with captions of different lengths."""
    generator = torch.Generator().manual_seed(0)
    degraded = torch.rand(count, 3, SIZE, SIZE, generator=generator)
    references = torch.nn.functional.interpolate(degraded.flip(-1), scale_factor=scale)
    return Batch(tuple(range(count)), degraded, references, prompts=PROMPTS[:count] if prompts else None)


@torch.no_grad()
def restored(policy, batch, num_steps=4, eta=0.0, noise=None):
    """The images of the policy's own sampler."""
    first = Noise(batch.ids)
    condition = check_condition(policy.condition(batch, first), len(batch), caller="the policy")
    trajectory = rollout(policy, condition, noise or first, num_steps=num_steps, eta=eta)
    return policy.decode(trajectory.sample, condition)


class Stream:
    """The noise of a pipeline: one generator per row, from which all steps draw one after the other."""

    def __init__(self, ids):
        self.first, self.generators = Noise(ids), Noise(ids).generators("stream")

    def __call__(self, purpose, shape):
        if purpose == "start":
            return self.first(purpose, shape)
        return torch.stack([torch.randn(tuple(shape), generator=own) for own in self.generators])


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_controlnet_restores_as_its_pipeline(guidance_scale, eta) -> None:
    """The same noise gives the same images, with and without guidance and noise of the steps."""
    pipeline, batch = controlled(), inputs()
    options = {"guidance_scale": guidance_scale, "negative_prompt": "bad", "conditioning_scale": 0.8}
    policy = ControlNetPolicy.from_pipeline(pipeline, **options)
    theirs = pipeline(
        list(batch.prompts),
        batch.degraded,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        negative_prompt=["bad"] * 2,
        controlnet_conditioning_scale=0.8,
        eta=eta,
        generator=Stream(batch.ids).generators,
        latents=Noise(batch.ids)("start", (4, 8, 8)),
        output_type="pt",
    ).images
    ours = restored(policy, batch, eta=eta, noise=Stream(batch.ids)).clamp(0, 1)
    assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_controlnet_restores_as_a_pipeline_with_ddpm(spacing) -> None:
    """With `eta=1` the steps are those of DDPM, as models with a spaced sampler take them."""
    pipeline, batch = controlled(diffusers.DDPMScheduler(**BETAS, timestep_spacing=spacing)), inputs()
    theirs = pipeline(
        list(batch.prompts),
        batch.degraded,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=Stream(batch.ids).generators,
        latents=Noise(batch.ids)("start", (4, 8, 8)),
        output_type="pt",
    ).images
    ours = restored(ControlNetPolicy.from_pipeline(pipeline), batch, eta=1.0, noise=Stream(batch.ids)).clamp(0, 1)
    assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_controlnet_restores_as_a_pipeline_with_euler() -> None:
    """Schedulers with sigmas scale latents in their own way; the images are the same."""
    pipeline, batch = controlled(diffusers.EulerDiscreteScheduler(**EULER)), inputs()
    theirs = pipeline(
        list(batch.prompts),
        batch.degraded,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=Noise(batch.ids)("start", (4, 8, 8)),
        output_type="pt",
    ).images
    assert_close(restored(ControlNetPolicy.from_pipeline(pipeline), batch).clamp(0, 1), theirs, atol=1e-4, rtol=0)


def test_sampling_can_start_from_the_degraded_image() -> None:
    """The pipeline, given the degraded image's latents with the noise of the last training timestep."""
    pipeline, batch = controlled(), inputs()
    policy = ControlNetPolicy.from_pipeline(pipeline, from_degraded=True)
    noise, clean = Noise(batch.ids)("start", (4, 8, 8)), policy.autoencoder.encode(batch.degraded)
    theirs = pipeline(
        list(batch.prompts),
        batch.degraded,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=pipeline.scheduler.add_noise(clean, noise, torch.tensor(999)),
        output_type="pt",
    ).images
    assert_close(restored(policy, batch).clamp(0, 1), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 9.0])
def test_upscaler_restores_as_its_pipeline(guidance_scale) -> None:
    """The same noise, that of the degraded image included, gives the same images, four times larger."""
    pipeline, batch = upscaling(), inputs()
    options = {"guidance_scale": guidance_scale, "negative_prompt": "bad", "noise_level": 50}
    theirs = pipeline(
        list(batch.prompts),
        batch.degraded,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        negative_prompt=["bad"] * 2,
        noise_level=50,
        generator=Noise(batch.ids).generators("low_res"),
        latents=Noise(batch.ids)("start", (4, SIZE, SIZE)),
        output_type="pt",
    ).images
    ours = restored(UpscalePolicy.from_pipeline(pipeline, **options), batch).clamp(0, 1)
    assert ours.shape == (2, 3, 4 * SIZE, 4 * SIZE)
    assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_one_step_from_the_degraded_latents_is_a_step_of_the_pipeline(guidance_scale) -> None:
    """The pipeline with one step at timestep 999 that starts from the latents of the degraded image."""
    pipeline, batch = text_to_image(), inputs()
    policy = OneStepPolicy.from_pipeline(pipeline, guidance_scale=guidance_scale, negative_prompt="bad")
    theirs = pipeline(
        list(batch.prompts),
        SIZE,
        SIZE,
        num_inference_steps=1,
        guidance_scale=guidance_scale,
        negative_prompt=["bad"] * 2,
        latents=policy.autoencoder.encode(batch.degraded),
        output_type="pt",
    ).images
    assert_close(restored(policy, batch).clamp(0, 1), theirs, atol=1e-4, rtol=0)


def test_one_step_from_noised_latents_is_a_step_of_the_image_to_image_pipeline() -> None:
    """The last of four steps of the pipeline, which adds noise up to that step's timestep."""
    pipeline, batch = text_to_image(kind=diffusers.StableDiffusionImg2ImgPipeline), inputs()
    policy = OneStepPolicy.from_pipeline(pipeline, timestep=249, noise_timestep=249)
    theirs = pipeline(
        list(batch.prompts),
        policy.autoencoder.encode(batch.degraded),
        strength=0.25,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=Noise(batch.ids).generators("start"),
        output_type="pt",
    ).images
    assert_close(restored(policy, batch).clamp(0, 1), theirs, atol=1e-4, rtol=0)


def test_noise_and_step_can_have_different_timesteps() -> None:
    """Written out: noise up to timestep 300, and the clean latents as if it were 600."""
    policy, batch = built("one-step-noised"), inputs()
    noise = Noise(batch.ids)
    condition, alpha_bars = policy.condition(batch, noise), policy.process.scheduler.alphas_cumprod
    start = policy.start(condition, noise)
    latents = alpha_bars[300].sqrt() * policy.encode(batch.degraded, condition) + (1 - alpha_bars[300]).sqrt() * start
    output = policy.unet(latents, 600, condition["prompts"]["prompt"]).sample
    expected = (latents - (1 - alpha_bars[600]).sqrt() * output) / alpha_bars[600].sqrt()
    step = policy.schedule(condition, 1)[0]
    assert_close(policy.step(start, step, condition, eta=0.0).mean, expected, atol=1e-5, rtol=1e-5)


@KINDS
def test_sizes_are_those_of_the_references(kind) -> None:
    """Restored, encoded-and-decoded and reference images have one size, which may not be that of the degraded ones."""
    policy, batch = built(kind), inputs(scale=SCALES.get(kind, 1))
    with torch.no_grad():
        condition = policy.condition(batch, Noise(batch.ids))
        best = policy.reconstruct(batch.references, condition)
    assert restored(policy, batch, 2).shape == best.shape == batch.references.shape


@KINDS
def test_a_step_repeats_itself(kind) -> None:
    """Replayed with the same weights, a step has exactly the log-probability of the rollout: the ratio is 1."""
    policy, batch = built(kind), inputs()
    noise = Noise.of_groups(batch.ids, 2, seed=1, device="cpu")
    condition = repeat(policy.condition(batch, Noise(batch.ids)), 2)
    with evaluating(policy):
        with torch.no_grad():
            trajectory = rollout(policy, condition, noise, num_steps=3, eta=policy.exploration)
        assert trajectory.stochastic
        for index in trajectory.stochastic:
            again = replay(policy, trajectory, index, condition).log_prob(trajectory.latents[index + 1])
            assert_close((again - trajectory.log_probs[index]).exp(), torch.ones(4), atol=0, rtol=0)
    assert not torch.equal(trajectory.sample[0], trajectory.sample[1])


@KINDS
def test_an_input_does_not_depend_on_its_neighbours(kind) -> None:
    """Alone or with others, an input is restored in the same way."""
    policy, batch = built(kind), inputs(3)
    together = restored(policy, batch)
    alone = [restored(policy, batch.select(slice(row, row + 1))) for row in range(3)]
    assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


@KINDS
def test_parts_of_a_batch_are_its_rows(kind) -> None:
    """A step of some rows of a condition is that of the whole, row by row."""
    policy, batch = built(kind), inputs(3)
    condition = policy.condition(batch, Noise(batch.ids))
    latents, step = policy.start(condition, Noise(batch.ids)), policy.schedule(condition, 2)[0]
    with torch.no_grad():
        whole = policy.step(latents, step, condition, eta=0.0).mean
        part = policy.step(latents[1:], step, select(condition, slice(1, 3)), eta=0.0).mean
    assert_close(part, whole[1:], atol=1e-5, rtol=1e-5)


@KINDS
def test_each_input_has_its_own_prompt(kind) -> None:
    """Inputs with prompts are restored by these, inputs without by the policy's."""
    by_own = restored(built(kind, prompt="something else"), inputs())
    by_fixed = restored(built(kind, prompt=PROMPTS[1]), inputs(prompts=False))
    assert_close(by_own[1], by_fixed[1], atol=1e-5, rtol=0)
    assert (by_own[0] - by_fixed[0]).abs().max() > 1e-4


def losses(policy, batch):
    """A supervised loss, and one of a guided step that ends in the pixels."""
    noise = Noise(batch.ids)
    condition = policy.condition(batch, noise)
    step = policy.schedule(condition, 2)[0]
    transition = policy.step(policy.start(condition, noise), step, condition, eta=0.0)
    yield policy.sft_loss(batch.references, condition, noise).mean()
    yield policy.decode(transition.clean, condition).square().mean()


def parts(policy):
    """All weights of a policy by name."""
    modules = {name: part for name, part in vars(policy).items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{weight}": own for name, part in modules.items() for weight, own in part.named_parameters()}


def gradients(policy, loss):
    """Gradients by name of all weights of a policy."""
    for weight in parts(policy).values():
        weight.grad = None
    loss.backward()
    return {name: weight.grad for name, weight in parts(policy).items() if weight.grad is not None}


@KINDS
def test_gradients_reach_what_trains(kind) -> None:
    """All that trains gets a finite gradient, and nothing else gets any."""
    policy, batch = built(kind), inputs(scale=SCALES.get(kind, 1))
    trained = {id(weight) for weight in policy.model.parameters() if weight.requires_grad}
    for which in range(2):
        found = gradients(policy, list(losses(policy, batch))[which])
        assert {id(weight) for weight in parts(policy).values() if weight.grad is not None} == trained
        assert all(gradient.isfinite().all() for gradient in found.values())


TRAINED = {
    "controlnet": {"controlnet"},
    "controlnet-unet": {"unet"},
    "controlnet-both": {"controlnet", "unet"},
    "upscale": {"unet"},
    "one-step": {"unet"},
    "one-step-encoder": {"encoder"},
    "one-step-both": {"unet", "encoder"},
    "one-step-noised": {"unet"},
}


@KINDS
def test_the_chosen_networks_train(kind) -> None:
    """Two steps of the optimiser move weights of each network that trains, and no others."""
    policy, batch = built(kind), inputs(scale=SCALES.get(kind, 1))
    before = {name: weight.detach().clone() for name, weight in parts(policy).items()}
    optimizer = torch.optim.AdamW([weight for weight in policy.model.parameters() if weight.requires_grad], lr=1e-3)
    first = next(losses(policy, batch)).detach()
    for _ in range(2):  # the first one moves only the second matrix of an adapter, which is zero
        gradients(policy, next(losses(policy, batch)))
        optimizer.step()
    moved = {name.split(".")[0] for name, weight in parts(policy).items() if not weight.equal(before[name])}
    assert moved - {"model"} == TRAINED[kind]
    assert next(losses(policy, batch)) != first


@pytest.mark.parametrize("kind", ["controlnet", "controlnet-both", "upscale", "one-step-both"])
def test_checkpointing_gives_the_same_gradient(kind) -> None:
    """Activations that are computed twice give the gradient of those that are kept."""
    batch = inputs(scale=SCALES.get(kind, 1))
    kept, twice = built(kind), built(kind, checkpointing=True)
    for first, second in zip(losses(kept, batch), losses(twice, batch), strict=True):
        assert_close(gradients(twice, second), gradients(kept, first), atol=1e-6, rtol=1e-4)


@KINDS
def test_frozen_parts_may_be_in_bfloat16(kind) -> None:
    """Beside frozen parts in bfloat16, what trains stays in float32 and has nearly the loss of the float32 policy."""
    policy, exact, batch = built(kind), built(kind), inputs(scale=SCALES.get(kind, 1))
    for name, part in vars(policy).items():
        if isinstance(part, torch.nn.Module) and name != "model" and name not in policy.trained:
            part.to(torch.bfloat16)
    for ours, theirs in zip(losses(policy, batch), losses(exact, batch), strict=True):
        assert_close(ours, theirs, atol=0.02, rtol=0.05)
    found = gradients(policy, next(losses(policy, batch)))
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert restored(policy, batch, 2).dtype == torch.float32


def test_adapters_in_float32_train_in_a_bfloat16_network() -> None:
    """LoRA on a UNet in bfloat16: the adapters are float32 and get a gradient."""
    pipeline = controlled()
    pipeline.unet.to(torch.bfloat16)
    policy = ControlNetPolicy.from_pipeline(pipeline, train="unet", lora_rank=2)
    found = gradients(policy, next(losses(policy, inputs())))
    assert found
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in found.values())


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@KINDS
def test_a_prepared_model_has_the_same_gradient(kind, mixed_precision) -> None:
    """Inside of accelerate's wrapper for many processes a policy asks and trains as before, up to the precision."""
    batch = inputs(scale=SCALES.get(kind, 1))
    policy, plain = built(kind), built(kind)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Accelerator(cpu=True, mixed_precision=mixed_precision).prepare(policy.model)
        policy.model = torch.nn.parallel.DistributedDataParallel(model)
        tolerance = {"atol": 1e-6, "rtol": 1e-4} if mixed_precision == "no" else {"atol": 0.05, "rtol": 0.05}
        for ours, theirs in zip(losses(policy, batch), losses(plain, batch), strict=True):
            assert_close(ours, theirs, **tolerance)
            found, expected = gradients(policy, ours), gradients(plain, theirs)
            found = {name.replace("model.module.", "model."): gradient for name, gradient in found.items()}
            assert set(found) == set(expected)
            if mixed_precision == "no":
                assert_close(found, expected, atol=1e-5, rtol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


@KINDS
def test_every_part_moves(kind) -> None:
    """After `to`, nothing is left where it was: condition, step and decoder run on the other device."""
    policy, batch = built(kind), inputs(prompts=False)
    assert policy.to("meta") is policy
    assert {weight.device.type for weight in parts(policy).values()} == {"meta"}
    condition = policy.condition(Batch(batch.ids, batch.degraded.to("meta")), Meta())
    step = policy.schedule(condition, 2)[0]
    transition = policy.step(policy.start(condition, Meta()), step, condition, eta=0.0)
    assert policy.decode(transition.mean, condition).device.type == "meta"


class Meta:
    """Noise on a device that has no generators."""

    def __call__(self, purpose, shape):
        return torch.empty(2, *shape, device="meta")


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_colours_are_those_of_the_degraded_images(method) -> None:
    """With a colour fix the decoded images are corrected; without, they are the autoencoder's."""
    policy, batch = built("controlnet-both"), inputs()
    policy.colour_fix = None
    plain = restored(policy, batch)
    policy.colour_fix = method
    fixed = restored(policy, batch)
    assert_close(fixed, match_colours(plain, batch.degraded, method=method), atol=1e-2, rtol=0)
    target = torch.nn.functional.interpolate(batch.degraded, scale_factor=2, mode="bicubic").mean((2, 3))
    assert (fixed.mean((2, 3)) - target).abs().mean() < 0.5 * (plain.mean((2, 3)) - target).abs().mean()


def test_one_step_loss_can_be_given() -> None:
    """The loss of restored images and references, with its gradient; without one, the error of the latents."""

    def squared(images, references):
        return (images - references).square().flatten(1).mean(1)

    policy, batch = built("one-step-both", loss=squared), inputs()
    policy.guidance_scale = 1.0
    noise = Noise(batch.ids)
    condition = policy.condition(batch, noise)
    found = policy.sft_loss(batch.references, condition, noise)
    assert_close(found, squared(restored(policy, batch), batch.references), atol=1e-6, rtol=1e-5)
    assert gradients(policy, found.sum())
    policy.loss = None
    latents = policy.step(policy.start(condition, noise), policy.schedule(condition, 1)[0], condition, eta=0.0).mean
    expected = (latents - policy.encode(batch.references, condition)).square().flatten(1).mean(1)
    assert_close(policy.sft_loss(batch.references, condition, noise), expected, atol=1e-6, rtol=1e-5)


def test_references_keep_their_latents_while_the_encoder_trains() -> None:
    """The encoder that trains changes; targets and the best reachable images stay those of the original."""
    policy, batch = built("one-step-encoder"), inputs()
    condition = policy.condition(batch, Noise(batch.ids))
    before, best = policy.encode(batch.references, condition), policy.reconstruct(batch.references, condition)
    restored_before = restored(policy, batch)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(0.05)
    assert_close(policy.encode(batch.references, condition), before, atol=0, rtol=0)
    assert_close(policy.reconstruct(batch.references, condition), best, atol=0, rtol=0)
    assert (restored(policy, batch) - restored_before).abs().max() > 1e-3


def test_what_trains_is_named_and_has_weights_that_do() -> None:
    """An unknown part, a frozen network that is to train, and guidance away from nothing are errors."""
    pipeline = text_to_image()
    with pytest.raises(ValueError, match="vae"):
        OneStepPolicy.from_pipeline(pipeline, train="vae")
    policy = OneStepPolicy.from_pipeline(pipeline)
    parts = policy.unet, policy.autoencoder, policy.process, FixedPrompt({"prompt": torch.zeros(1, 12, 8)})
    with pytest.raises(ValueError, match="weights that train in the encoder"):
        OneStepPolicy(*parts, train="encoder")
    with pytest.raises(ValueError, match="negative"):
        OneStepPolicy(*parts, guidance_scale=2.0)
    with pytest.raises(ValueError, match="multiples of 2, got 15x16"):
        policy.condition(Batch((0,), torch.rand(1, 3, 15, 16)), Noise((0,)))


class InstructPolicy(StableDiffusionPolicy):
    """A user's policy: a UNet that sees the latents of the degraded image as four more channels."""

    def __init__(self, unet, *shared, **options):
        super().__init__(*shared, **options)
        self.use("unet", unet=add_lora(unet, rank=2))

    def condition(self, batch, noise):
        condition = super().condition(batch, noise)
        return {**condition, "latents": self.autoencoder.encode(condition["degraded"])}

    def predict(self, latents, times, condition):
        inputs = torch.cat([latents, condition["latents"]], 1)
        return self.ask("unet", inputs, times, condition["prompts"]["prompt"]).sample


def test_a_policy_of_ones_own_takes_a_few_lines() -> None:
    """Guidance, prompts, sizes, LoRA and colours come with the base."""
    from tests.diffusion.policies.sd_pipelines import unet

    shared = ControlNetPolicy.from_pipeline(controlled(), **GUIDED)
    rest = shared.autoencoder, shared.process, shared.prompts, shared.negative
    policy = InstructPolicy(unet(8), *rest, guidance_scale=2.0, scale=2, colour_fix="wavelet")
    assert restored(policy, inputs()).shape == (2, 3, 2 * SIZE, 2 * SIZE)
    found = gradients(policy, next(losses(policy, inputs(scale=2))))
    assert found
    assert all("lora_" in name for name in found)


def test_the_autoencoder_can_be_another() -> None:
    """A policy of a pipeline takes another autoencoder with the same latents."""
    pipeline = controlled()
    tiny = {"encoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}
    tiny |= {"decoder_block_out_channels": (8, 8), "num_decoder_blocks": (1, 1)}
    other = Autoencoder(diffusers.AutoencoderTiny(**tiny))
    policy = ControlNetPolicy.from_pipeline(pipeline, autoencoder=other)
    assert restored(policy, inputs()).shape == (2, 3, SIZE, SIZE)
