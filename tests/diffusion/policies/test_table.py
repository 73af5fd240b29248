"""Every kind of model in `examples/policies`: short, true to its own sampler, and it trains in each way."""

import pytest

from benchmarks import policies
from tests.diffusion.policies.kinds import KINDS, parity

pytestmark = [
    # what diffusers and transformers say of tiny tokenizers, float64 copies and schedulers of older pipelines
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
EVERY = pytest.mark.parametrize("kind", KINDS)


@EVERY
def test_the_file_is_short(kind):
    """A user's file has under 40 lines of code and needs no private name."""
    assert policies.lines(kind) < 40
    assert policies.hacks(kind) == 0


@EVERY
def test_restores_as_its_own_sampler(kind):
    """Images of the policy's sampler are those of the pipeline, the network, or the paper's equations in float64."""
    assert parity(kind) < 1e-4


@EVERY
def test_the_first_ratio_is_one(kind):
    """Rollouts replayed with the weights that sampled them have exactly the same log-probabilities."""
    assert policies.ratio_error(kind) == 0


@EVERY
def test_objectives_train(kind, tmp_path):
    """Gradients are finite, losses and weights move."""
    for objective in policies.objectives_of(kind):
        assert policies.trains(kind, objective, tmp_path / objective), objective


@EVERY
def test_resumes(kind, tmp_path):
    """A run that was resumed ends in the same weights, to the bit."""
    assert policies.resumes(kind, tmp_path) == 0


@EVERY
def test_validation_is_drawn(kind, tmp_path):
    """Whatever the sizes of degraded and restored images."""
    assert policies.draws_grid(kind, tmp_path)


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Between the weights of one process and of two that share the inputs, for each kind."""
    return policies.two_processes(list(KINDS), tmp_path_factory.mktemp("processes"))


@pytest.mark.slow
@EVERY
def test_two_processes_do_what_one_does(kind, differences):
    """Inputs shared by two processes lead to the same weights up to rounding."""
    assert differences[kind] < 1e-5
