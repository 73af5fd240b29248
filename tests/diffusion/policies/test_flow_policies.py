"""Policies on flow models of diffusers: each is its pipeline, step for step, and trains what it is to train."""

import functools

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from torch.testing import assert_close

from iqareward.diffusion import (
    Batch,
    FlowPolicy,
    FluxKontextPolicy,
    Noise,
    QwenImageEditPolicy,
    QwenPrompts,
    SD3ControlNetPolicy,
    rollout,
)
from iqareward.diffusion.conditions import check_condition, repeat, select
from iqareward.diffusion.policies.core import evaluating
from iqareward.diffusion.policies.tokens import to_tokens
from iqareward.diffusion.rollouts import replay
from tests.diffusion.policies.flow_pipelines import SIZE, flux_kontext, qwen_edit, sd3, sd3_controlnet

PROMPTS = ("a cat", "a very big dog", "rain")
BUILD = {
    "flow": lambda **options: FlowPolicy.from_pipeline(sd3(), negative_prompt="bad", **options),
    "sd3": lambda **options: SD3ControlNetPolicy.from_pipeline(sd3_controlnet(), negative_prompt="bad", **options),
    "sd3-lora": lambda **options: SD3ControlNetPolicy.from_pipeline(
        sd3_controlnet(), negative_prompt="bad", train="transformer", lora_rank=2, **options
    ),
    "flux": lambda dtype=torch.float32, **options: FluxKontextPolicy.from_pipeline(
        flux_kontext(dtype=dtype), lora_rank=2, **options
    ),
    "qwen": lambda dtype=torch.float32, **options: QwenImageEditPolicy.from_pipeline(
        qwen_edit(dtype=dtype), lora_rank=2, **options
    ),
}


def built(kind, **options):
    """A policy by name; new adapters begin with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BUILD[kind](**options)


KINDS = pytest.mark.parametrize("kind", BUILD)


def inputs(count=2, *, prompts=True, width=SIZE) -> Batch:
    """Random images of 8 bits, with captions of different lengths."""
    generator = torch.Generator().manual_seed(0)
    degraded = torch.rand(count, 3, SIZE, width, generator=generator).mul(255).round() / 255
    return Batch(tuple(range(count)), degraded, degraded.flip(-1), prompts=PROMPTS[:count] if prompts else None)


@torch.no_grad()
def restored(policy, batch, num_steps=4):
    """The condition, the first latents and the restored images of the policy's own sampler."""
    noise = Noise(batch.ids)
    condition = check_condition(policy.condition(batch, noise), len(batch), caller="the policy")
    trajectory = rollout(policy, condition, noise, num_steps=num_steps, eta=0.0)
    return condition, trajectory.latents[0], policy.decode(trajectory.sample, condition).clamp(0, 1)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_widened_sd3_begins_as_its_pipeline(guidance_scale) -> None:
    """With zero weights for the degraded image, the same noise gives the images of the text-to-image pipeline."""
    pipeline, batch = sd3(), inputs(width=24)
    options = {"guidance_scale": guidance_scale, "negative_prompt": "bad"}
    arguments = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "output_type": "pt"}
    noise = Noise(batch.ids)("start", (4, SIZE // 2, 12))
    prompts, _, pooled, _ = pipeline.encode_prompt(list(PROMPTS[:2]), None, None)
    negative, _, pooled_negative, _ = pipeline.encode_prompt(["bad"], None, None)
    theirs = pipeline(
        latents=noise,
        height=SIZE,
        width=24,
        prompt_embeds=prompts,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative.expand(2, -1, -1),
        negative_pooled_prompt_embeds=pooled_negative.expand(2, -1),
        **arguments,
    ).images
    policy = FlowPolicy.from_pipeline(pipeline, **options)
    assert policy.model.config.in_channels == 8
    assert_close(restored(policy, batch)[2], theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("plain", "reads_prompt"), [(False, True), (True, True), (False, False)])
def test_sd3_restores_as_its_pipeline(plain, reads_prompt) -> None:
    """The same noise gives the same images, with guidance 7 and a negative prompt, for three kinds of ControlNet."""
    pipeline = sd3_controlnet(plain=plain, reads_prompt=reads_prompt)
    policy, batch = SD3ControlNetPolicy.from_pipeline(pipeline, negative_prompt="bad"), inputs()
    condition, start, ours = restored(policy, batch)
    prompts, negative = condition["prompts"], condition["negative"]
    theirs = pipeline(
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
    assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("guidance_scale", "embedded"), [(1.0, True), (3.0, True), (1.0, False)])
def test_kontext_restores_as_its_pipeline(guidance_scale, embedded) -> None:
    """The same noise gives the same images and noise levels, with either kind of guidance or none."""
    pipeline, batch = flux_kontext(guidance_embeds=embedded), inputs(width=24)
    policy = FluxKontextPolicy.from_pipeline(pipeline, negative_prompt="bad", guidance_scale=guidance_scale)
    condition, start, ours = restored(policy, batch)
    negative = {} if guidance_scale == 1 else condition["negative"]
    theirs = pipeline(
        image=batch.degraded,
        num_inference_steps=4,
        true_cfg_scale=guidance_scale,
        latents=to_tokens(start),
        prompt_embeds=condition["prompts"]["prompt"],
        pooled_prompt_embeds=condition["prompts"]["pooled"],
        negative_prompt_embeds=negative.get("prompt"),
        negative_pooled_prompt_embeds=negative.get("pooled"),
        height=SIZE,
        width=24,
        max_area=SIZE * 24,
        _auto_resize=False,
        output_type="pt",
    ).images
    assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_kontext_has_the_noise_levels_of_its_pipeline() -> None:
    """Four steps of 16 tokens: the shift follows from the size, and the last level is not close to zero."""
    policy = built("flux")
    condition = policy.condition(inputs(1), Noise((0,)))
    levels = [step.now for step in policy.schedule(condition, 4)]
    assert_close(torch.tensor(levels), torch.tensor([1.0, 0.826, 0.613, 0.345]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_qwen_restores_as_its_pipeline(guidance_scale, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise gives the same images, with prompts of different lengths and its own form of guidance."""
    # The pipeline would make every picture as large as 1024x1024.
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (24, SIZE, None))
    pipeline, batch = qwen_edit(), inputs(width=24)
    policy = QwenImageEditPolicy.from_pipeline(pipeline, negative_prompt="bad", guidance_scale=guidance_scale)
    condition, start, ours = restored(policy, batch)
    negative = {} if guidance_scale == 1 else condition["negative"]
    processor = pipeline.image_processor
    theirs = pipeline(
        image=processor.numpy_to_pil(processor.pt_to_numpy(batch.degraded)),
        num_inference_steps=4,
        true_cfg_scale=guidance_scale,
        latents=to_tokens(start),
        prompt_embeds=condition["prompts"]["prompt"],
        prompt_embeds_mask=condition["prompts"]["mask"],
        negative_prompt_embeds=negative.get("prompt"),
        negative_prompt_embeds_mask=negative.get("mask"),
        height=SIZE,
        width=24,
        output_type="pt",
    ).images
    assert_close(ours, theirs, atol=1e-4, rtol=0)


@KINDS
def test_a_step_repeats_itself(kind) -> None:
    """Replayed with the same weights, a step has exactly the log-probability of the rollout: the ratio is 1."""
    policy, batch = built(kind), inputs()
    noise = Noise.of_groups(batch.ids, 2, seed=1, device="cpu")
    condition = repeat(policy.condition(batch, Noise(batch.ids)), 2)
    with evaluating(policy):
        with torch.no_grad():
            trajectory = rollout(policy, condition, noise, num_steps=3, eta=policy.exploration)
        assert trajectory.stochastic == (0, 1)
        for index in trajectory.stochastic:
            again = replay(policy, trajectory, index, condition).log_prob(trajectory.latents[index + 1])
            assert_close((again - trajectory.log_probs[index]).exp(), torch.ones(4), atol=0, rtol=0)


@KINDS
def test_an_input_does_not_depend_on_its_neighbours(kind) -> None:
    """Alone or with inputs whose prompts are longer, an input is restored in the same way."""
    policy, batch = built(kind), inputs(3)
    _, _, together = restored(policy, batch)
    alone = [restored(policy, batch.select(slice(row, row + 1)))[2] for row in range(3)]
    assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


@KINDS
def test_each_input_has_its_own_prompt(kind) -> None:
    """Inputs with prompts are restored by these, inputs without by the policy's."""
    own = built(kind, prompt="something else")
    fixed = built(kind, prompt=PROMPTS[1])
    batch = inputs()
    _, _, by_own = restored(own, batch)
    _, _, by_fixed = restored(fixed, inputs(prompts=False))
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


def gradients(policy, loss):
    """Gradients by name of all weights of a policy."""
    parts = {name: part for name, part in vars(policy).items() if isinstance(part, torch.nn.Module)}
    weights = {f"{name}.{weight}": value for name, part in parts.items() for weight, value in part.named_parameters()}
    for weight in weights.values():
        weight.grad = None
    loss.backward()
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


def adapters(policy):
    """Names of the weights that train."""
    return {f"model.{name}" for name, weight in policy.model.named_parameters() if weight.requires_grad}


# What the last block writes into the text stream is read by no one.
UNREAD = {
    "flow": (),
    "sd3": ("transformer_blocks.0.attn.to_add_out.", "transformer_blocks.0.ff_context."),
    "sd3-lora": (),
    "flux": (),
    "qwen": ("transformer_blocks.1.attn.to_add_out.", "transformer_blocks.1.txt_mlp."),
}


@KINDS
def test_gradients_reach_what_trains(kind) -> None:
    """All that trains gets a finite gradient, except what the network computes in vain; nothing else gets any."""
    policy = built(kind)
    for which in range(2):
        found = gradients(policy, list(losses(policy, inputs()))[which])
        expected = {name for name in adapters(policy) if not any(part in name for part in UNREAD[kind])}
        assert set(found) == expected
        assert all(gradient.isfinite().all() for gradient in found.values())
    assert kind in ("flow", "sd3") or all("lora_" in name for name in found)


@KINDS
def test_training_moves_the_weights(kind) -> None:
    """Two steps of the optimiser move all that has a gradient, except the queries of a text stream that is not read."""
    policy = built(kind)
    before = {f"model.{name}": weight.detach().clone() for name, weight in policy.model.named_parameters()}
    trained = [weight for weight in policy.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)
    for _ in range(2):  # the first one moves only the second matrix of an adapter, which is zero
        found = gradients(policy, next(losses(policy, inputs())))
        optimizer.step()
    after = {f"model.{name}": weight for name, weight in policy.model.named_parameters()}
    moved = {name for name in before if not after[name].equal(before[name])}
    assert moved <= set(found)
    assert all("attn.add_q_proj." in name for name in set(found) - moved)
    assert all(weight.isfinite().all() for weight in after.values())


@KINDS
def test_checkpointing_gives_the_same_gradient(kind) -> None:
    """Activations that are computed twice give the gradient of those that are kept."""
    kept, twice = built(kind), built(kind, checkpointing=True)
    for first, second in zip(losses(kept, inputs()), losses(twice, inputs()), strict=True):
        assert_close(gradients(twice, second), gradients(kept, first), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_models_in_bfloat16_train_adapters_in_float32(kind) -> None:
    """A bfloat16 model keeps latents and adapters in float32 and has nearly the loss of the float32 model."""
    policy, exact = built(kind, dtype=torch.bfloat16), built(kind)
    assert {weight.dtype for weight in policy.model.parameters() if weight.requires_grad} == {torch.float32}
    condition, start, images = restored(policy, inputs())
    assert {condition["latents"].dtype, start.dtype, images.dtype} == {torch.float32}
    for ours, theirs in zip(losses(policy, inputs()), losses(exact, inputs()), strict=True):
        assert_close(ours, theirs, atol=0.02, rtol=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(policy, next(losses(policy, inputs()))).values())


@KINDS
def test_every_part_moves(kind) -> None:
    """After `to`, nothing is left where it was: a step and the decoder run on the other device."""
    policy, batch = built(kind), inputs()
    condition = policy.condition(batch, Noise(batch.ids))
    assert policy.to("meta") is policy
    moved = {"latents": condition["latents"].to("meta")}
    if kind == "qwen":  # its prompts need pixels
        for name in ("prompts", "negative"):
            values = condition[name].items()
            moved[name] = {key: value if value is None else value.to("meta") for key, value in values}
    else:
        moved = policy.condition(Batch(batch.ids, batch.degraded.to("meta")), Noise(batch.ids))
    latents = torch.zeros(2, 4, SIZE // 2, SIZE // 2, device="meta")
    step = policy.schedule(moved, 2)[0]
    assert policy.decode(policy.step(latents, step, moved, eta=0.0).mean, moved).device.type == "meta"


@KINDS
def test_parts_of_a_batch_are_its_rows(kind) -> None:
    """A step of some rows of a condition is that of the whole, row by row."""
    policy, batch = built(kind), inputs(3)
    condition = policy.condition(batch, Noise(batch.ids))
    latents, step = policy.start(condition, Noise(batch.ids)), policy.schedule(condition, 2)[0]
    with torch.no_grad():
        whole = policy.step(latents, step, condition, eta=0.0).mean
        part = policy.step(latents[1:], step, select(condition, slice(1, 3)), eta=0.0).mean
    assert_close(part, whole[1:], atol=1e-5, rtol=0)


def test_prompts_of_qwen_can_be_looked_up() -> None:
    """A function of the user's gives the embeddings, for instance those that were computed before."""
    pipeline, batch = qwen_edit(), inputs()
    stored = QwenPrompts(pipeline, "")(batch)
    parts = QwenImageEditPolicy.from_pipeline(pipeline, guidance_scale=1.0)
    looked_up = functools.partial(lambda stored, batch: stored, stored)
    policy = QwenImageEditPolicy(parts.model, parts.autoencoder, parts.process, looked_up)
    assert_close(restored(policy, batch)[2], restored(parts, batch)[2], atol=0, rtol=0)


def test_guidance_needs_negative_prompts() -> None:
    """A policy with guidance and nothing to lead away from says so when it is made."""
    parts = built("flux")
    with pytest.raises(ValueError, match="negative"):
        FluxKontextPolicy(parts.model, parts.autoencoder, parts.process, parts.prompts, guidance_scale=2.0)


@pytest.mark.parametrize("kind", ["flux", "qwen"])
def test_sides_are_whole_tokens(kind) -> None:
    """Images that do not divide into tokens are refused, with the multiple that they need."""
    with pytest.raises(ValueError, match="multiples of 4, got 18x16"):
        built(kind).condition(Batch((0,), torch.rand(1, 3, 18, 16)), Noise((0,)))
