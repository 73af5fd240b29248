"""Combine RL and SFT losses with per-sample weights, which can follow from how hard each input still is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from iqareward.groups import check_ids, check_rows, is_distributed
from iqareward.types import Groups

Direction: TypeAlias = Literal["hard_to_rl", "hard_to_sft"]
"""Hard inputs get more RL ("hard_to_rl"), or more SFT ("hard_to_sft", as in training recipes for language models)."""

_SMALLEST_DIFFICULTY = 1e-6  # so that every logarithm exists
_SMALLEST_SPREAD = 0.05  # so that noise does not tell equally hard inputs apart


class LossWeights(NamedTuple):
    """The RL weight and the SFT weight of each row.

    Leave rows whose two weights are 0 out of the forward pass, with `taking_part`. A NaN in their forward pass reaches
    the gradient of the model whatever the weight of their loss is, because 0 * NaN is NaN.

    Attributes:
        rl: `[B]` >= 0, detached, never NaN.
        sft: `[B]` >= 0, detached, never NaN.

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
        """`[B]` bool: whether a row has any weight."""
        return self.rl + self.sft > 0

    def rows(self, index: Tensor | slice) -> "LossWeights":
        """Select rows."""
        return LossWeights(self.rl[index], self.sft[index])


def mix(
    share: Tensor, *, has_signal: Tensor | None = None, valid: Tensor | None = None, additive: bool = False
) -> LossWeights:
    """Turn an RL share w into `rl = w` and `sft = 1 - w`, or into `rl = 1` and `sft = 1 - w` if `additive`."""
    share = share if has_signal is None else share * has_signal
    rl, sft = share, 1 - share
    if additive:
        rl = torch.ones_like(share) if has_signal is None else has_signal.to(share.dtype)
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
    """Average `rl_i * rl_loss_i + sft_scale * sft_i * sft_loss_i + beta * kl_i` over the rows that have any weight.

    Args:
        rl_loss: `[B]` policy loss of each row.
        sft_loss: `[B]` supervised (diffusion) loss of each row's input against its ground truth.
        weights: RL and SFT weight of each row, from a weighter.
        kl: `[B]` divergence from the reference model.
        beta: weight of `kl`.
        sft_scale: brings the two losses to one scale, e.g. from `GradientBalance`.

    Returns:
        A scalar to minimise. A NaN loss with weight 0 does not reach its value, but does reach the gradient of the
        model that computed it: see `LossWeights`.

    Raises:
        ValueError: the shapes differ, or `beta` is given without `kl`.
        TypeError: a loss is not a tensor, or `weights` are not `LossWeights`.

    Example:
        >>> weights = LossWeights(rl=torch.tensor([1.0, 0.0]), sft=torch.tensor([0.0, 1.0]))
        >>> mixed_loss(torch.tensor([3.0, float("nan")]), torch.tensor([9.0, 5.0]), weights)
        tensor(4.)
    """
    _check_weights("mixed_loss", weights)
    for name, loss in (("rl_loss", rl_loss), ("sft_loss", sft_loss)):
        if not isinstance(loss, Tensor):
            raise TypeError(f"mixed_loss expected `{name}` as a tensor [B], got {type(loss).__name__}.")
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


def _check_weights(who: str, weights: LossWeights) -> None:
    if not isinstance(weights, LossWeights):
        raise TypeError(
            f"{who} expected `weights` as LossWeights, which a weighter returns, got {type(weights).__name__}. From "
            "tensors: LossWeights(rl=..., sft=...)."
        )


def _weighted(weight: Tensor, loss: Tensor) -> Tensor:
    return weight * torch.where(weight > 0, loss, 0.0)


def weighted_advantages(advantages: Tensor, weights: LossWeights) -> Tensor:
    """Multiply each row's advantages by its RL weight, for trainers that have no supervised loss.

    Args:
        advantages: `[B]` or `[B, ...]`, e.g. one per timestep.
        weights: from a weighter, for the same rows in the same order.

    Returns:
        The product, with the shape, dtype and device of `advantages`.

    Raises:
        ValueError: the number of rows differs.

    Example:
        >>> weights = LossWeights(rl=torch.tensor([1.0, 0.5]), sft=torch.tensor([0.0, 0.5]))
        >>> weighted_advantages(torch.ones(2, 3), weights).sum(1)
        tensor([3.0000, 1.5000])
    """
    _check_weights("weighted_advantages", weights)
    if advantages.ndim == 0 or advantages.shape[0] != weights.rl.shape[0]:
        raise ValueError(
            f"weighted_advantages expected one weight per row of `advantages` {list(advantages.shape)}, "
            f"got {weights.rl.shape[0]}. Compute the weights from the same rows, in the same order."
        )
    rl = weights.rl.to(advantages.device, advantages.dtype)
    return advantages * rl.view(-1, *[1] * (advantages.ndim - 1))


def mixed_advantages(quality: Tensor, fidelity: Tensor, weights: LossWeights) -> Tensor:
    """Compute `rl * quality + sft * fidelity`, for trainers that take advantages only and learn both parts by RL.

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
    """Turn advantages into DiffusionNFT's r in [0, 1]: `0.5 + 0.5 * rl * clamp(advantage / clip, -1, 1)`.

    The ground truth of an input takes part as one more sample with r = 1, its loss multiplied by the SFT weight.

    Args:
        advantages: `[B]`, higher is better; one that is not finite gives 0.5, which pulls in neither direction.
        weights: from a weighter; every RL weight is 1 without them.
        clip: the advantage that counts as certain.

    Returns:
        `[B]` in [0, 1], detached, higher = better.

    Example:
        >>> optimality_probability(torch.tensor([-9.0, 0.0, 2.5]))
        tensor([0.0000, 0.5000, 0.7500])

    References:
        Zheng et al., DiffusionNFT: Online Diffusion Reinforcement with Forward Process, 2025,
        https://arxiv.org/abs/2509.16117 (r as in its published trainer; the factor rl is ours)
    """
    certainty = (advantages.detach() / clip).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(-1, 1)
    return 0.5 + 0.5 * (certainty if weights is None else weights.rl * certainty)


@dataclass(eq=False)
class AdaptiveWeighter:
    """Weigh RL and SFT by difficulty: RL for inputs that are still hard, SFT for those near their ground truth.

    With l = log(difficulty), the RL share of a sample is

        w = low + (high - low) * sigmoid(steepness * (l - m0) / s0)

    The anchor, mean m0 and standard deviation s0 of l before RL, is frozen by `calibrate`. A sample's weight therefore
    depends on its own difficulty only, and falls as the model improves. This is the mechanism that arXiv 2511.01645
    states; the formula is ours, because the paper's is not publicly readable.

    Args:
        steepness: slope of the sigmoid; 0 gives every row the same weight, a large value a hard gate at m0.
        output_range: (low, high) of w, within [0, 1]; rows whose difficulty is NaN, infinite or negative get `low`.
        direction: "hard_to_rl", or "hard_to_sft" (the sigmoid falls), which is common for language models.
        mode: "additive" (rl = 1, sft = 1 - w: SFT joins RL as samples come near) or "convex" (rl = w, sft = 1 - w).
        num_bins: number of anchors, e.g. one per bin of timesteps; each row then names its bin.
        calibrate_on_first: calibrate on the first batch instead of raising.

    Raises:
        ValueError: an option is out of its range.

    Example:
        >>> weighter = AdaptiveWeighter()
        >>> weighter.calibrate(torch.tensor([0.05, 0.1, 0.2]))
        >>> weighter(torch.tensor([0.05, 0.1, 0.2])).sft
        tensor([0.8808, 0.5000, 0.1192])

    References:
        Xu et al., Enhancing Diffusion-based Restoration Models via Difficulty-Adaptive Reinforcement Learning with IQA
        Reward, 2025, https://arxiv.org/abs/2511.01645 (mechanism, not formula)
    """

    steepness: float = 2.0
    output_range: tuple[float, float] = (0.0, 1.0)
    direction: Direction = "hard_to_rl"
    mode: Literal["additive", "convex"] = "additive"
    num_bins: int = 1
    calibrate_on_first: bool = False

    signal: Literal["difficulty"] = field(default="difficulty", init=False, repr=False)

    # Centre m0 and slope +-steepness / s0 of the sigmoid, each [num_bins] in fp32; replaced, never written into.
    _anchor: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        low, high = self.output_range
        requirements = {
            "steepness in [0, inf)": 0 <= self.steepness < float("inf"),
            "output_range (low, high) with 0 <= low <= high <= 1": 0 <= low <= high <= 1,
            "direction 'hard_to_rl' or 'hard_to_sft'": self.direction in ("hard_to_rl", "hard_to_sft"),
            "mode 'convex' or 'additive'": self.mode in ("convex", "additive"),
            "num_bins >= 1": self.num_bins >= 1,
        }
        for requirement, met in requirements.items():
            if not met:
                option = requirement.split()[0]
                raise ValueError(f"AdaptiveWeighter expected {requirement}, got {getattr(self, option)!r}.")

    def __call__(
        self,
        difficulty: Tensor,
        *,
        bins: Groups | None = None,
        has_signal: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> LossWeights:
        """Compute the two weights of each row, without waiting for the device.

        Args:
            difficulty: `[B]` >= 0, larger = harder, the same for all rollouts of an input (see `iqareward.difficulty`).
            bins: `[B]` integers in [0, num_bins). On a device, where checking them would wait for it, a row out of
                range counts as one whose difficulty is NaN.
            has_signal: `[B]` bool; False (the rewards of the input have no spread) gives SFT only.
            valid: `[B]` bool; False gives weight 0 to both losses, e.g. for padding.

        Returns:
            `LossWeights` of `[B]` in fp32. In convex mode they sum to 1 in every valid row.

        Raises:
            RuntimeError: `calibrate` was not called.
            ValueError: a bin on the CPU is out of range.
        """
        if self._anchor is None:
            if not self.calibrate_on_first:
                raise RuntimeError(
                    "AdaptiveWeighter expected calibrate(difficulty) before its first use, because it measures against "
                    "the model before RL. Call it once with difficulties of that model, or build the weighter with "
                    "calibrate_on_first=True to take the first batch."
                )
            self.calibrate(difficulty, bins)
        logs, place = self._log(difficulty, bins)
        share = self._share(logs, place).nan_to_num(nan=self.output_range[0])
        return mix(share, has_signal=has_signal, valid=valid, additive=self.mode == "additive")

    def calibrate(self, difficulty: Tensor, bins: Groups | None = None) -> None:
        """Take the difficulties of the model before RL as the anchor; the more inputs, the better.

        In a distributed run every process calls it with its own rows, and all get the same anchor.

        Args:
            difficulty: `[N]` >= 0; rows that are not finite are left out.
            bins: `[N]` integers in [0, num_bins).

        Raises:
            ValueError: difficulties are negative, or a bin has fewer than two of them.
        """
        logs, place = self._log(difficulty, bins)
        ones = logs * 0 + 1  # NaN where the logarithm is
        count, total, negative = self._sums(torch.stack([ones, logs, (difficulty < 0).to(logs.dtype)]), place)
        if negative.max().item() > 0:
            raise ValueError(
                "AdaptiveWeighter.calibrate expected `difficulty` >= 0 with larger = harder, got negative values. "
                "Make a distance of a score first, e.g. with iqareward.difficulty.reference_distance(..., best=1.0)."
            )
        if count.min().item() < 2:
            got = [int(n) for n in count.tolist()]
            raise ValueError(
                f"AdaptiveWeighter.calibrate expected two finite difficulties per bin, got {got}. Pass more rows."
            )
        mean = total / count
        offset = logs - (mean if place is None else mean[place])  # squares of the logarithms would drown the variance
        std = (self._sums(offset.square()[None], place)[0] / (count - 1)).sqrt().clamp(min=_SMALLEST_SPREAD)
        self._anchor = mean, (self.steepness if self.direction == "hard_to_rl" else -self.steepness) / std

    def update(self, difficulty: Tensor, bins: Groups | None = None) -> None:
        """Do nothing, because the anchor is frozen; trainers call it after each step, and other weighters learn."""

    def state_dict(self) -> dict[str, Any]:
        """Return the options and the anchor `[2, num_bins]`: centre (in log-difficulty) and slope of the sigmoid."""
        config = {option.name: getattr(self, option.name) for option in fields(self) if option.init}
        return {"config": config, "anchor": self._anchor and torch.stack(self._anchor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict()` was taken; ValueError if that weighter had other options."""
        own = self.state_dict()["config"]
        if own != state["config"]:
            raise ValueError(
                f"AdaptiveWeighter expected the state of a weighter with options {own}, got {state['config']}. "
                "Build one with AdaptiveWeighter(**state['config']) first."
            )
        anchor = state["anchor"]
        self._anchor = None if anchor is None else (anchor[0].float(), anchor[1].float())

    def _log(self, difficulty: Tensor, bins: Groups | None) -> tuple[Tensor, Tensor | None]:
        """Log-difficulty in fp32, NaN where the difficulty is NaN, infinite or negative; and the bins, checked."""
        difficulty = check_rows("AdaptiveWeighter", difficulty)
        if bins is None and self.num_bins > 1:
            raise ValueError(
                f"AdaptiveWeighter expected `bins`, integers [B] in [0, {self.num_bins}), got None. "
                "Name each row's bin, or build the weighter with num_bins=1."
            )
        # The logarithm before fp32, where 1e300 would be infinite.
        smallest = math.log(_SMALLEST_DIFFICULTY)
        logs = difficulty.log().clamp(min=smallest).nan_to_num(nan=torch.nan, posinf=torch.nan).float()
        if bins is None:
            return logs, None
        place = check_ids("AdaptiveWeighter", bins, difficulty, size=self.num_bins)
        outside = place == self.num_bins
        return torch.where(outside, torch.nan, logs), torch.where(outside, 0, place)

    def _share(self, logs: Tensor, place: Tensor | None) -> Tensor:
        assert self._anchor is not None, "calibrated before"
        if self._anchor[0].device != logs.device:
            self._anchor = self._anchor[0].to(logs.device), self._anchor[1].to(logs.device)
        centre, slope = self._anchor if place is None else (values[place] for values in self._anchor)
        low, high = self.output_range
        share = torch.sigmoid((logs - centre) * slope)
        return share if (low, high) == (0, 1) else low + (high - low) * share

    def _sums(self, columns: Tensor, place: Tensor | None) -> Tensor:
        """Sums `[columns, num_bins]` of the rows that are not NaN, over all processes."""
        columns = columns.nan_to_num(nan=0.0)
        if place is None:
            sums = columns.sum(1, keepdim=True)
        else:
            sums = columns.new_zeros(len(columns), self.num_bins).index_add_(1, place, columns)
        if is_distributed():
            dist.all_reduce(sums)
        return sums


def gradient_norm(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Measure the Euclidean norm of a loss's gradient, for `GradientBalance`; the graph stays usable.

    Args:
        loss: scalar with a graph.
        parameters: tensors that the gradient is taken of; those of the last layers are enough for a balance.

    Returns:
        A scalar >= 0 in fp32.

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
    """Scale the SFT loss so that its gradient is as large as that of RL, from a ratio of running gradient norms.

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
        """Average in the norms of one step's gradients, scalars from `gradient_norm`; those not finite are ignored."""
        self.rl_norm = self._blend(self.rl_norm, rl_norm.detach().float())
        self.sft_norm = self._blend(self.sft_norm, sft_norm.detach().float())

    def state_dict(self) -> dict[str, Any]:
        """Return the two running norms."""
        return {"rl_norm": self.rl_norm, "sft_norm": self.sft_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict()` was taken."""
        self.rl_norm, self.sft_norm = state["rl_norm"], state["sft_norm"]

    def _blend(self, old: Tensor | None, new: Tensor) -> Tensor:
        old = torch.zeros_like(new) if old is None else old  # 0: nothing measured yet
        blended = torch.where(old > 0, self.ema * old + (1 - self.ema) * new, new)
        return torch.where(new.isfinite(), blended, old)
