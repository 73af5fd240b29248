"""Rollouts of policies: they can be repeated and replayed, and the ratio before the first update is 1."""

from collections import namedtuple

import pytest
import torch
from accelerate import Accelerator

from iqareward.diffusion import Batch, Noise, add_lora, rollout
from iqareward.diffusion.conditions import concatenated, repeat, select
from iqareward.diffusion.policies.core import Versions
from iqareward.diffusion.rollouts import replay
from tests.diffusion.tiny import ETA, KINDS, SIZE, images, pixel_policy, policy_of

EXACT = {"rtol": 0.0, "atol": 0.0}
OTHER_BATCH = {"rtol": 1e-4, "atol": 1e-4}  # fp32 sums in another order, over all steps


@pytest.fixture(params=KINDS)
def kind(request):
    """Each kind of policy."""
    return request.param


def conditioned(policy, ids=(3, 8)):
    """The condition of two rollouts of each input."""
    batch = Batch(ids, images(10)[list(ids)])
    return repeat(policy.condition(batch, Noise(ids)), 2)


def sample(policy, kind, ids=(3, 8), seed=0, **options):
    """Two rollouts of each input in four steps."""
    noise = Noise.of_groups(ids, 2, seed=seed, device="cpu")
    return rollout(policy, conditioned(policy, ids), noise, num_steps=4, eta=ETA[kind], **options)


def test_shapes(kind):
    """Latents, log-probabilities and decoded images of a trajectory."""
    policy = policy_of(kind)
    trajectory = sample(policy, kind, keep_clean=(2,))
    latent = policy.latent_shape(conditioned(policy))
    assert [latents.shape for latents in trajectory.latents] == [(4, *latent)] * 5
    assert trajectory.log_probs.shape == (4, 4)
    assert trajectory.clean[2].shape == (4, *latent)
    assert policy.decode(trajectory.sample, conditioned(policy)).shape == (4, 3, SIZE, SIZE)
    assert all(latents.isfinite().all() for latents in trajectory.latents)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16], ids=str)
def test_parts_keep_their_own_dtypes(kind, trained, mixed_precision):
    """Beside frozen parts in bfloat16 a model of any dtype, prepared by accelerate or not, answers much as in fp32."""
    policy, exact = policy_of(kind), policy_of(kind)
    condition = conditioned(exact)
    latents = torch.randn(4, *policy.latent_shape(condition), generator=torch.Generator().manual_seed(0))
    times = torch.tensor([40, 700, 300, 900])
    expected = exact.predict(latents, times, condition)
    for part in (getattr(policy, "unet", None), getattr(policy, "autoencoder", None)):
        if part is not None:
            part.to(torch.bfloat16)
    policy.model = Accelerator(cpu=True, mixed_precision=mixed_precision).prepare(policy.model.to(trained))
    answer = policy.predict(latents, times, conditioned(policy)).float()
    assert (answer - expected).norm() < 0.02 * expected.norm()  # eight bits of bfloat16, through a few layers


def test_replayed_log_probs_are_those_of_the_rollout(kind):
    """Recomputed from stored latents they agree, so that the ratio before the first update is 1."""
    policy = policy_of(kind)
    trajectory = sample(policy, kind)
    assert trajectory.stochastic == ((0, 1, 2, 3) if kind == "controlnet" else (0, 1, 2))
    for step in trajectory.stochastic:
        log_probs = replay(policy, trajectory, step, conditioned(policy)).log_prob(trajectory.latents[step + 1])
        torch.testing.assert_close(log_probs, trajectory.log_probs[step], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("kind", ["controlnet", "flow"])
def test_checkpointed_decoding_has_the_same_gradient(kind):
    """Recomputing the decoder's activations in the backward pass changes memory, not numbers."""
    policy, gradients = policy_of(kind), []
    for checkpointed in (True, False):
        policy.autoencoder.checkpointed = checkpointed
        latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        policy.decode(latents, conditioned(policy)).square().sum().backward()
        gradients.append(latents.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_rollouts_depend_on_the_input_alone(kind):
    """An input's rollouts are the same in another batch; other seeds and copies differ."""
    policy = policy_of(kind)
    both, alone = sample(policy, kind), sample(policy, kind, ids=(8,))
    torch.testing.assert_close(both.sample[2:], alone.sample, **OTHER_BATCH)
    torch.testing.assert_close(both.latents[0][2:], alone.latents[0], **EXACT)
    torch.testing.assert_close(both.sample, sample(policy, kind).sample, **EXACT)
    assert not torch.equal(both.sample, sample(policy, kind, seed=1).sample)
    assert not torch.equal(both.latents[0][0], both.latents[0][1])


def test_rollouts_stay_in_their_rows(kind):
    """`rows` of a trajectory are the rollouts of those rows."""
    trajectory = sample(policy_of(kind), kind, keep_clean=(1,))
    part = trajectory.rows(slice(2, 4))
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
    replay(policy, trajectory, 1, conditioned(policy)).log_prob(trajectory.latents[2]).sum().backward()
    with_gradient = [weight.grad is not None and weight.grad.abs().sum() > 0 for weight in policy.model.parameters()]
    assert sum(with_gradient) > 0.8 * len(with_gradient)
    for frozen in (getattr(policy, "unet", None), getattr(policy, "autoencoder", None)):
        assert frozen is None or all(weight.grad is None for weight in frozen.parameters())


def test_lora_starts_at_the_reference_and_leaves_it(kind):
    """KL to the model as it was is 0 at the start, also of adapters that SFT has trained, and not once they moved."""
    policy = policy_of(kind)
    policy.model = add_lora(policy.model, rank=2)
    adapters = [weight for name, weight in policy.model.named_parameters() if "lora_B" in name]
    assert adapters

    def move():
        with torch.no_grad():
            for weight in adapters:
                weight.add_(0.1)

    move()
    trajectory, condition = sample(policy, kind), conditioned(policy)
    versions = Versions(policy, reference=True)

    def divergence():
        now = replay(policy, trajectory, 1, condition)
        with versions.reference():
            before = replay(policy, trajectory, 1, condition)
        return now.kl(before)

    assert divergence().abs().max() == 0
    move()
    assert (divergence() > 0).all()
    assert {name.split(".")[-2] for name, w in policy.model.named_parameters() if w.requires_grad} == {"default"}


def test_rollout_says_what_does_not_fit():
    """A window lies inside of the schedule, and so do the steps whose images are scored."""
    with pytest.raises(ValueError, match="window"):
        sample(pixel_policy(), "pixel", window=range(3, 6))
    with pytest.raises(ValueError, match="keep_clean"):
        sample(pixel_policy(), "pixel", keep_clean=(0, 6))


def test_older_weights_have_to_be_kept():
    """Asking for weights that were not kept is an error that names the option."""
    versions = Versions(pixel_policy())
    with pytest.raises(ValueError, match="reference=True"), versions.reference():
        pass
    with pytest.raises(ValueError, match="old=True"), versions.old():
        pass


def test_conditions_may_be_named_tuples():
    """Rows of one are selected and repeated as those of a tuple, and two are put together."""
    pair = namedtuple("pair", "images texts")(torch.arange(2.0), ["a", "b"])
    found = concatenated(select(repeat({"pair": pair}, 2), slice(1, 3)), {"pair": pair})["pair"]
    assert found.images.tolist() == [0, 1, 0, 1]
    assert found.texts == ["a", "b", "a", "b"]
