"""The public check passes good rewards and names what is wrong with bad ones."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from iqareward import FullReference, NoReference, WeightedSum, check_reward
from iqareward.rewards.core import UnscoredWarning
from iqareward.testing import RewardContractError
from tests.tolerances import EXACT


def contrast(images: Tensor) -> Tensor:
    return images.var(dim=(1, 2, 3))


def error(images: Tensor, references: Tensor) -> Tensor:
    return (images - references).square().mean(dim=(1, 2, 3))


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
FLAT = IMAGES * 0.5 + 0.25


@pytest.mark.parametrize("differentiable", [False, True])
def test_good_rewards_pass(differentiable: bool) -> None:
    """A correct reward passes every check that applies, and the report reads as a list."""
    report = check_reward(
        NoReference(contrast, higher_is_better=True, differentiable=differentiable), IMAGES, degraded=FLAT
    )
    assert not report.failed
    assert [title for title, _ in report.skipped] == ["refuses a call that lacks a column it needs"]
    assert str(report).count("  ok  ") == len(report.passed)
    reward = FullReference(error, higher_is_better=False, bounds=(-1.0, 0.0), differentiable=differentiable)
    assert not check_reward(reward, IMAGES, FLAT, degraded=1 - IMAGES).failed


class Plain:
    """A reward with one fault, given by a function from images to scores."""

    name, needs_references, needs_prompts, differentiable, bounds = "plain", False, False, False, (None, None)

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        self.score = score

    def __call__(self, images, references=None, prompts=None, **ignored) -> Tensor:
        rows = [torch.as_tensor(image) for image in images]
        if not rows:
            return torch.zeros(0)
        if len({row.shape for row in rows}) > 1:
            return torch.cat([self([row]) for row in rows])
        return self.score(torch.stack(rows))


def batch_mean(images: Tensor) -> Tensor:
    return contrast(images.float().detach()) - images.float().detach().mean()


def scalar(images: Tensor) -> Tensor:
    return contrast(images.float().detach()).squeeze()


def half(images: Tensor) -> Tensor:
    return contrast(images.detach()).float()  # in whatever dtype comes in


def zero_for_broken(images: Tensor) -> Tensor:
    return contrast(images.float().detach()).nan_to_num(0.0)


def everyone_pays(images: Tensor) -> Tensor:
    return contrast(images.float().detach()) + images.float().detach().sum() * 0


def leaks_graph(images: Tensor) -> Tensor:
    return contrast(images.float())


def random_each_time(images: Tensor) -> Tensor:
    return contrast(images.float().detach()) + torch.rand(len(images))


def upside_down(images: Tensor) -> Tensor:
    return -contrast(images.float().detach())


def raises_always(images: Tensor) -> Tensor:
    raise RuntimeError("CUDA out of memory")


def no_tensor(images: Tensor) -> list[float]:
    return contrast(images.float().detach()).tolist()


def nothing(images: Tensor) -> None:
    return None


def ends_the_program(images: Tensor) -> Tensor:
    sys.exit(3)


def cancels(images: Tensor) -> Tensor:
    raise asyncio.CancelledError  # a BaseException, as SystemExit is


def raises_the_unshowable(images: Tensor) -> Tensor:
    class Unshowable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    raise Unshowable


def in_double(images: Tensor) -> Tensor:
    return contrast(images.double().detach())


def infinite(images: Tensor) -> Tensor:
    return 1 / contrast(images.float().detach())


def never_scored(images: Tensor) -> Tensor:
    return contrast(images.float().detach()) * torch.nan


def no_gradient(images: Tensor) -> Tensor:
    return contrast(images.detach()) + 0 * images.mean(dim=(1, 2, 3))


def broken_gradient(images: Tensor) -> Tensor:
    return contrast(images) + (images - images.detach()).square().sum(dim=(1, 2, 3)).sqrt()  # sqrt'(0) * 0


class Stated(Plain):
    """A reward that states something false about itself."""

    def __init__(self, **facts: object) -> None:
        super().__init__(nothing_wrong)
        vars(self).update(facts)


def nothing_wrong(images: Tensor) -> Tensor:
    return contrast(images.float().detach())


class Renamed(Stated):
    def __reduce__(self) -> object:
        return Stated, ()


class InPlace(Plain):
    def __call__(self, images, references=None, prompts=None, **ignored) -> Tensor:
        if isinstance(images, Tensor):
            images.detach().clamp_(0, 1)
        return super().__call__(images)


class InPlaceOfReferences(Plain):
    def __call__(self, images, references=None, prompts=None, **ignored) -> Tensor:
        if isinstance(references, Tensor):
            references.clamp_(0, 1)
        return super().__call__(images)


class ErasesAfterwards(Plain):
    def __call__(self, images, references=None, prompts=None, **ignored) -> Tensor:
        scores = super().__call__(images)
        if isinstance(images, Tensor):
            images.detach().zero_()
        return scores


class InPlaceOfLists(Plain):
    def __call__(self, images, references=None, prompts=None, **ignored) -> Tensor:
        if isinstance(images, list):
            images = [image.detach().clamp_(0, 1) for image in images]
        return super().__call__(images)


class OneShort(Plain):
    def __call__(self, images, references=None, prompts=None, **ignored) -> Tensor:
        return super().__call__(images)[1:]


class ListsAreOne(Plain):
    def __call__(self, images, references=None, prompts=None, **ignored) -> Tensor:
        same_size = len({image.shape for image in images}) < 2
        return super().__call__(images if same_size else images[:1])


class NeedsRows(Plain):
    def __call__(self, images, references=None, prompts=None, **ignored) -> Tensor:
        images[0]
        return super().__call__(images)


class Module(nn.Module):
    name, needs_references, needs_prompts, differentiable, bounds = "module", False, False, False, (None, None)

    def forward(self, images, references=None, prompts=None, **ignored) -> Tensor:
        return contrast(torch.stack(list(images)))


FAULTS = [
    (Module(), r"must not be an nn\.Module"),
    (Stated(name=""), "`name` must be a non-empty str, got ''"),
    (Stated(differentiable=1), "`differentiable` must be a bool, got 1"),
    (Stated(bounds=(1.0, 0.0)), r"`bounds` must be \(low, high\), each a number or None, got \(1\.0, 0\.0\)"),
    (Stated(bounds=(0.0, 1e-3)), r"lies outside the bounds \(0\.0, 0\.001\)"),
    (Stated(bounds=(1.0, None)), r"lies outside the bounds \(1\.0, None\)"),
    (Stated(needs_references=True), "a call without `references` must raise ValueError"),
    (Renamed(name="other"), "the unpickled copy of 'other' is named 'plain'"),
    (InPlace(nothing_wrong), "it wrote into `images`"),
    (InPlaceOfReferences(nothing_wrong), "it wrote into `references`"),
    (Stated(bounds=None), r"`bounds` must be \(low, high\), each a number or None, got None"),
    (Stated(bounds=(0.0, "1")), r"each a number or None, got \(0\.0, '1'\)"),
    (OneShort(nothing_wrong), r"a batch of 4 must give scores of shape \[4\], got \[3\]"),
    (ListsAreOne(nothing_wrong), r"a list of 4 must give scores of shape \[4\], got \[1\]"),
    (InPlaceOfLists(nothing_wrong), "it wrote into `images`"),
    (Plain(batch_mean), "when images are scored one at a time"),
    (Plain(scalar), r"a batch of 1 must give scores of shape \[1\], got \[\]"),
    (Plain(no_tensor), "scores must be a tensor, got list"),
    (Plain(nothing), "scores must be a tensor, got NoneType"),
    (Plain(ends_the_program), "it raised SystemExit: 3"),
    (Plain(cancels), "it raised CancelledError"),
    (Plain(raises_the_unshowable), "it raised Unshowable, whose message cannot be shown"),
    (Plain(in_double), "scores must be float32, got torch.float64"),
    (Plain(half), r"the same pixels come as torch\.bfloat16"),
    (Plain(infinite), "scores must be finite or NaN, never infinite"),
    (Plain(never_scored), "ordinary images must get finite scores"),
    (Plain(zero_for_broken), "an image with a nan pixel must score NaN, got 0.0"),
    (Plain(everyone_pays), "when another image has a nan pixel"),
    (Plain(leaks_graph), "promises no graph"),
    (NoReference(no_gradient, higher_is_better=True, differentiable=True), r"of images \[0, 1, 2, 3\] is zero"),
    (NoReference(broken_gradient, higher_is_better=True, differentiable=True), "the gradient has non-finite values"),
    (NeedsRows(nothing_wrong), r"an empty batch, \[0, 3, 16, 16\], must give shape \[0\]; it raised IndexError"),
    (Plain(upside_down), "is the sign right"),
    (Plain(raises_always), "RuntimeError: CUDA out of memory"),
]


def report_on(reward: object) -> str:
    """What `check_reward` says about a reward that it must refuse."""
    with pytest.raises(RewardContractError) as refused:
        check_reward(reward, IMAGES, 1 - IMAGES, degraded=FLAT)  # type: ignore[arg-type]
    return str(refused.value)


@pytest.mark.parametrize(("reward", "complaint"), FAULTS, ids=[complaint for _, complaint in FAULTS])
def test_faults_are_named(reward: object, complaint: str) -> None:
    """Each kind of fault appears in the error in words that tell the author what to mend."""
    assert re.search(complaint, report_on(reward))


def test_random_and_unpicklable_rewards_are_refused() -> None:
    """A reward that draws random numbers and one that holds a lambda are refused."""
    assert "from call to call" in report_on(Plain(random_each_time))
    unpicklable = NoReference(lambda images: contrast(images), higher_is_better=True, name="unpicklable")
    assert re.search("FAIL  survives pickling: .*lambda", report_on(unpicklable))


def test_python_without_assertions_finds_the_same() -> None:
    """Under `python -O` every faulty reward is refused with the same words."""
    script = "import json; from tests.test_check_reward import *; print(json.dumps([report_on(r) for r, _ in FAULTS]))"
    command = [sys.executable, "-O", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [report_on(reward) for reward, _ in FAULTS]


def test_arguments() -> None:
    """Images unfit for the check are refused before anything is scored."""
    reward = NoReference(contrast, higher_is_better=True)
    with pytest.raises(ValueError, match="B >= 3"):
        check_reward(reward, IMAGES[:2])
    with pytest.raises(ValueError, match="degraded"):
        check_reward(reward, IMAGES, degraded=FLAT[:3])
    for name, broken in {"images": (IMAGES * 2 - 1, FLAT, FLAT), "references": (IMAGES, FLAT * 255, FLAT)}.items():
        with pytest.raises(ValueError, match=f"4 of 4 {name} lie outside"):
            check_reward(FullReference(error, higher_is_better=False), *broken[:2], degraded=broken[2])
    with pytest.raises(ValueError, match=r"degraded lie outside .*to_images\(degraded, value_range=\(-1, 1\)\)"):
        check_reward(reward, IMAGES, degraded=FLAT * 4 - 2)
    with pytest.raises(ValueError, match=r"1 of 4 images have NaN"):
        check_reward(reward, torch.cat([IMAGES[:3], IMAGES[3:] * torch.nan]))
    with pytest.raises(ValueError, match=r"floating point, got torch\.uint8"):
        check_reward(reward, (IMAGES * 255).to(torch.uint8))


def test_missing_references_are_one_error() -> None:
    """A full-reference reward without references is refused by name, before anything is scored."""
    with pytest.raises(ValueError, match=r"`references`.*'error' compares with them, got None"):
        check_reward(FullReference(error, higher_is_better=False), IMAGES)


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_images_that_are_never_scored_are_refused(nested: bool, used_before: bool) -> None:
    """Too small images are an error with the reason, whether or not the reward has warned of them already."""
    reward = NoReference(contrast, higher_is_better=True, min_side=17)
    checked = WeightedSum([(1.0, reward)]) if nested else reward
    if used_before:
        with pytest.warns(UnscoredWarning):
            checked(IMAGES)
    with pytest.raises(ValueError, match="4 of 4 images have a side shorter than 17 pixels"):
        check_reward(checked, IMAGES)


class Partly:
    name, needs_prompts, differentiable, bounds = "partly", False, False, (None, None)

    @property
    def needs_references(self) -> bool:
        raise RuntimeError("not decided yet")

    def __call__(self, images, references=None, prompts=None, **ignored) -> Tensor:
        return nothing_wrong(images)


@pytest.mark.parametrize(
    ("thing", "advice"),
    [
        ("ssim", r"the string 'ssim'.*iqareward\.load\('ssim'\)"),
        (contrast, r"function contrast.*NoReference\(contrast.*FullReference\("),
        (lambda images: contrast(images), r"function <lambda>.*NoReference\(metric"),
        (nn.Conv2d(3, 1, 3), r"of type Conv2d.*NoReference\(metric"),
        (Stated, r"the class Stated.*Stated\(\.\.\.\)"),
        (None, "it is None and lacks name, needs_references"),
        (object(), "it is of type object and lacks name, needs_references"),
        (torch, "it is the module torch and lacks name"),
        (Partly(), "it raised RuntimeError: not decided yet"),
    ],
)
def test_what_is_no_reward_is_refused(thing: object, advice: str) -> None:
    """A name, a function, a class or any object is refused in one line, with the way to make a reward of it."""
    assert re.search(f"FAIL .*{advice}", report_on(thing))


def test_attributes_may_fail_in_any_way() -> None:
    """A dictionary whose attributes are its keys, as configuration libraries have them, is refused."""

    class Keys(dict[str, object]):
        def __getattr__(self, name: str) -> object:
            return self[name]

    assert "it raised KeyError: 'name'" in report_on(Keys())


def test_one_fault_is_told_once() -> None:
    """A reward that writes into its images fails for that alone, and the caller's images stay as they were."""
    before = IMAGES.clone()
    report = report_on(ErasesAfterwards(nothing_wrong))
    assert report.count("FAIL") == 1
    torch.testing.assert_close(IMAGES, before, **EXACT)
    assert report_on(Plain(no_tensor)).count("scores must be a tensor, got list") == 1


class Unloadable(Plain):
    """A reward whose weights are not here."""

    def __call__(self, images, references=None, prompts=None, **ignored) -> Tensor:
        raise OSError("the weights are not here")


def test_a_reward_that_cannot_score_is_told_once() -> None:
    """Missing weights end the test with that one reason."""
    report = report_on(Unloadable(nothing_wrong))
    assert report.count("FAIL") == 1
    assert "it raised OSError: the weights are not here" in report


class WithInputs(Plain):
    """A reward that needs inputs and prompts, and scores without them if `careless`."""

    needs_inputs = needs_prompts = True

    def __init__(self, careless: str) -> None:
        super().__init__(nothing_wrong)
        self.careless = careless

    def __call__(self, images, references=None, inputs=None, prompts=None, **ignored) -> Tensor:
        for name, column in (("inputs", inputs), ("prompts", prompts)):
            if column is None and name != self.careless:
                raise ValueError(f"{name} are missing")
        return Plain(self.score)(images)


@pytest.mark.parametrize("careless", ["inputs", "prompts"])
def test_each_missing_column_is_an_error(careless: str) -> None:
    """A reward that needs inputs or prompts must refuse a call without them."""
    assert f"a call without `{careless}` must raise ValueError" in report_on(WithInputs(careless))
    assert not check_reward(WithInputs("nothing"), IMAGES, degraded=FLAT).failed
