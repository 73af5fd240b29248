"""Every policy: shapes, rollouts that can be repeated and replayed, and a ratio of 1 before the first update."""

import copy

import pytest
import torch
from accelerate import Accelerator

from iqareward.diffusion import add_lora, reference_policy, rollout
from iqareward.diffusion.objectives import policy_loss
from iqareward.diffusion.policies import repeat
from iqareward.diffusion.rollouts import replay
from iqareward.seeds import noise_per_input
from tests.diffusion.tiny import ETA, KINDS, SIZE, images, pixel_policy, policy_of

EXACT = {"rtol": 0.0, "atol": 0.0}
OTHER_BATCH = {"rtol": 1e-4, "atol": 1e-4}  # fp32 sums in another order, over all steps


@pytest.fixture(params=KINDS)
def kind(request):
    """Each kind of policy."""
    return request.param


def sample(policy, kind, ids=(3, 8), seed=0, **options):
    """Two rollouts of each input in four steps."""
    degraded = images(10)[list(ids)]
    return rollout(policy, degraded, ids=ids, group_size=2, num_steps=4, eta=ETA[kind], seed=seed, **options)


def test_shapes(kind):
    """Latents, log-probabilities and decoded images of a trajectory."""
    policy = policy_of(kind)
    trajectory = sample(policy, kind, keep_clean=(2,))
    latent = policy.latent_shape(images(1))
    assert trajectory.latents.shape == (5, 4, *latent)
    assert trajectory.log_probs.shape == (4, 4)
    assert trajectory.clean[2].shape == (4, *latent)
    assert policy.decode(trajectory.sample).shape == (4, 3, SIZE, SIZE)
    assert trajectory.latents.isfinite().all()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16], ids=str)
def test_parts_keep_their_own_dtypes(kind, trained, mixed_precision):
    """Beside frozen parts in bfloat16 a model of any dtype, prepared by accelerate or not, answers much as in fp32."""
    policy, exact = policy_of(kind), policy_of(kind)
    latents = torch.randn(2, *policy.latent_shape(images(1)), generator=torch.Generator().manual_seed(0))
    times = torch.tensor([40, 700])
    expected = exact.predict(latents, times, exact.condition(images(2)))
    for part in (getattr(policy, "unet", None), getattr(getattr(policy, "autoencoder", None), "vae", None)):
        if part is not None:
            part.to(torch.bfloat16)
    policy.model = Accelerator(cpu=True, mixed_precision=mixed_precision).prepare(policy.model.to(trained))
    answer = policy.predict(latents, times, policy.condition(images(2))).float()
    assert (answer - expected).norm() < 0.02 * expected.norm()  # eight bits of bfloat16, through a few layers


def test_replayed_log_probs_are_those_of_the_rollout(kind):
    """Recomputed from stored latents they agree to 1e-5, so that the ratio before the first update is 1."""
    policy = policy_of(kind)
    trajectory = sample(policy, kind)
    condition = repeat(policy.condition(images(10)[[3, 8]]), 2)
    assert trajectory.stochastic == ((0, 1, 2, 3) if kind == "controlnet" else (0, 1, 2))
    for step in trajectory.stochastic:
        log_probs = replay(policy, trajectory, step, condition).log_prob(trajectory.latents[step + 1])
        torch.testing.assert_close(log_probs, trajectory.log_probs[step], rtol=0.0, atol=1e-5)
        advantages = torch.tensor([1.0, -1.0, 2.0, 0.0])
        loss = policy_loss(log_probs, trajectory.log_probs[step], advantages, clip=1e-4)
        torch.testing.assert_close(loss, -advantages, rtol=0.0, atol=5e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_rollout_is_the_sampling_loop_of_diffusers(eta):
    """Network and `DDIMScheduler.step` in a loop, given the noise of the rollout, end in the same images."""
    policy = pixel_policy("v_prediction")
    degraded, scheduler = images(1), copy.deepcopy(policy.process.scheduler)
    path = rollout(policy, degraded, ids=[5], group_size=2, num_steps=4, eta=eta, seed=7)

    def noise(step):
        return noise_per_input([5], 2, (3, SIZE, SIZE), seed=7, step=step, device="cpu")

    latents = noise(0)
    scheduler.set_timesteps(4)
    for number, time in enumerate(scheduler.timesteps):
        with torch.no_grad():
            output = policy.model(torch.cat([latents, 2 * degraded.expand(2, -1, -1, -1) - 1], 1), time).sample
        latents = scheduler.step(output, time, latents, eta=eta, variance_noise=noise(number + 1)).prev_sample
    torch.testing.assert_close(path.sample, latents, **OTHER_BATCH)


@pytest.mark.parametrize("kind", ["controlnet", "flow"])
def test_checkpointed_decoding_has_the_same_gradient(kind):
    """Recomputing the decoder's activations in the backward pass changes memory, not numbers."""
    policy = policy_of(kind)
    gradients = []
    for checkpointed in (True, False):
        policy.autoencoder.checkpointed = checkpointed
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        policy.decode(latents).square().sum().backward()
        gradients.append(latents.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_rollouts_depend_on_the_input_alone(kind):
    """An input's rollouts are the same in another batch; other seeds and inputs differ."""
    policy = policy_of(kind)
    both, alone = sample(policy, kind), sample(policy, kind, ids=(8,))
    torch.testing.assert_close(both.sample[2:], alone.sample, **OTHER_BATCH)
    torch.testing.assert_close(both.latents[0, 2:], alone.latents[0], **EXACT)
    torch.testing.assert_close(both.sample, sample(policy, kind).sample, **EXACT)
    assert not torch.equal(both.sample, sample(policy, kind, seed=1).sample)
    assert not torch.equal(both.latents[0, 0], both.latents[0, 1])


def test_rollouts_stay_in_their_slice(kind):
    """`rows` of a trajectory are the rollouts of those inputs."""
    trajectory = sample(policy_of(kind), kind, keep_clean=(1,))
    part = trajectory.select(slice(1, 2))
    torch.testing.assert_close(part.sample, trajectory.sample[2:], **EXACT)
    torch.testing.assert_close(part.log_probs, trajectory.log_probs[:, 2:], **EXACT)
    torch.testing.assert_close(part.clean[1], trajectory.clean[1][2:], **EXACT)


def test_window_leaves_the_other_steps_deterministic():
    """Only the steps of the window draw noise; the others carry no log-probability."""
    trajectory = sample(pixel_policy(), "pixel", window=range(1, 2))
    assert trajectory.stochastic == (1,)
    assert trajectory.log_probs[0].eq(0).all()
    assert trajectory.log_probs[2:].eq(0).all()
    assert trajectory.log_probs[1].ne(0).all()


def test_gradient_reaches_every_trained_weight(kind):
    """The log-probability of a step has a gradient to the model and none to the frozen parts."""
    policy = policy_of(kind)
    trajectory = sample(policy, kind)
    condition = repeat(policy.condition(images(10)[[3, 8]]), 2)
    replay(policy, trajectory, 1, condition).log_prob(trajectory.latents[2]).sum().backward()
    with_gradient = [weight.grad is not None and weight.grad.abs().sum() > 0 for weight in policy.model.parameters()]
    assert sum(with_gradient) > 0.8 * len(with_gradient)
    for frozen in (getattr(policy, "unet", None), getattr(getattr(policy, "autoencoder", None), "vae", None)):
        assert frozen is None or all(weight.grad is None for weight in frozen.parameters())


def test_lora_starts_at_the_reference_and_leaves_it(kind):
    """KL to the model with its adapters off is 0 at the start, and not after the adapters have moved."""
    policy = policy_of(kind)
    policy.model = add_lora(policy.model, rank=2)
    trajectory = sample(policy, kind)
    condition = repeat(policy.condition(images(10)[[3, 8]]), 2)

    def divergence():
        now = replay(policy, trajectory, 1, condition)
        with reference_policy(policy, None):
            before = replay(policy, trajectory, 1, condition)
        return now.kl(before)

    assert divergence().abs().max() == 0
    adapters = [weight for name, weight in policy.model.named_parameters() if "lora_B" in name]
    assert adapters
    with torch.no_grad():
        for weight in adapters:
            weight.add_(0.1)
    assert (divergence() > 0).all()
    assert {name.split(".")[-2] for name, w in policy.model.named_parameters() if w.requires_grad} == {"default"}


def test_autoencoder_needs_sides_that_fit():
    """Odd sides are an error that says what to do; half of the channels' names are not guessed."""
    with pytest.raises(ValueError, match="multiples of 2, got 15x16"):
        policy_of("flow").latent_shape(torch.zeros(1, 3, 15, 16))


def test_rollout_says_what_does_not_fit():
    """One id per image, and a window inside of the schedule."""
    policy = pixel_policy()
    with pytest.raises(ValueError, match="1 ids for 2 images"):
        rollout(policy, images(2), ids=[0], group_size=2, num_steps=4, eta=1.0, seed=0)
    with pytest.raises(ValueError, match="window"):
        rollout(policy, images(1), ids=[0], group_size=2, num_steps=4, eta=1.0, seed=0, window=range(3, 6))


def test_reference_needs_adapters_or_a_copy():
    """Without either, asking for the policy from before is an error."""
    with pytest.raises(TypeError, match="add_lora"), reference_policy(pixel_policy(), None):
        pass


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_sft_loss_is_the_denoising_error(prediction_type):
    """For each prediction type: mean squared error to noise, v or the clean image, written out here."""
    policy = pixel_policy(prediction_type)
    references, degraded = images(3), images(3, seed=1)
    generator = torch.Generator().manual_seed(0)
    noise, times = torch.randn(3, 3, SIZE, SIZE, generator=generator), torch.tensor([10, 500, 900])
    clean, scheduler = 2 * references - 1, policy.process.scheduler
    latents = scheduler.add_noise(clean, noise, times)
    output = policy.model(torch.cat([latents, 2 * degraded - 1], 1), times).sample
    targets = {"epsilon": noise, "v_prediction": scheduler.get_velocity(clean, noise, times), "sample": clean}
    expected = (output - targets[prediction_type]).square().flatten(1).mean(1)
    found = policy.sft_loss(references, policy.condition(degraded), noise, times)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
