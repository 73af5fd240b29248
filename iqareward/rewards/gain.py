"""Rewards that compare with the degraded input, so that they need no ground truth."""

from dataclasses import replace
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from iqareward._gradients import clamp
from iqareward.rewards.calls import Call
from iqareward.rewards.combine import exact
from iqareward.rewards.core import Combined, Wrapper, check_names, numbers, refuse_groups, reward_mode, sanitize
from iqareward.types import Images, Reward, Scores, needs

# Below this fidelity the gate falls to 0 in a straight line. The published power rises from 0 with infinite slope and,
# with a poor input, to 0.7 at once: an image of something else would gain almost as much as a faithful one.
_ALMOST_UNRELATED = 0.05


@final
class InputFidelity(Wrapper):
    """A full-reference reward that compares each image with its degraded input instead of the ground truth.

    Where the sizes differ, the image is resized to its input (bicubic, antialiased). A low-resolution input says
    nothing about finer detail, so detail that the model adds is not held against it, as a comparison with the enlarged
    input would do.

    Args:
        fidelity: A full-reference reward, e.g. `load("haarpsi")`.
        name: Name of the result; by default `"<name of fidelity> to input"`.

    Raises:
        ValueError: `fidelity` does not compare with references, or needs inputs of its own.

    Example:
        >>> import torch, iqareward
        >>> images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> inputs = torch.nn.functional.interpolate(images, (16, 16), mode="bicubic", antialias=True)
        >>> iqareward.InputFidelity(iqareward.load("ssim"))(images, inputs=inputs)  # of x4 super-resolution
        tensor([1.])
    """

    def __init__(self, fidelity: Reward, *, name: str | None = None) -> None:
        super().__init__(fidelity)
        if not fidelity.needs_references or needs(fidelity, "inputs"):
            raise ValueError(
                "InputFidelity expected a full-reference reward that sees images and references only, such as "
                f"load('haarpsi'), got {fidelity.name}."
            )
        self.name, self.needs_references, self.needs_inputs = name or f"{fidelity.name} to input", False, True

    def score_call(self, call: Call) -> Scores:
        call.check(self.name)
        assert call.inputs is not None
        with reward_mode(differentiable=self.differentiable, device_type=_device_type(call)):
            images = _at_size_of(call.inputs, call.images)
        return replace(call, images=images, references=call.inputs, inputs=None).score(self.reward)


@final
class QualityGain(Combined):
    """The quality gained over the degraded input, gated by fidelity to it; the poorer the input, the looser the gate.

    `fidelity * input_quality + fidelity ** (input_quality / gamma) * gain`, where `gain = quality - input_quality`. An
    unchanged input scores its own quality, and the score never falls when quality or fidelity rises. Two differences
    from the paper make that so and close a loophole:

    - A loss (`gain < 0`) is added whole. The paper shrinks it with the gate too, so that of two images that are worse
      than their input the less faithful one can score higher.
    - The gate falls to 0 in a straight line below a fidelity of 0.05. The paper's gate is open for any picture, however
      unrelated, if the input is poor enough.

    Inputs are judged enlarged or reduced to the size of their images, because judges depend on resolution. Fidelity is
    measured at the size of the input, as `InputFidelity` does.

    Inputs cost one more call of `quality`. Rows whose input is the same memory (a list in which the rollouts of a group
    share one tensor, or an expanded batch) are judged once. Copies are not recognised, because comparing pixels would
    wait for the device: wrap `quality` in `Cached` if inputs arrive as copies.

    Args:
        quality: A no-reference reward with scores in [0, 1], e.g. `load("qalign")` or `load("niqe[calibrated]")`.
        fidelity: A full-reference reward with scores in [0, 1], e.g. `load("haarpsi[0.35, 1]")`. Its 0 must be what
            unrelated pictures reach: two photographs of different scenes have a HaarPSI of up to 0.34.
        gamma: The quality of an input whose gate is `fidelity` itself. The paper uses 7 in the units of its own judge,
            which is 0.7 if those run from 0 to 10.
        name: Name of the reward; by default made from those of the parts and `gamma`.

    Raises:
        ValueError: A reward is of the wrong kind or may leave [0, 1], or `gamma` is not positive.

    Example:
        >>> import torch, iqareward
        >>> reward = iqareward.QualityGain(iqareward.load("niqe[calibrated]"), iqareward.load("haarpsi[0.35, 1]"))
        >>> inputs = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        >>> restored = 0.5 * inputs + 0.5 * torch.nn.functional.avg_pool2d(inputs, 3, 1, 1)
        >>> scores = iqareward.evaluate(reward.parts, restored, inputs=inputs)
        >>> list(scores)
        ['niqe[calibrated]', 'niqe[calibrated] of input', 'haarpsi[0.35, 1] to input']
        >>> torch.equal(reward.combine(scores), reward(restored, inputs=inputs))
        True

    References:
        Zhao et al., "OARS: Process-Aware Online Alignment for Generative Real-World Image Super-Resolution", 2026,
        https://arxiv.org/abs/2603.12811
    """

    def __init__(self, quality: Reward, fidelity: Reward, *, gamma: float = 0.7, name: str | None = None) -> None:
        check_names("QualityGain", [quality, fidelity])
        for reward in (quality, fidelity):
            refuse_groups("QualityGain", reward)
        if quality.needs_references or needs(quality, "inputs"):
            raise ValueError(
                f"QualityGain expected `quality` as a reward that sees the images only, got {quality.name}. A "
                "full-reference reward is the second argument, `fidelity`."
            )
        for argument, reward in (("quality", quality), ("fidelity", fidelity)):
            low, high = reward.bounds
            if low is None or high is None or not 0 <= low < high <= 1:
                raise ValueError(
                    f"QualityGain expected `{argument}` with scores in [0, 1], got {reward.name} with bounds "
                    f"{reward.bounds}. Take its calibrated form, as in load('niqe[calibrated]'), or give the scores "
                    "that count as 0 and 1, as in load('psnr[15, 40]')."
                )
        (self.gamma,) = numbers("QualityGain", gamma=gamma)
        if not 0 < self.gamma < torch.inf:
            raise ValueError(f"QualityGain expected a finite `gamma` > 0 on the scale of `quality`, got {gamma}.")
        formula = f"gain({quality.name}, {fidelity.name}, gamma={exact(self.gamma)})"
        parts = [quality, _InputQuality(quality), InputFidelity(fidelity)]
        super().__init__(parts, name=name or formula, bounds=(-1.0, 1.0))
        self.differentiable = quality.differentiable and fidelity.differentiable

    def combine_rows(self, rows: Tensor) -> Scores:
        """The gated gain of each image."""
        scored = rows.isfinite().all(0)
        quality, input_quality, fidelity = clamp(torch.where(scored, rows, 0.5), 0, 1).unbind()
        gate = clamp(fidelity, _ALMOST_UNRELATED, 1) ** (input_quality / self.gamma)
        gate = gate * clamp(fidelity / _ALMOST_UNRELATED, 0, 1)
        gain = quality - input_quality
        total = fidelity * input_quality + torch.where(gain > 0, gate * gain, gain)
        return torch.where(scored, total, torch.nan)


@final
class _InputQuality(Wrapper):
    """The quality of the inputs at the size of their images, without a gradient; those that share memory count once."""

    def __init__(self, quality: Reward) -> None:
        super().__init__(quality)
        self.name, self.needs_inputs, self.differentiable = f"{quality.name} of input", True, False

    def score_call(self, call: Call) -> Scores:
        call.check(self.name)
        assert call.inputs is not None
        places: dict[object, int] = {}
        prompts = [""] * len(call) if call.prompts is None else call.prompts
        tasks = [""] * len(call) if call.tasks is None else call.tasks
        rows = zip(call.inputs, call.images, prompts, tasks, strict=True)
        order = [places.setdefault(_identity(*row), len(places)) for row in rows]
        distinct = call if len(places) == len(call) else call.rows([order.index(place) for place in range(len(places))])
        assert distinct.inputs is not None
        with reward_mode(differentiable=False, device_type=_device_type(call)):
            inputs = _at_size_of(distinct.images, distinct.inputs)
        scores = replace(distinct, images=inputs, inputs=None).score(self.reward).detach()
        if distinct is call:
            return scores
        views = scores.unbind(0)
        return torch.stack([views[place] for place in order])  # without copying an index to the device


def _identity(given: Tensor, image: Tensor, prompt: str, task: str) -> object:
    return given.data_ptr(), given.dtype, given.shape, given.stride(), image.shape, prompt, task


def _device_type(call: Call) -> str:
    return "cpu" if call.device is None else call.device.type


def _at_size_of(others: Images, images: Images) -> Images:
    """Images, each at the size of the other one in its row."""
    if isinstance(images, Tensor) and isinstance(others, Tensor):
        return _resized(images, others.shape[-2:])
    return [_resized(image[None], other.shape[-2:])[0] for image, other in zip(images, others, strict=True)]


def _resized(images: Tensor, size: torch.Size) -> Tensor:
    """Clean images of another size; NaN where an image cannot be scored, which clamping would hide."""
    if images.shape[-2:] == size:
        return images
    cleaned, valid = sanitize(images)
    resized = interpolate(cleaned, size, mode="bicubic", antialias=True)
    return torch.where(valid[:, None, None, None], clamp(resized, 0, 1), torch.nan)
