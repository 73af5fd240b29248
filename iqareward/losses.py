"""What the weights do: two losses into one, and the forms in which other people's trainers take a weight per sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LossWeights(NamedTuple):
    """What each row's two losses are multiplied with.

    A row whose two weights are 0 should not even be computed: a NaN in its forward pass reaches the gradient of the
    model (0 * NaN is NaN), whatever is done to its loss. Take the rows of `taking_part` before the forward pass.

    Attributes:
        rl: `[B]` >= 0, detached, never NaN.
        sft: likewise.

    Example:
        >>> weights = LossWeights(rl=torch.tensor([1.0, 0.0]), sft=torch.tensor([0.5, 0.0]))
        >>> weights.taking_part
        tensor([ True, False])
        >>> weights.rows(weights.taking_part).rl  # the weights of the rows that are left
        tensor([1.])
    """

    rl: Tensor
    sft: Tensor

    @property
    def taking_part(self) -> Tensor:
        """`[B]` bool: which rows weigh anything."""
        return self.rl + self.sft > 0

    def rows(self, index: Tensor | slice) -> "LossWeights":
        """The weights of these rows."""
        return LossWeights(self.rl[index], self.sft[index])


def mix(
    share: Tensor, *, active: Tensor | None = None, valid: Tensor | None = None, additive: bool = False
) -> LossWeights:
    """Turn an RL share w into two weights, `rl = w` and `sft = 1 - w`, with SFT only where RL has no signal.

    Args:
        share: `[B]` in [0, 1].
        active: `[B]` bool; False where the input's rewards have no spread.
        valid: `[B]` bool; False where a row takes no part in the loss at all, e.g. padding.
        additive: `rl = 1` and `sft = 1 - w` instead.

    Returns:
        `LossWeights`; rows that are not valid have both weights 0.

    Example:
        >>> mix(torch.tensor([0.75, 0.75]), active=torch.tensor([True, False])).sft
        tensor([0.2500, 1.0000])
    """
    share = share if active is None else share * active
    rl, sft = share, 1 - share
    if additive:
        rl = torch.ones_like(share) if active is None else active.to(share.dtype)
    return LossWeights(rl, sft) if valid is None else LossWeights(rl * valid, sft * valid)


def mixed_loss(
    rl_loss: Tensor,
    sft_loss: Tensor,
    weights: LossWeights,
    kl: Tensor | None = None,
    *,
    beta: float = 0.0,
    sft_scale: float | Tensor = 1.0,
) -> Tensor:
    """`mean_i(rl_i * rl_loss_i + sft_scale * sft_i * sft_loss_i + beta * kl_i)`, over the rows that weigh anything.

    Args:
        rl_loss: `[B]` policy loss of each row.
        sft_loss: `[B]` supervised (diffusion) loss of each row's input against its ground truth.
        weights: from a weighter.
        kl: `[B]` divergence from the reference model.
        beta: weight of `kl`.
        sft_scale: brings the two losses to one scale, e.g. from `GradientBalance`.

    Returns:
        A scalar to minimise. A NaN loss with weight 0 does not reach its value. It does reach the gradient of the
        weights that computed it: leave such rows out of the forward pass, see `LossWeights.taking_part`.

    Raises:
        ValueError: the shapes differ, or `beta` is given without `kl`.

    Example:
        >>> weights = LossWeights(rl=torch.tensor([1.0, 0.0]), sft=torch.tensor([0.0, 1.0]))
        >>> mixed_loss(torch.tensor([3.0, float("nan")]), torch.tensor([9.0, 5.0]), weights)
        tensor(4.)
    """
    named = {"sft_loss": sft_loss, "weights.rl": weights.rl, "weights.sft": weights.sft, "kl": kl}
    for name, rows in named.items():
        if rows is not None and (rows.shape != rl_loss.shape or rl_loss.ndim != 1):
            raise ValueError(
                f"mixed_loss expected `rl_loss` [B] and `{name}` of that shape, got {list(rl_loss.shape)} and "
                f"{list(rows.shape)}. Average each row's loss over its pixels and steps, not over the batch."
            )
    if beta != 0 and kl is None:
        raise ValueError("mixed_loss expected `kl` [B] because beta is not 0, got None.")
    loss = _weighted(weights.rl, rl_loss) + sft_scale * _weighted(weights.sft, sft_loss)
    if kl is not None:
        loss = loss + beta * torch.where(weights.taking_part, kl, 0.0)
    return loss.sum() / weights.taking_part.sum().clamp(min=1)


def _weighted(weight: Tensor, loss: Tensor) -> Tensor:
    return weight * torch.where(weight > 0, loss, 0.0)


def advantage_multipliers(weights: LossWeights, *, mean_one: bool = False) -> Tensor:
    """Factors for the advantages of a trainer that has no SFT loss: the RL weights, `[B]` >= 0.

    Args:
        weights: from a weighter.
        mean_one: divide by their mean, so that the overall step keeps its size; all 0 stays 0.

    Example:
        >>> weights = LossWeights(rl=torch.tensor([0.25, 0.75]), sft=torch.tensor([0.75, 0.25]))
        >>> advantage_multipliers(weights, mean_one=True)
        tensor([0.5000, 1.5000])
    """
    return (weights.rl / weights.rl.mean()).nan_to_num(nan=0.0) if mean_one else weights.rl


def mixed_advantages(quality: Tensor, fidelity: Tensor, weights: LossWeights) -> Tensor:
    """`rl * quality + sft * fidelity`: the mixture for trainers that take advantages only, both halves learnt by RL.

    Args:
        quality: `[B]` advantages of the reward.
        fidelity: `[B]` advantages of the negative distance of each rollout to its ground truth.
        weights: from a weighter.

    Returns:
        `[B]` advantages, detached; one with weight 0 adds nothing, even if it is NaN.

    Example:
        >>> weights = LossWeights(rl=torch.tensor([0.25]), sft=torch.tensor([0.75]))
        >>> mixed_advantages(torch.tensor([1.0]), torch.tensor([-1.0]), weights)
        tensor([-0.5000])
    """
    return _weighted(weights.rl, quality.detach()) + _weighted(weights.sft, fidelity.detach())


def optimality_probability(advantages: Tensor, weights: LossWeights | None = None, *, clip: float = 5.0) -> Tensor:
    """DiffusionNFT's r in [0, 1]: `0.5 + 0.5 * rl * clamp(advantage / clip, -1, 1)`; 0.5 pulls nowhere.

    The ground truth of an input takes part as one more sample with r = 1, its loss multiplied with the SFT weight.

    Args:
        advantages: `[B]`, higher is better; one that is not finite gives 0.5.
        weights: from a weighter; without them RL is whole.
        clip: the advantage that counts as certain.

    Example:
        >>> optimality_probability(torch.tensor([-9.0, 0.0, 2.5]))
        tensor([0.0000, 0.5000, 0.7500])

    References:
        Zheng et al., DiffusionNFT: Online Diffusion Reinforcement with Forward Process, 2025,
        https://arxiv.org/abs/2509.16117 (r as in its published trainer; the factor rl is ours)
    """
    certainty = (advantages.detach() / clip).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)
    return 0.5 + 0.5 * (certainty if weights is None else weights.rl * certainty)


def drop_broken_gradients(images: Tensor) -> Tensor:
    """The same images; in the backward pass an image whose gradient is not finite gets none.

    Put it between a model and a reward: an image that the reward cannot score, or where it has no derivative, would
    make the gradient of all weights NaN. Each image's score depends on that image only, so the others lose nothing.

    Args:
        images: `[B, ...]` of the model, or one image `[3, H, W]`, with or without a graph.

    Example:
        >>> images = torch.tensor([[4.0], [0.0]], requires_grad=True)
        >>> drop_broken_gradients(images).sqrt().sum().backward()  # sqrt has no derivative at 0
        >>> images.grad
        tensor([[0.2500],
                [0.0000]])
    """
    if not images.requires_grad:
        return images
    images = images.view_as(images)  # the hook stays with this use of the images
    images.register_hook(_drop_broken)
    return images


def _drop_broken(gradient: Tensor) -> Tensor:
    rows = gradient if gradient.ndim != 3 else gradient[None]
    finite = rows.isfinite().flatten(1).all(1)
    return torch.where(finite.view(-1, *[1] * (rows.ndim - 1)), rows, 0.0).view_as(gradient)


def gradient_norm(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of the gradient of a scalar over all `parameters`; the graph stays alive for the backward pass.

    Example:
        >>> w = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> gradient_norm(0.5 * w.square().sum(), [w])
        tensor(5.)
    """
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    norms = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients if gradient is not None]
    return torch.linalg.vector_norm(torch.stack(norms))


@dataclass
class GradientBalance:
    """`sft_scale` that makes SFT pull as hard as RL: a ratio of running gradient norms, clipped.

    Losses cannot be balanced by their values: a policy loss is near 0 whatever its gradient is. In a distributed run
    average the two norms over the processes before `update`, or the scale differs between them.

    Args:
        ema: decay of the two norms per `update`.
        low: smallest scale.
        high: largest scale.

    Example:
        >>> balance = GradientBalance()
        >>> balance.update(rl_norm=torch.tensor(3.0), sft_norm=torch.tensor(2.0))
        >>> balance.sft_scale
        tensor(1.5000)
    """

    ema: float = 0.9
    low: float = 0.01
    high: float = 100.0
    rl_norm: Tensor | None = None
    sft_norm: Tensor | None = None

    @property
    def sft_scale(self) -> Tensor | float:
        """Running norm of the RL gradient over that of the SFT gradient, clipped; 1 until both were measured."""
        if self.rl_norm is None or self.sft_norm is None:
            return 1.0
        measured = (self.rl_norm > 0) & (self.sft_norm > 0)
        return torch.where(measured, self.rl_norm / self.sft_norm, 1.0).clamp(self.low, self.high)

    def update(self, *, rl_norm: Tensor, sft_norm: Tensor) -> None:
        """Take in the norms of one step's gradients, scalars from `gradient_norm`; those not finite are left out."""
        self.rl_norm = self._blend(self.rl_norm, rl_norm.detach().float())
        self.sft_norm = self._blend(self.sft_norm, sft_norm.detach().float())

    def _blend(self, old: Tensor | None, new: Tensor) -> Tensor:
        old = torch.zeros_like(new) if old is None else old  # 0: nothing measured yet
        blended = torch.where(old > 0, self.ema * old + (1 - self.ema) * new, new)
        return torch.where(new.isfinite(), blended, old)

    def state_dict(self) -> dict[str, Any]:
        """The two running norms."""
        return {"rl_norm": self.rl_norm, "sft_norm": self.sft_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict()` was taken."""
        self.rl_norm, self.sft_norm = state["rl_norm"], state["sft_norm"]


def balance_gradients(
    balance: GradientBalance, rl_loss: Tensor, sft_loss: Tensor, parameters: Sequence[Tensor]
) -> Tensor | float:
    """Measure both gradients, update `balance` with them, and return its `sft_scale`; two extra backward passes.

    Args:
        balance: the running norms.
        rl_loss: scalar.
        sft_loss: scalar.
        parameters: what the gradients are taken of; those of the last layers are enough.

    Example:
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> balance_gradients(GradientBalance(), 6 * w.sum(), 2 * w.sum(), [w])
        tensor(3.)
    """
    balance.update(rl_norm=gradient_norm(rl_loss, parameters), sft_norm=gradient_norm(sft_loss, parameters))
    return balance.sft_scale
