"""The ways from rewards to a gradient, each against what the gradient must be."""

import math
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from iqareward.diffusion import (
    DDIM,
    Batch,
    ClippedPolicyGradient,
    DiffusionNFT,
    DiffusionPolicy,
    DirectRewardGradient,
    FeedForwardPolicy,
    FlowSDE,
    GroupDPO,
    OneStepPolicy,
    PixelPolicy,
    Step,
)
from iqareward.diffusion.objectives import policy_loss
from iqareward.diffusion.policies.core import Versions
from iqareward.rewards.metric import NoReference
from tests.diffusion import gaussian_policy as toy
from tests.diffusion.policies.sd_pipelines import SIZE, text_to_image


class Quadratic:
    """The toy's reward under the contract, as far as an objective needs it."""

    name, differentiable = "quadratic", True

    def __call__(self, images):
        return toy.reward(images)


class Brightness(Quadratic):
    """Mean of the pixels."""

    def __call__(self, images):
        return images.flatten(1).mean(1)


class Broken(Brightness):
    """Brightness, except for the first two images: NaN, or a number without a derivative."""

    def __init__(self, breaks):
        self.breaks = breaks

    def __call__(self, images):
        first, others = super().__call__(images).split([2, len(images) - 2])
        zero = first - first.detach()
        broken = {"score": zero.sqrt() / zero, "gradient": zero.sqrt() + 1, "nothing": first}[self.breaks]
        return torch.cat([broken, others])


class Convolution(nn.Module):
    """A network in the form of a `diffusers.UNet2DModel`."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(6, 3, 3, padding=1)
        with torch.no_grad():
            for seed, weight in enumerate(self.parameters()):
                weight.copy_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))

    def forward(self, inputs, times):
        return SimpleNamespace(sample=self.layer(inputs))


class Latent(DiffusionPolicy):
    """A flow model in latents of half the size, behind a frozen decoder."""

    num_steps, exploration = 4, 0.7

    def __init__(self):
        self.model = Convolution()
        self.decoder = nn.Upsample(scale_factor=2)
        self.process = FlowSDE(diffusers.FlowMatchEulerDiscreteScheduler())

    def condition(self, batch, noise):
        return {"latents": self.encode(batch.degraded, {})}

    def encode(self, images, condition):
        return nn.functional.avg_pool2d(images, 2)

    def predict(self, latents, times, condition):
        return self.model(torch.cat([latents, condition["latents"]], 1), times).sample

    def decode(self, latents, condition):
        return self.decoder(latents)


def pixel_policy(prediction_type="epsilon"):
    """A pixel policy of the given prediction type."""
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction_type, timestep_spacing="trailing", clip_sample=False)
    return PixelPolicy(Convolution(), DDIM(scheduler), num_steps=4)


def feed_forward():
    """A convolution from image to image."""
    network = nn.Conv2d(3, 3, 3, padding=1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.fill_(0.05)
    return FeedForwardPolicy(network)


POLICIES = {"pixel": pixel_policy, "latent": Latent, "feed-forward": feed_forward}


def pixel_experience(policy, *, eta=0.5, **options):
    """Two inputs with two rollouts each, of opposite advantages."""
    degraded = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch((0, 1), degraded)
    condition, trajectory = toy.sampled(policy, batch, 2, eta=eta, **options)
    return toy.experience_of(batch, condition, trajectory, torch.tensor([[1.0, -1.0, 2.0, -2.0]]))


def term_of(objective, policy, experience, *, term=0, versions=None, rows=None, kl=False):
    """One term, as the learner asks for it."""
    versions = versions or Versions(policy, reference=True, old=True)
    rows = rows or slice(0, experience.num_rollouts)
    return objective(policy, experience.rollouts(rows, seed=1), term, versions=versions, kl=kl)


def gradient_of(objective, policy, experience, versions=None):
    """Gradient of the mean of all terms with respect to theta."""
    policy.model.zero_grad()
    for term in objective.terms(experience):
        term_of(objective, policy, experience, term=term, versions=versions).loss.mean().backward()
    return policy.model.theta.grad.item()


def moved_to(policy, theta):
    """The toy with another theta."""
    with torch.no_grad():
        policy.model.theta.fill_(theta)
    return policy


def test_policy_gradient_is_that_of_the_expected_reward():
    """Within four standard errors over 10 000 rollouts; the sum over steps, since each step is an action."""
    policy, count = toy.GaussianPolicy(), 10_000
    found = -gradient_of(ClippedPolicyGradient(clip=10.0), policy, toy.experience(policy, count))
    # One rollout's term is A * (e1 + e2) / NOISE with |A| about 0.5: a standard deviation of about 2.
    assert found == pytest.approx(toy.exact_gradient(), abs=4 * 2.0 / count**0.5)


@pytest.mark.parametrize("shift", [0.001, 0.05, -0.05])
def test_importance_ratio_follows_the_weights(shift):
    """After an optimiser step the ratio is that of the two Gaussians, and rollouts beyond the clip stop pulling."""
    policy, clip = toy.GaussianPolicy(), 0.02
    experience = toy.experience(policy, 16)
    path, advantages = experience.trajectory, experience.advantages[0]
    moved_to(policy, toy.START + shift)
    for term, kept in ((0, 0.0), (1, 0.5)):
        found = term_of(ClippedPolicyGradient(clip=clip), policy, experience, term=term)
        drawn = (path.latents[term + 1] - kept * path.latents[term]).flatten() - toy.START
        ratio = torch.exp((drawn**2 - (drawn - shift) ** 2) / (2 * toy.NOISE**2))
        torch.testing.assert_close(found.ratio, ratio, rtol=1e-4, atol=1e-5)
        policy.model.zero_grad()
        found.loss.mean().backward()
        pulls = torch.where(advantages > 0, ratio <= 1 + clip, ratio >= 1 - clip)
        expected = -(pulls * ratio * advantages * (drawn - shift) / toy.NOISE**2).mean()
        torch.testing.assert_close(policy.model.theta.grad, expected, rtol=1e-3, atol=1e-5)
    assert not torch.equal(found.ratio, torch.ones(16))


def test_ratio_is_one_before_the_first_step():
    """Also per slice of rows, since a step keeps nothing of its neighbours."""
    policy = pixel_policy()
    experience = pixel_experience(policy)
    ratio = torch.cat([term_of(ClippedPolicyGradient(), policy, experience, rows=rows).ratio for rows in PARTS])
    torch.testing.assert_close(ratio, torch.ones(4), rtol=0, atol=1e-6)


PARTS = (slice(0, 1), slice(1, 3), slice(3, 4))


@pytest.mark.parametrize("kind", list(POLICIES))
def test_a_slice_of_rows_has_the_losses_that_it_has_among_all(kind):
    """Whatever the objective: the learner may take as many rows at once as fit into memory."""
    policy = POLICIES[kind]()
    experience = pixel_experience(policy)
    objectives = [ClippedPolicyGradient(), DirectRewardGradient(Brightness()), DirectRewardGradient(Brightness(), 0)]
    if kind != "feed-forward":
        objectives.append(DiffusionNFT())
    for objective in (*objectives, GroupDPO()):
        parts = (slice(0, 2), slice(2, 4)) if objective.whole_groups else PARTS
        whole = term_of(objective, policy, experience).loss
        assert whole.shape == (4,)
        found = torch.cat([term_of(objective, policy, experience, rows=rows).loss for rows in parts])
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)


def test_policy_loss_stops_where_the_ratio_is_clipped():
    """Beyond the clip range the gradient is 0 in the direction that is already far enough, and not in the other."""
    new = torch.tensor([0.2, 0.2, -0.2, -0.2], requires_grad=True)
    policy_loss(new, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), clip=0.1).sum().backward()
    assert new.grad[0] == 0
    assert new.grad[1] > 0
    assert new.grad[2] < 0
    assert new.grad[3] == 0


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_ratio_that_overflows_has_a_finite_gradient(advantage):
    """A rollout that became e^1000 times as likely, or as unlikely, spoils no other."""
    new = torch.tensor([1000.0, -1000.0, 0.05], requires_grad=True)
    loss = policy_loss(new, torch.zeros(3), torch.full((3,), advantage), clip=0.1)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert new.grad.isfinite().all()
    assert new.grad[2].sign() == -torch.tensor(advantage).sign()


def test_reward_gradient_through_all_steps_is_the_pathwise_derivative():
    """DRaFT-K with K = all steps: mean of dr/dx2 * dx2/dtheta at the clamped images of the very rollouts."""
    policy = toy.GaussianPolicy()
    experience = toy.experience(policy, 500)
    samples = experience.trajectory.sample.clamp(0, 1)
    by_hand = (-2 * (samples - toy.BEST) * 1.5).mean().item()
    for checkpointed in (True, False):
        objective = DirectRewardGradient(Quadratic(), last_steps=2, checkpointed=checkpointed)
        found = -gradient_of(objective, policy, experience)
        assert found == pytest.approx(by_hand, rel=1e-4)


def test_reward_gradient_through_the_last_step_is_truncated():
    """With K = 1 only the last step's dependence counts: 1 instead of 1.5."""
    policy = toy.GaussianPolicy()
    experience = toy.experience(policy, 500)
    whole, last = (gradient_of(DirectRewardGradient(Quadratic(), last_steps=k), policy, experience) for k in (2, 1))
    assert last == pytest.approx(whole / 1.5, rel=1e-4)


class DeadEnd(toy.GaussianPolicy):
    """A flow whose last step starts with 0.2 % noise, as some schedules of a pipeline end."""

    def __init__(self):
        super().__init__()
        self.process = FlowSDE(diffusers.FlowMatchEulerDiscreteScheduler())

    def schedule(self, condition, num_steps):
        return Step(1000.0, 1.0, 0.5), Step(500.0, 0.5, 0.002), Step(2.0, 0.002, 0.0)


@pytest.mark.parametrize(("last_steps", "share"), [(1, 0.5), (2, 1.0), (3, 1.0)])
def test_reward_gradient_counts_from_the_last_step_that_matters(last_steps, share):
    """The velocity theta moves the image by the time it acts: half of it, and not the 0.002 of the last step."""
    policy = DeadEnd()
    batch = toy.batch_of(1)
    condition, trajectory = toy.sampled(policy, batch, 4, eta=0.0)
    experience = toy.experience_of(batch, condition, trajectory, torch.zeros(1, 4))
    found = gradient_of(DirectRewardGradient(Brightness(), last_steps=last_steps), policy, experience)
    assert found == pytest.approx(share, rel=1e-4)


def test_refl_takes_no_step_that_does_not_matter():
    """The clean image of a step with sigma s moves by s: 1 or 0.5 of the velocity here, never 0.002."""
    policy = DeadEnd()
    batch = toy.batch_of(1)
    condition, trajectory = toy.sampled(policy, batch, 1, eta=0.0)
    rollouts = toy.experience_of(batch, condition, trajectory, torch.zeros(1, 1)).rollouts
    for seed in range(20):
        objective, versions = DirectRewardGradient(Brightness(), last_steps=0), Versions(policy)
        loss = objective(policy, rollouts(slice(0, 1), seed=seed), 0, versions=versions, kl=False).loss
        (gradient,) = torch.autograd.grad(loss.sum(), policy.model.parameters())
        assert gradient.item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("eta", [0.5, 0.0])
def test_reward_gradient_scores_the_rollouts_at_hand(eta):
    """Replayed with their noise, the last steps lead to the images that were sampled."""
    policy = pixel_policy()
    experience = pixel_experience(policy, eta=eta)
    loss = term_of(DirectRewardGradient(Brightness(), last_steps=3), policy, experience).loss
    images = policy.decode(experience.trajectory.sample, {}).clamp(0, 1)
    torch.testing.assert_close(loss, -images.flatten(1).mean(1), rtol=1e-5, atol=1e-5)


def test_reward_gradient_without_noise_scores_what_the_model_makes_now():
    """After an optimiser step the image of a deterministic path has moved, and the score with it."""
    policy = feed_forward()
    experience = pixel_experience(policy, eta=0.0)
    with torch.no_grad():
        policy.model.bias.add_(0.1)
    loss = term_of(DirectRewardGradient(Brightness()), policy, experience).loss
    torch.testing.assert_close(loss[::2], -policy.model(experience.batch.degraded).flatten(1).mean(1))


@pytest.mark.parametrize("kind", list(POLICIES))
@pytest.mark.parametrize("last_steps", [0, 1, 2])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_reward_gradient_reaches_every_policy(kind, last_steps, eta):
    """DRaFT-K and ReFL: a finite gradient that is not 0, through the decoder if there is one; one step is enough."""
    policy = POLICIES[kind]()
    experience = pixel_experience(policy, eta=eta)
    objective = DirectRewardGradient(Brightness(), last_steps=last_steps)
    term_of(objective, policy, experience).loss.mean().backward()
    gradients = [weight.grad for weight in policy.model.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


def test_reward_gradient_of_one_step_is_that_of_the_network():
    """For a feed-forward network: as if the reward were its loss."""
    policy = feed_forward()
    experience = pixel_experience(policy, eta=0.0)
    term_of(DirectRewardGradient(Brightness()), policy, experience).loss.mean().backward()
    found = [weight.grad.clone() for weight in policy.model.parameters()]
    policy.model.zero_grad()
    (-policy.model(experience.batch.degraded)).mean().backward()
    for one, weight in zip(found, policy.model.parameters(), strict=True):
        torch.testing.assert_close(one, weight.grad, rtol=1e-4, atol=1e-6)


class Curious(Brightness):
    """Brightness beyond that of the degraded images, which remembers what it was told."""

    def __call__(self, images, inputs, prompts, **others):
        self.seen = {"inputs": inputs, "prompts": prompts, **others}
        return (images - inputs).flatten(1).mean(1)


@pytest.mark.parametrize("references", [None, torch.rand(2, 3, 8, 8)])
def test_reward_gradient_tells_the_reward_all_about_the_inputs(references):
    """Each rollout's degraded image, prompt, id and task, and its reference if there is one."""
    policy, reward = pixel_policy(), Curious()
    experience = pixel_experience(policy)
    batch = replace(experience.batch, prompts=("a", "b"), tasks=("rain", "haze"), references=references)
    term_of(DirectRewardGradient(reward), policy, replace(experience, batch=batch), rows=slice(1, 3))
    assert reward.seen["prompts"] == ["a", "b"]
    assert reward.seen["ids"] == [0, 1]
    assert reward.seen["tasks"] == ["rain", "haze"]
    assert torch.equal(reward.seen["inputs"], batch.degraded)
    assert ("references" in reward.seen) == (references is not None)


@pytest.mark.parametrize("last_steps", [1, 0])
def test_a_broken_reward_does_not_reach_the_policy(last_steps):
    """A NaN score, and a finite score with a NaN gradient, of one input: the weights get that of the others alone."""
    gradients = {}
    for breaks in ("score", "gradient", "nothing"):
        policy = pixel_policy("sample")
        experience = pixel_experience(policy)
        objective = DirectRewardGradient(Broken(breaks), last_steps=last_steps)
        loss = term_of(objective, policy, experience).loss
        assert loss.isfinite().all()
        (loss.sum() if breaks != "nothing" else loss[2:].sum()).backward()
        gradients[breaks] = [weight.grad for weight in policy.model.parameters()]
    for found in (gradients["score"], gradients["gradient"]):
        for one, expected in zip(found, gradients["nothing"], strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-7)
    assert sum(gradient.abs().sum() for gradient in gradients["score"]) > 0


def test_reward_gradient_needs_a_differentiable_reward():
    """Others are refused when the objective is built."""
    with pytest.raises(ValueError, match="differentiable=True"):
        DirectRewardGradient(NoReference(lambda images: images.mean((1, 2, 3)), name="mean", higher_is_better=True))


def test_forward_process_pulls_towards_good_rollouts_only():
    """Its gradient is `(2 r - 1) * d/dtheta` of the distance to each rollout, and 0 where r = 0.5."""
    policy = toy.GaussianPolicy()
    advantages = torch.tensor([5.0, -5.0, 0.0, 2.5])
    experience = toy.experience(policy, 4, advantages)
    found = gradient_of(DiffusionNFT(num_terms=1), policy, experience)
    offset = toy.START - experience.trajectory.sample.flatten()
    pull = torch.tensor([1.0, -1.0, 0.0, 0.5])
    assert found == pytest.approx((pull * 2 * offset / offset.abs()).mean().item(), rel=1e-4)


SPREAD = 50.0


@settings(max_examples=25)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), min_size=2, max_size=6), st.floats(0.25, 2.0))
def test_forward_process_is_best_where_its_paper_says(rollouts, beta):
    """At `v_old + 2 / beta * E[r * (v - v_old)]`, with v_old the mean of the rollouts' v.

    Every rollout has two elements, SPREAD above and below its own number: the mean absolute distance that the loss is
    divided by is SPREAD then, whatever theta, so the squared loss of the theorem is left.
    """
    centres, good = (torch.tensor(values) for values in zip(*rollouts, strict=True))
    policy, objective, old = toy.GaussianPolicy(), DiffusionNFT(beta=beta, num_terms=1), centres.mean().item()
    versions = Versions(moved_to(policy, old), old=True)
    batch = toy.batch_of(1, (1, 1, 2))
    condition, trajectory = toy.sampled(policy, batch, len(rollouts), eta=0.0)
    sample = centres.view(-1, 1, 1, 1) + torch.tensor([SPREAD, -SPREAD])
    trajectory = replace(trajectory, latents=(*trajectory.latents[:-1], sample))
    experience = toy.experience_of(batch, condition, trajectory, objective.clip * (2 * good - 1)[None])
    best = old + 2 / beta * (good * (centres - old)).mean().item()
    here, beyond = (gradient_of(objective, moved_to(policy, best + by), experience, versions) for by in (0.0, 0.1))
    assert here == pytest.approx(0.0, abs=1e-5)
    assert beyond == pytest.approx(2 * beta * 0.1 / SPREAD, abs=1e-5)


def test_forward_process_compares_with_the_older_weights():
    """After an optimiser step the loss is another than if these weights had sampled; they alone get a gradient."""
    policy = pixel_policy()
    experience, versions = pixel_experience(policy), Versions(policy, old=True)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.01)
    moved = [weight.detach().clone() for weight in policy.model.parameters()]
    with_old, with_own = (
        term_of(DiffusionNFT(), policy, experience, versions=each).loss
        for each in (versions, Versions(policy, old=True))
    )
    assert (with_old - with_own).abs().min() > 0
    with_old.sum().backward()
    for weight, before in zip(policy.model.parameters(), moved, strict=True):
        assert torch.equal(weight, before)
        assert weight.grad.abs().sum() > 0


def test_old_weights_of_the_forward_process_follow_ever_slower():
    """They are replaced in the first update, and follow as in the published configuration later."""
    assert [DiffusionNFT().old_decay(update) for update in (0, 1, 250, 500, 10_000)] == [0.0, 0.001, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("pairs", ["sum", "all"])
@pytest.mark.parametrize("shift", [0.0, 0.1, -0.3])
def test_group_dpo_of_two_rollouts_is_dpo(pairs, shift):
    """By hand: with d = (theta - x)^2 and advantages 1 and -1, both losses are that of one preferred pair."""
    policy, beta = toy.GaussianPolicy(), 3.0
    experience = toy.experience(policy, 2, torch.tensor([1.0, -1.0]))
    versions, (good, bad) = Versions(policy, reference=True), experience.trajectory.sample.flatten().tolist()
    theta = toy.START + shift
    margin = (theta - good) ** 2 - (toy.START - good) ** 2 - (theta - bad) ** 2 + (toy.START - bad) ** 2
    likely = 1 / (1 + math.exp(beta / 2 * margin))
    objective = GroupDPO(beta=beta, pairs=pairs)
    loss = term_of(objective, moved_to(policy, theta), experience, versions=versions).loss
    torch.testing.assert_close(loss, torch.full((2,), -math.log(likely)), rtol=1e-4, atol=1e-6)
    found = gradient_of(objective, policy, experience, versions)
    assert found == pytest.approx((1 - likely) * beta * (bad - good), rel=1e-3)


@pytest.mark.parametrize("pairs", ["sum", "all"])
def test_group_dpo_of_many_rollouts(pairs):
    """By hand for two groups of three: the weighted sum within, or every pair weighted by its gap."""
    policy, beta = toy.GaussianPolicy(), 2.0
    advantages = torch.tensor([1.2, -0.2, -1.0, 0.5, 0.5, -1.0])
    batch = toy.batch_of(2)
    condition, trajectory = toy.sampled(policy, batch, 3, eta=toy.NOISE)
    experience = toy.experience_of(batch, condition, trajectory, advantages[None])
    versions, sample = Versions(policy, reference=True), trajectory.sample.flatten()
    change = (0.6 - sample) ** 2 - (toy.START - sample) ** 2
    found = term_of(GroupDPO(beta=beta, pairs=pairs), moved_to(policy, 0.6), experience, versions=versions).loss
    for group in (slice(0, 3), slice(3, 6)):
        weights, changes = advantages[group].tolist(), change[group].tolist()
        if pairs == "sum":
            margins = [(1.0, sum(weight * each for weight, each in zip(weights, changes, strict=True)))]
        else:
            both = [(i, j) for i in range(3) for j in range(3) if weights[i] > weights[j]]
            total = sum(weights[i] - weights[j] for i, j in both)
            margins = [((weights[i] - weights[j]) / total, changes[i] - changes[j]) for i, j in both]
        expected = sum(share * math.log(1 + math.exp(beta / 2 * margin)) for share, margin in margins)
        torch.testing.assert_close(found[group], torch.full((3,), expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pairs", ["sum", "all"])
def test_group_dpo_of_a_one_step_gaussian_has_its_likelihood(pairs):
    """For a feed-forward policy, by hand: d is the squared distance to its answer over the variance, per element."""
    policy, beta, eta = feed_forward(), 0.1, 0.2
    experience = pixel_experience(policy, eta=eta)
    versions, sample = Versions(policy, reference=True), experience.trajectory.sample
    degraded = experience.batch.degraded.repeat_interleave(2, 0)
    before = policy.model(degraded)
    with torch.no_grad():
        policy.model.bias.add_(0.1)
    change = ((policy.model(degraded) - sample) ** 2 - (before - sample) ** 2).flatten(1).mean(1) / eta**2
    found = term_of(GroupDPO(beta=beta, pairs=pairs), policy, experience, versions=versions).loss
    scale = torch.tensor([1.0, 2.0]) if pairs == "sum" else torch.ones(2)
    expected = torch.log1p(torch.exp(beta / 2 * scale * (change[::2] - change[1::2])))
    torch.testing.assert_close(found, expected.repeat_interleave(2), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pairs", ["sum", "all"])
def test_group_dpo_compares_at_one_time_with_one_noise(pairs):
    """Rollouts that ended in the same image are equally good, whatever their advantages and the weights."""
    policy = pixel_policy()
    experience, versions = pixel_experience(policy), Versions(policy, reference=True)
    path = experience.trajectory
    same = path.sample[::2].repeat_interleave(2, 0)
    experience = replace(experience, trajectory=replace(path, latents=(*path.latents[:-1], same)))
    with torch.no_grad():
        policy.model.layer.bias.add_(0.1)
    loss = term_of(GroupDPO(beta=1.0, pairs=pairs), policy, experience, versions=versions).loss
    torch.testing.assert_close(loss, torch.full((4,), math.log(2.0)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pairs", ["sum", "all"])
def test_group_dpo_learns_nothing_from_equal_rewards(pairs):
    """Loss and gradient stay finite, and the gradient is 0."""
    policy = toy.GaussianPolicy()
    assert gradient_of(GroupDPO(pairs=pairs), policy, toy.experience(policy, 4, torch.zeros(4))) == 0


@pytest.mark.parametrize("objective", [DiffusionNFT(), GroupDPO()])
def test_the_forward_process_needs_a_diffusion_model(objective):
    """Another policy is named, together with what it can use."""
    policy = feed_forward()
    experience = pixel_experience(policy, eta=0.0)
    with pytest.raises(TypeError, match=r"got FeedForwardPolicy.*DirectRewardGradient"):
        term_of(objective, policy, experience)


def one_step(**options):
    """GDPO-SR's kind of model: latents get noise up to one timestep and the UNet is told another."""
    return OneStepPolicy.from_pipeline(text_to_image(), timestep=600, **options)


def one_step_experience(policy):
    """Rollouts that differ by the noise that their latents begin with."""
    batch = Batch((0, 1), torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    condition, trajectory = toy.sampled(policy, batch, 2, eta=0.0)
    return toy.experience_of(batch, condition, trajectory, torch.tensor([[1.0, -1.0, 1.0, -1.0]]))


@pytest.mark.parametrize("objective", [GroupDPO(), DiffusionNFT()])
def test_a_one_step_model_learns_at_its_own_timesteps(objective):
    """Its samples get noise up to the one and the network is told the other, whatever the training times of others."""
    policy, told = one_step(noise_timestep=300), set()
    experience = one_step_experience(policy)
    predict = policy.predict
    policy.predict = lambda latents, times, condition: told.update(times.tolist()) or predict(latents, times, condition)
    term_of(objective, policy, experience).loss.sum().backward()
    assert told == {600}
    clean, noise = experience.trajectory.sample, experience.rollouts(slice(0, 4), seed=1).noise
    noised = policy.noised(clean, {}, noise)
    alpha_bar = policy.process.scheduler.alphas_cumprod[300]
    expected = alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noised.target
    torch.testing.assert_close(noised.latents, expected, rtol=1e-4, atol=1e-5)
    assert sum(weight.grad.abs().sum() for weight in policy.model.parameters() if weight.grad is not None) > 0


@pytest.mark.parametrize("options", [{}, {"noise_timestep": 300, "train": "encoder"}])
def test_a_one_step_model_that_sees_no_noise_is_refused(options):
    """What the forward process needs is said, and which objectives do without."""
    policy = one_step(**options)
    with pytest.raises(ValueError, match=r"noise_timestep and a UNet that trains.*DirectRewardGradient"):
        term_of(DiffusionNFT(), policy, one_step_experience(policy))


def test_unknown_pairs_are_refused():
    """When the objective is built."""
    with pytest.raises(ValueError, match="'sum' or 'all'"):
        GroupDPO(pairs="some")


def test_stepwise_rewards_are_for_the_steps_before_them():
    """With step 2 scored, steps 0 and 1 follow its reward and the later ones that of the sample."""
    policy = pixel_policy()
    experience = pixel_experience(policy, keep_clean=(2,))
    experience = replace(experience, advantages=torch.stack([torch.full((4,), 3.0), torch.full((4,), 7.0)]))
    losses = [term_of(ClippedPolicyGradient(), policy, experience, term=term).loss.mean().item() for term in (0, 1, 2)]
    assert losses == pytest.approx([-3.0, -3.0, -7.0], rel=1e-3)


def test_kl_is_zero_at_the_start_and_grows():
    """Against the weights from before RL, for the two objectives that have one; the others refuse."""
    policy = pixel_policy()
    experience, versions = pixel_experience(policy), Versions(policy, reference=True, old=True)
    objectives = (ClippedPolicyGradient(), DiffusionNFT())
    for objective in objectives:
        assert term_of(objective, policy, experience, versions=versions, kl=True).kl.abs().max() == 0
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.01)
    for objective in objectives:
        assert (term_of(objective, policy, experience, versions=versions, kl=True).kl > 0).all()
    for objective in (DirectRewardGradient(Brightness()), GroupDPO()):
        with pytest.raises(ValueError, match="kl_beta=0"):
            term_of(objective, policy, experience, versions=versions, kl=True)


def test_terms_are_the_stochastic_steps():
    """All but the last, or every second of them; none of a deterministic path."""
    experience = pixel_experience(pixel_policy())
    assert tuple(ClippedPolicyGradient().terms(experience)) == (0, 1, 2)
    assert tuple(ClippedPolicyGradient(every=2).terms(experience)) == (0, 2)
    assert tuple(ClippedPolicyGradient().terms(pixel_experience(pixel_policy(), eta=0.0))) == ()
