"""Is this object a reward? One public check of the whole contract, for our rewards and for yours."""

import warnings
from dataclasses import dataclass, field

from torch import Tensor

from iqareward import _contract_checks as checks
from iqareward.rewards.scoring import UnscoredWarning, why_unscored
from iqareward.types import Reward

MIN_IMAGES = 3


class RewardContractError(AssertionError):
    """A reward breaks the contract; the message lists every failure."""


@dataclass(frozen=True)
class Report:
    """What `check_reward` tried and found; `str(report)` is a readable list."""

    reward: str
    passed: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.reward}: {len(self.passed)} passed, {len(self.failed)} failed, {len(self.skipped)} skipped"]
        lines += [f"  ok    {title}" for title in self.passed]
        lines += [f"  skip  {title}: {reason}" for title, reason in self.skipped]
        for index, (title, reason) in enumerate(self.failed):
            known = reason in (earlier for _, earlier in self.failed[:index])
            lines.append(f"  FAIL  {title}: {'the same' if known else reason}")
        return "\n".join(lines)


def check_reward(
    reward: Reward,
    images: Tensor,
    references: Tensor | None = None,
    *,
    degraded: Tensor | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> Report:
    """Test a reward against the whole contract of this library, and say everything that is wrong with it.

    Checked: facts and type; shape, dtype and device of scores, also for one image, none, and mixed sizes; bounds;
    unknown keywords; untouched inputs; the same score alone, in a batch, in another order, in half precision, in
    another memory layout, twice, from threads under foreign autocast and grad modes, and after pickling; a graph
    exactly when `differentiable`; non-finite pixels cost one image its score and no other; missing references are an
    error; and, with `degraded`, the direction.

    Args:
        reward: any object; what is no reward fails.
        images: `[B, 3, H, W]` float in [0, 1], B >= 3, large enough for the reward to score each of them.
        references: `[B, 3, H, W]`, needed if the reward needs them; different from `images`.
        degraded: `[B, 3, H, W]`, visibly worse versions of `images`; most of them must score lower.
        rtol: how far a network's score may move with its batch, relative.
        atol: the same, absolute.

    Returns:
        A report to print.

    Raises:
        RewardContractError: with all failures, also for what is no reward at all: the name of one, a class, a metric
            that is not wrapped.
        ValueError: the images are not fit for the check, the reward scores none of them, or it needs references and
            there are none.

    Example:
        >>> import torch
        >>> from iqareward.functional import psnr
        >>> from iqareward.rewards.metric import FullReference
        >>> rng = torch.Generator().manual_seed(0)
        >>> references = torch.rand(3, 3, 32, 32, generator=rng) * 0.5 + 0.25
        >>> images = references + 0.01 * torch.randn(3, 3, 32, 32, generator=rng)
        >>> report = check_reward(FullReference(psnr, higher_is_better=True), images, references)
        >>> report.failed
        []
    """
    _check_images(images, references, degraded)
    name = str(checks.fact(reward, "name", "")) or str(checks.fact(reward, "__name__", "")) or type(reward).__name__
    report = Report(name)
    if problem := checks.why_no_reward(reward):
        report.failed.append(("is a reward", problem))
        raise RewardContractError(str(report))
    if references is None and checks.fact(reward, "needs_references", False):
        raise ValueError(
            f"check_reward expected `references`, because {report.reward!r} compares with them, got None. Pass the "
            "undamaged versions of `images`."
        )
    case = checks.Case(reward, images.detach(), references, degraded, {"rtol": rtol, "atol": atol, "equal_nan": True})
    for title, check, only_given in checks.ALL:
        try:
            with warnings.catch_warnings():  # the other checks score batches that have no score on purpose
                warnings.simplefilter("error" if only_given else "ignore", UnscoredWarning)
                reason = check(case)
        except UnscoredWarning as unscored:
            raise ValueError(f"check_reward expected images that the reward scores, but {unscored}") from unscored
        except AssertionError as unmet:
            report.failed.append((title, str(unmet) or "AssertionError"))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # also SystemExit and asyncio.CancelledError
            report.failed.append((title, checks.raised(error)))
        else:
            if reason is None:
                report.passed.append(title)
            else:
                report.skipped.append((title, reason))
    if report.failed:
        raise RewardContractError(str(report))
    return report


def _check_images(images: Tensor, references: Tensor | None, degraded: Tensor | None) -> None:
    """Refuse images that no reward could be checked on."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or images.shape[0] < MIN_IMAGES:
        raise ValueError(f"check_reward expected `images` as a tensor [B, 3, H, W] with B >= {MIN_IMAGES}.")
    for name, batch in {"images": images, "references": references, "degraded": degraded}.items():
        if batch is None:
            continue
        if batch.shape != images.shape:
            raise ValueError(
                f"check_reward expected `{name}` of shape {list(images.shape)} like `images`, got {list(batch.shape)}."
            )
        if not batch.is_floating_point():
            raise ValueError(
                f"check_reward expected `{name}` in floating point, got {batch.dtype}. Convert them with "
                f"iqareward.to_images({name}, value_range=(black, white))."
            )
    reasons = "; ".join(why_unscored(images, references=references, degraded=degraded))
    if reasons:
        raise ValueError(f"check_reward expected images that a reward can score, but {reasons}.")
