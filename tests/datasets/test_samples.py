"""Samples of any origin are scored in order, and an image that a reward cannot take does not stop the others."""

import builtins
import errno
import math

import numpy as np
import pytest
import torch
from PIL import Image

import iqareward
from iqareward.datasets.samples import Sample, SampleScorer
from tests.datasets.levels import SIDE, Level, png
from tests.tolerances import EXACT


class Picky(Level):
    """Refuses the levels given, alone or in a batch."""

    def __init__(self, *refused: int) -> None:
        super().__init__()
        self.refused = refused

    def __call__(self, images, references=None, prompts=None, **ignored):
        levels = super().__call__(images)
        if {*levels.tolist()} & {*self.refused}:
            raise RuntimeError("too large for this network")
        return levels


def score(samples, rewards, **options):
    scorer = SampleScorer(rewards, device="cpu", **{"batch_size": 4} | options)
    return [each for batch in scorer.score(samples) for each in batch]


def test_every_form_of_an_image_has_one_score(tmp_path):
    """The content of a file, its path, a PIL image, an array and a tensor are the same image."""
    (tmp_path / "a.png").write_bytes(png(77))
    array = np.full((SIDE, SIDE, 3), 77, dtype=np.uint8)
    forms = [png(77), tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(array), array]
    forms.append(torch.full((3, SIDE, SIDE), 77 / 255))
    found = score([Sample(form) for form in forms], [Level()])
    assert [scores for scores, _ in found] == [[77.0]] * len(forms)
    assert not any(problem for _, problem in found)


def test_an_image_that_a_reward_refuses():
    """It has no score and the reason, from other rewards it has one, and the images beside it have theirs."""
    found = score([Sample(png(level)) for level in range(9)], [Picky(5), Level(name="other")])
    for level, (scores, problem) in enumerate(found):
        assert scores[1] == level
        assert math.isnan(scores[0]) if level == 5 else scores[0] == level
        assert problem == ("level raised RuntimeError: too large for this network" if level == 5 else "")


def test_a_refused_image_in_a_batch_of_its_own():
    """Once a reward has scored others, a single image that it refuses is at fault."""
    found = score([Sample(png(level)) for level in (1, 2, 3)], [Picky(2)], batch_size=1)
    assert [math.isnan(scores[0]) for scores, _ in found] == [False, True, False]


def test_a_whole_batch_that_a_reward_refuses():
    """It is the images' fault if the reward has scored others."""
    found = score([Sample(png(level)) for level in range(12)], [Picky(4, 5, 6, 7)])
    assert [math.isnan(scores[0]) for scores, _ in found] == [False] * 4 + [True] * 4 + [False] * 4


class Infinite(Level):
    """Scores that no mean survives."""

    def __call__(self, images, references=None, prompts=None, **ignored):
        return super().__call__(images).log()  # -inf for black


def test_infinite_scores():
    """They are no scores."""
    found = score([Sample(png(level)) for level in (0, 1)], [Infinite()])
    assert math.isnan(found[0].scores[0])
    assert found[0].problem == "level: its score is infinite"
    assert found[1].scores == [0.0]


@pytest.mark.parametrize("fails", [True, False])
def test_a_disk_that_fails(tmp_path, monkeypatch, fails):
    """Where asked for, what the system says is an error and no image without a score; a missing file is one."""
    (tmp_path / "a.png").write_bytes(png(1))
    real = open

    def stale(file, *arguments, **options):
        if str(file).endswith("a.png"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(file, *arguments, **options)

    if fails:
        monkeypatch.setattr(builtins, "open", stale)
        assert "Stale" in score([Sample(tmp_path / "a.png")], [Level()])[0].problem
        with pytest.raises(OSError, match="Stale file handle"):
            score([Sample(tmp_path / "a.png")], [Level()], stops_if_store_fails=True)
    else:
        found = score([Sample(tmp_path / "b.png")], [Level()], stops_if_store_fails=True)
        assert found[0].problem == "not read: No such file or directory"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_reward_that_always_fails(batch_size):
    """If it scores nothing, the error is the caller's, and no row of missing scores hides it."""
    with pytest.raises(RuntimeError, match="too large"):
        score([Sample(png(level)) for level in range(4)], [Picky(0, 1, 2, 3)], batch_size=batch_size)


def test_what_a_sample_lacks():
    """References, inputs and prompts reach the rewards that need them; a sample without has no score of those only."""
    rewards = [iqareward.load("psnr"), Level()]
    whole, bare = Sample(png(10), png(20)), Sample(png(11), problem="references: none here")
    other = Sample(png(12), png(12, size=64))
    found = score([whole, bare, other, Sample(None), Sample(b"no image")], rewards)
    psnr = rewards[0](*(torch.full((1, 3, SIDE, SIDE), level / 255) for level in (10, 20)))
    torch.testing.assert_close(torch.tensor(found[0].scores[0]), psnr[0], **EXACT)
    assert [math.isnan(scores[0]) for scores, _ in found] == [False, True, True, True, True]
    assert [scores[1] for scores, _ in found[:3]] == [10, 11, 12]
    assert [problem for _, problem in found] == [
        "",
        "references: none here",
        "not compared: it is 32x32, its reference 64x64",
        "not read: there is no image",
        "not read: it is empty, damaged, or of a kind that is not read",
    ]
