"""How much of each sample's training is RL and how much is SFT, from how hard its input still is.

Implements the stated mechanism of arXiv 2511.01645 (RL where samples are far from the ground truth, SFT as they come
near, an automatic weight per sample in between); the formula is ours, because the paper's is not publicly readable.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from iqareward.groups import check_ids, check_rows, is_distributed
from iqareward.types import Groups

HISTORY_LENGTH = 4096


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


def weighted_advantages(advantages: Tensor, weights: LossWeights) -> Tensor:
    """Multiply each row's advantages with its RL weight, for trainers that have no supervised loss.

    Args:
        advantages: `[B]` or `[B, ...]`, e.g. one per timestep.
        weights: From a weighter, for the same B rows in the same order.

    Returns:
        The product in the shape, dtype and device of `advantages`.

    Raises:
        ValueError: The number of rows differs.

    Example:
        >>> weights = LossWeights(rl=torch.tensor([1.0, 0.5]), sft=torch.tensor([0.0, 0.5]))
        >>> weighted_advantages(torch.ones(2, 3), weights).sum(1)
        tensor([3.0000, 1.5000])
    """
    if advantages.ndim == 0 or advantages.shape[0] != weights.rl.shape[0]:
        raise ValueError(
            f"weighted_advantages expected one weight per row of `advantages` {list(advantages.shape)}, "
            f"got {weights.rl.shape[0]}. Compute the weights from the same rows, in the same order."
        )
    rl = weights.rl.to(advantages.device, advantages.dtype)
    return advantages * rl.view(-1, *[1] * (advantages.ndim - 1))


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


@dataclass(eq=False)
class AdaptiveWeighter:
    """RL for inputs that are hard and SFT for those near their ground truth, in units of the SFT model's own spread.

    For a difficulty d, l = log max(d, floor), and the share of RL is

        w = w_min + (w_max - w_min) * sigmoid(+-kappa * (l - tau) / sig)
        tau = rho * m0 + (1 - rho) * m        sig = max(rho * s0 + (1 - rho) * s, s_min)

    (m0, s0) are mean and standard deviation of l before RL, frozen by `calibrate`; (m, s) follow training. With rho = 1
    a sample's weight depends on its own difficulty only and falls as the model improves; with rho = 0 half of the
    samples are "hard" for ever. Implements the stated mechanism of arXiv 2511.01645; the formula is ours.

    Args:
        kappa: steepness; 0 gives all rows the same weight, a large one a hard gate at tau.
        rho: share of the frozen anchor in centre and scale, in [0, 1].
        w_min: RL share of the easiest rows, and of rows whose difficulty is NaN, infinite or negative.
        w_max: RL share of the hardest rows.
        direction: "hard_to_rl", or "hard_to_sft", the habit of recipes for language models.
        mode: "additive" (rl = 1, sft = 1 - w: SFT joins RL as samples come near) or "convex" (rl = w, sft = 1 - w).
        floor: smallest difficulty told apart, so that its logarithm exists.
        s_min: smallest scale, so that noise does not tell equally hard rows apart.
        ema: decay of (m, s) per optimiser step.
        num_buckets: number of separate statistics, e.g. bins of the timestep; each row then names its `bucket`.
        calibrate_on_first: calibrate on the first batch seen instead of raising; always so if rho = 0.

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

    kappa: float = 2.0
    rho: float = 1.0
    w_min: float = 0.0
    w_max: float = 1.0
    direction: Literal["hard_to_rl", "hard_to_sft"] = "hard_to_rl"
    mode: Literal["additive", "convex"] = "additive"
    floor: float = 1e-6
    s_min: float = 0.05
    ema: float = 0.98
    num_buckets: int = 1
    calibrate_on_first: bool = False

    signal: Literal["difficulty"] = field(default="difficulty", init=False, repr=False)

    # m0, s0^2, m, s^2, each [num_buckets] and fp32, whoever calls first; replaced, never written into.
    _statistics: tuple[Tensor, ...] | None = field(default=None, init=False, repr=False)
    # Centre and slope of the sigmoid per bucket; follows from the statistics.
    _line: tuple[Tensor, Tensor] = field(init=False, repr=False)
    _history: deque[tuple[Tensor, Tensor]] = field(
        default_factory=lambda: deque(maxlen=HISTORY_LENGTH), init=False, repr=False
    )

    def __post_init__(self) -> None:
        requirements = {
            "kappa in [0, inf)": 0 <= self.kappa < float("inf"),
            "rho in [0, 1]": 0 <= self.rho <= 1,
            "0 <= w_min <= w_max <= 1": 0 <= self.w_min <= self.w_max <= 1,
            "direction 'hard_to_rl' or 'hard_to_sft'": self.direction in ("hard_to_rl", "hard_to_sft"),
            "mode 'convex' or 'additive'": self.mode in ("convex", "additive"),
            "floor > 0 and s_min > 0": self.floor > 0 and self.s_min > 0,
            "ema in [0, 1)": 0 <= self.ema < 1,
            "num_buckets >= 1": self.num_buckets >= 1,
        }
        for requirement, met in requirements.items():
            if not met:
                raise ValueError(f"AdaptiveWeighter expected {requirement}, got {self}. Change that option.")

    def __call__(
        self,
        difficulty: Tensor,
        *,
        bucket: Groups | None = None,
        active: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> LossWeights:
        """The two weights of each row; waits for no device and learns nothing from the rows.

        Args:
            difficulty: `[B]` >= 0, larger = harder, the same for all rollouts of an input (see `iqareward.difficulty`).
            bucket: `[B]` integers in [0, num_buckets). On a device, where a check would wait for it, a row out of range
                counts as one whose difficulty is NaN.
            active: `[B]` bool; False (the input's rewards have no spread) gives SFT only.
            valid: `[B]` bool; False gives 0 for both.

        Returns:
            `LossWeights` of `[B]`, fp32 whatever the difficulty is; in convex mode they sum to 1 in every valid row.

        Raises:
            RuntimeError: `calibrate` was not called.
            ValueError: a bucket on the CPU is out of range.
        """
        share = self._share(*self._start(difficulty, bucket)).nan_to_num(nan=self.w_min)
        return mix(share, active=active, valid=valid, additive=self.mode == "additive")

    def calibrate(self, difficulty: Tensor, bucket: Groups | None = None) -> None:
        """Take the difficulties of the model before RL, over as many inputs as you can afford, as the anchor.

        In a distributed run every process calls it with its own rows, and all get the same anchor.

        Args:
            difficulty: `[N]` >= 0; rows that are not finite are left out.
            bucket: `[N]` integers in [0, num_buckets).

        Raises:
            ValueError: difficulties are negative, or a bucket has fewer than two of them.
        """
        log_difficulty, place = self._log(difficulty, bucket)
        negative = (difficulty < 0).to(log_difficulty.dtype)
        zero = log_difficulty.new_zeros(self.num_buckets)
        count, first, _, negatives = self._sums(log_difficulty, place, zero, negative)
        if negatives.max().item() > 0:
            raise ValueError(
                "AdaptiveWeighter.calibrate expected `difficulty` >= 0 with larger = harder, got negative values. "
                "Turn a score around first, e.g. with iqareward.difficulty.reference_distance(..., best=1.0)."
            )
        if count.min().item() < 2:
            got = [int(n) for n in count.tolist()]
            raise ValueError(
                f"AdaptiveWeighter.calibrate expected two finite difficulties per bucket, got {got}. Pass more rows."
            )
        mean = first / count
        var = self._sums(log_difficulty, place, mean, negative)[2] / (count - 1)
        self._follow((mean, var, mean, var))
        self._history.clear()

    def update(self, difficulty: Tensor, bucket: Groups | None = None) -> None:
        """Let the running statistics follow; once per optimiser step, by every process, after the step's weights."""
        log_difficulty, place = self._start(difficulty, bucket)
        assert self._statistics is not None, "_start calibrates or raises"
        mean0, var0, mean, var = self._statistics
        sums = self._sums(log_difficulty, place, mean, self._share(log_difficulty, place))
        # The variance of a mixture of old and new, so that batches of one row are as good as large ones.
        seen, shift, square, _ = (sums / sums[0].clamp(min=1)).unbind()
        gain = (1 - self.ema) * seen  # 0 in buckets without a row
        step = gain * shift
        new_var = torch.lerp(var, square, gain).addcmul(step, step, value=-1).clamp(min=0)  # rounding, if ema is 0
        self._statistics = (mean0, var0, mean + step, new_var)
        if self.rho < 1:  # otherwise the line depends on the frozen half only
            self._follow(self._statistics)
        self._history.append((mean, sums))

    @property
    def history(self) -> dict[str, list[float]]:
        """Per update (the last 4096): geometric mean of the difficulty and mean share w, of rows with a difficulty."""
        if not self._history:
            return {"difficulty": [], "rl_share": []}
        mean, sums = (torch.stack(rows) for rows in zip(*self._history, strict=True))
        count = sums[:, 0].sum(-1)
        difficulty = ((mean * sums[:, 0] + sums[:, 1]).sum(-1) / count).exp()
        return {"difficulty": difficulty.tolist(), "rl_share": (sums[:, 3].sum(-1) / count).tolist()}

    def state_dict(self) -> dict[str, Any]:
        """Configuration and statistics; without `history`, which only shows."""
        config = {option.name: getattr(self, option.name) for option in fields(self) if option.init}
        return {"config": config, "statistics": self._statistics and torch.stack(self._statistics)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict()` was taken; ValueError if that weighter had other options."""
        own = self.state_dict()["config"]
        if own != state["config"]:
            raise ValueError(
                f"AdaptiveWeighter expected the state of a weighter with options {own}, got {state['config']}. "
                "Build one with AdaptiveWeighter(**state['config']) first."
            )
        self._statistics = None
        if state["statistics"] is not None:
            self._follow(state["statistics"].float().unbind())

    def _log(self, difficulty: Tensor, bucket: Groups | None) -> tuple[Tensor, Tensor | None]:
        """Log-difficulty in fp32, NaN where the difficulty is NaN, infinite or negative; and the buckets, checked."""
        difficulty = check_rows("AdaptiveWeighter", difficulty)
        if bucket is None and self.num_buckets > 1:
            raise ValueError(
                f"AdaptiveWeighter expected `bucket`, integers [B] in [0, {self.num_buckets}), got None. "
                "Name each row's bucket, or build the weighter with num_buckets=1."
            )
        # The logarithm before fp32, where 1e300 would be infinite.
        logs = difficulty.log().clamp(min=math.log(self.floor)).nan_to_num(nan=torch.nan, posinf=torch.nan).float()
        if bucket is None:
            return logs, None
        place = check_ids("AdaptiveWeighter", bucket, difficulty, size=self.num_buckets)
        outside = place == self.num_buckets
        return torch.where(outside, torch.nan, logs), torch.where(outside, 0, place)

    def _start(self, difficulty: Tensor, bucket: Groups | None) -> tuple[Tensor, Tensor | None]:
        """`_log`, with the statistics ready and on its device."""
        if self._statistics is None:
            if self.rho > 0 and not self.calibrate_on_first:
                raise RuntimeError(
                    "AdaptiveWeighter expected calibrate(difficulty) before its first use, because rho > 0 measures "
                    "against the model before RL. Call it once with difficulties of that model, or build the weighter "
                    "with calibrate_on_first=True to take the first batch."
                )
            self.calibrate(difficulty, bucket)
        if self._statistics is not None and self._statistics[0].device != difficulty.device:
            self._follow(tuple(rows.to(difficulty.device) for rows in self._statistics))
        return self._log(difficulty, bucket)

    def _follow(self, statistics: tuple[Tensor, ...]) -> None:
        mean0, var0, mean, var = statistics
        centre = self.rho * mean0 + (1 - self.rho) * mean
        scale = (self.rho * var0.sqrt() + (1 - self.rho) * var.sqrt()).clamp(min=self.s_min)
        slope = (self.kappa if self.direction == "hard_to_rl" else -self.kappa) / scale
        self._statistics, self._line = statistics, (centre, slope)

    def _share(self, log_difficulty: Tensor, bucket: Tensor | None) -> Tensor:
        centre, slope = self._line if bucket is None else (row[bucket] for row in self._line)
        share = torch.sigmoid((log_difficulty - centre) * slope)
        return share if (self.w_min, self.w_max) == (0, 1) else self.w_min + (self.w_max - self.w_min) * share

    def _sums(self, log_difficulty: Tensor, bucket: Tensor | None, pivot: Tensor, extra: Tensor) -> Tensor:
        """Per bucket, over all processes: number, sum and squares of `log - pivot`, and sum of `extra`, without NaN.

        Differences to a pivot near the mean, because squares of large logarithms would drown a small variance.
        """
        offset = log_difficulty - (pivot if bucket is None else pivot[bucket])
        columns = torch.stack([offset * 0 + 1, offset, offset.square(), extra]).nan_to_num(nan=0.0)
        if bucket is None:
            sums = columns.sum(1, keepdim=True)
        else:
            sums = columns.new_zeros(4, self.num_buckets).index_add_(1, bucket, columns)
        if is_distributed():
            dist.all_reduce(sums)
        return sums


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
