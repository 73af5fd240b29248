"""Judges that have not seen what they judge."""

import contextlib

import pytest
import torch

import iqareward
from iqareward.demo.experiment import one_thread
from iqareward.demo.held_out import FITTED_ON, held_out
from iqareward.demo.photographs import PHOTOGRAPHS, load_photograph
from iqareward.functional.natural_model import packaged_model

pytest.importorskip("skimage", reason="the photographs come with scikit-image")


def test_niqe_is_fitted_without_the_judged_photograph() -> None:
    """It keeps its name and direction, finds the photograph less natural than before, and other rewards stay."""
    ssim, niqe = iqareward.load("ssim"), iqareward.load("niqe")
    same, other = held_out((ssim, niqe), "rocket")
    assert same is ssim
    assert (other.name, other.needs_references, other.bounds) == (niqe.name, niqe.needs_references, niqe.bounds)
    photo = load_photograph("rocket", 384)[None]
    assert other(photo) < niqe(photo)


def test_the_package_was_fitted_on_these_photographs() -> None:
    """A model of all five is the packaged one, so leaving one out leaves out what the package has seen."""
    assert {photograph.name for photograph in PHOTOGRAPHS} < set(FITTED_ON)
    (refitted,) = held_out((iqareward.load("niqe"),), "none of them")
    model = refitted.metric.keywords["model"]
    packaged = packaged_model(torch.device("cpu"))
    torch.testing.assert_close(model.mean, packaged.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.covariance, packaged.covariance, rtol=1e-5, atol=1e-6)


def test_one_thread_gives_the_others_back() -> None:
    """Also when the work fails."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with contextlib.suppress(KeyError), one_thread():
            inside = torch.get_num_threads()
            raise KeyError
        assert (inside, torch.get_num_threads()) == (1, 2)
    finally:
        torch.set_num_threads(before)
