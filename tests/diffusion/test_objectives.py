"""The three ways from rewards to a gradient, each against what the gradient must be."""

import copy
from dataclasses import replace

import pytest
import torch

from iqareward.diffusion import ClippedPolicyGradient, DiffusionNFT, DirectRewardGradient, rollout
from iqareward.diffusion.objectives import policy_loss
from iqareward.diffusion.policies import repeat
from iqareward.diffusion.rollouts import Experience
from iqareward.rewards.metric import NoReference
from tests.diffusion import gaussian_policy as toy
from tests.diffusion.tiny import images, pixel_policy, policy_of

CALL = {"seed": 1, "frozen": None, "kl": False}


class Quadratic:
    """The toy's reward under the contract, as far as an objective needs it."""

    name, differentiable = "quadratic", True

    def __call__(self, images, references=None, **_):
        return toy.reward(images)


class Brightness(Quadratic):
    """Mean of the pixels."""

    def __call__(self, images, references=None, **_):
        return images.flatten(1).mean(1)


class Broken(Brightness):
    """Brightness, except for the first two images: NaN, or a number without a derivative."""

    def __init__(self, breaks):
        self.breaks = breaks

    def __call__(self, images, references=None, **_):
        first, others = super().__call__(images).split([2, len(images) - 2])
        zero = first - first.detach()
        broken = {"score": zero.sqrt() / zero, "gradient": zero.sqrt() + 1, "nothing": first}[self.breaks]
        return torch.cat([broken, others])


def gradient_of(objective, policy, experience):
    """Gradient of the mean of all terms with respect to theta."""
    policy.model.zero_grad()
    for term in objective.terms(experience):
        objective(policy, experience, term, **CALL).loss.mean().backward()
    return policy.model.theta.grad.item()


def test_policy_gradient_is_that_of_the_expected_reward():
    """Within four standard errors over 20 000 rollouts; the sum over steps, since each step is an action."""
    policy, count = toy.GaussianPolicy(), 20_000
    found = -gradient_of(ClippedPolicyGradient(clip=10.0), policy, toy.experience(policy, count))
    # One rollout's term is A * (e1 + e2) / NOISE with |A| about 0.5: a standard deviation of about 2.
    assert found == pytest.approx(toy.exact_gradient(), abs=4 * 2.0 / count**0.5)


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
    experience = toy.experience(policy, 20_000)
    samples = experience.trajectory.sample.clamp(0, 1)
    by_hand = (-2 * (samples - toy.BEST) * 1.5).mean().item()
    for checkpointed in (True, False):
        objective = DirectRewardGradient(Quadratic(), last_steps=2, checkpointed=checkpointed)
        found = -gradient_of(objective, policy, experience)
        assert found == pytest.approx(by_hand, rel=1e-4)


def test_reward_gradient_through_the_last_step_is_truncated():
    """With K = 1 only the last step's dependence counts: 1 instead of 1.5."""
    policy = toy.GaussianPolicy()
    experience = toy.experience(policy, 1000)
    whole, last = (gradient_of(DirectRewardGradient(Quadratic(), last_steps=k), policy, experience) for k in (2, 1))
    assert last == pytest.approx(whole / 1.5, rel=1e-4)


def test_reward_gradient_scores_the_rollouts_at_hand():
    """Replayed with their noise, the last steps lead to the images that were sampled."""
    policy = pixel_policy()
    experience = pixel_experience(policy)
    loss = DirectRewardGradient(Brightness(), last_steps=3)(policy, experience, 0, **CALL).loss
    expected = -policy.decode(experience.trajectory.sample).clamp(0, 1).flatten(1).mean(1).view(2, 2).mean(1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["pixel", "controlnet", "flow"])
@pytest.mark.parametrize("last_steps", [0, 1, 2])
def test_reward_gradient_reaches_every_policy(kind, last_steps):
    """DRaFT-K and ReFL: a finite gradient that is not 0, through the decoder if there is one."""
    policy = policy_of(kind)
    experience = pixel_experience(policy)
    DirectRewardGradient(Brightness(), last_steps=last_steps)(policy, experience, 0, **CALL).loss.mean().backward()
    gradients = [weight.grad for weight in policy.model.parameters() if weight.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


@pytest.mark.parametrize("last_steps", [1, 0])
def test_a_broken_reward_does_not_reach_the_policy(last_steps):
    """A NaN score, and a finite score with a NaN gradient, of one input: the weights get that of the others alone."""
    gradients = {}
    for breaks in ("score", "gradient", "nothing"):
        policy = pixel_policy("sample")
        experience = pixel_experience(policy)
        objective = DirectRewardGradient(Broken(breaks), last_steps=last_steps)
        loss = objective(policy, experience, 0, **CALL).loss
        assert loss.isfinite().all()
        (loss.sum() if breaks != "nothing" else loss[1]).backward()
        gradients[breaks] = [weight.grad for weight in policy.model.parameters()]
    for found in (gradients["score"], gradients["gradient"]):
        for one, expected in zip(found, gradients["nothing"], strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-7)
    assert sum(gradient.abs().sum() for gradient in gradients["score"]) > 0


def test_reward_gradient_needs_a_differentiable_reward():
    """Others are refused when the objective is built."""
    with pytest.raises(ValueError, match="differentiable=True"):
        DirectRewardGradient(NoReference(lambda images: images.mean((1, 2, 3)), name="mean", higher_is_better=True))


def pixel_experience(policy):
    """Two inputs with two rollouts each, of opposite advantages."""
    degraded = images(2)
    trajectory = rollout(policy, degraded, ids=[0, 1], group_size=2, num_steps=4, eta=0.5, seed=0)
    advantages, distances = torch.tensor([[1.0, -1.0, 2.0, -2.0]]), torch.ones(4)
    condition, active = policy.condition(degraded), torch.ones(2, dtype=torch.bool)
    return Experience((0, 1), degraded, condition, trajectory, advantages, distances, advantages, active, active)


def test_forward_process_pulls_towards_good_rollouts_only():
    """Its gradient is `(2 r - 1) * d/dtheta` of the distance to each rollout, and 0 where r = 0.5."""
    policy = toy.GaussianPolicy()
    advantages = torch.tensor([5.0, -5.0, 0.0, 2.5])
    experience = toy.experience(policy, 4, advantages)
    found = gradient_of(DiffusionNFT(num_terms=1), policy, experience)
    offset = toy.START - experience.trajectory.sample.flatten()
    pull = torch.tensor([1.0, -1.0, 0.0, 0.5])
    assert found == pytest.approx((pull * 2 * offset / offset.abs()).mean().item(), rel=1e-4)


def test_stepwise_rewards_are_for_the_steps_before_them():
    """With step 2 scored, steps 0 and 1 follow its reward and the later ones that of the sample."""
    policy = pixel_policy()
    experience = pixel_experience(policy)
    path = rollout(policy, images(2), ids=[0, 1], group_size=2, num_steps=4, eta=0.5, seed=0, keep_clean=(2,))
    stepwise = torch.stack([torch.full((4,), 3.0), torch.full((4,), 7.0)])
    experience = replace(experience, trajectory=path, advantages=stepwise, rewards=stepwise)
    losses = [ClippedPolicyGradient()(policy, experience, term, **CALL).loss.mean().item() for term in (0, 1, 2)]
    assert losses == pytest.approx([-3.0, -3.0, -7.0], rel=1e-3)


def test_kl_is_zero_at_the_start_and_grows():
    """Against a frozen copy of the model, for the two objectives that have one."""
    policy = pixel_policy()
    frozen, experience = copy.deepcopy(policy.model), pixel_experience(policy)
    for objective in (ClippedPolicyGradient(), DiffusionNFT()):
        call = {"seed": 1, "frozen": frozen, "kl": True}
        assert objective(policy, experience, 0, **call).kl.abs().max() == 0
        moved = pixel_policy()
        with torch.no_grad():
            for weight in moved.model.parameters():
                weight.add_(0.01)
        assert (objective(moved, experience, 0, **call).kl > 0).all()
    with pytest.raises(ValueError, match="kl_beta=0"):
        DirectRewardGradient(Brightness())(policy, experience, 0, seed=1, frozen=frozen, kl=True)


def test_terms_are_the_stochastic_steps():
    """All but the last, or every second of them."""
    experience = pixel_experience(pixel_policy())
    assert tuple(ClippedPolicyGradient().terms(experience)) == (0, 1, 2)
    assert tuple(ClippedPolicyGradient(every=2).terms(experience)) == (0, 2)
    assert repeat(experience.condition, 2)["degraded"].shape[0] == 4
