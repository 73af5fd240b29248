"""The example for NeMo RL's research/flow_grpo, in its registry, its reward workers and its advantages."""

import importlib
import sys

import pytest
import torch
import yaml

import iqareward
from iqareward.types import Reward
from tests.adapters.doubles import nemo_rl as double
from tests.adapters.doubles.pages import package
from tests.adapters.restoration_agent import photographs
from tests.tolerances import NETWORK_BATCH, OTHER_PACKAGE

pytestmark = pytest.mark.trainer(
    "NeMo RL flow_grpo", "30bd89f", "caller", "reader", "configuration", "processes", "gradients"
)
EXAMPLE = "examples.adapters.nemo_rl"
IMAGES, PROMPTS = photographs(4, side=32), ["a", "a", "b", "b"]


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch):
    """The project is importable, and the example is imported as its run script would."""
    project = double.Project()
    package(monkeypatch, **project.modules())
    project.example = importlib.import_module(EXAMPLE)
    yield project
    sys.modules.pop(EXAMPLE)


def test_scores_become_advantages(project: double.Project) -> None:
    """Shards of images are scored in worker processes, weighted, logged, and compared among the images of a prompt."""
    metadata = [{"gt": image} for image in IMAGES.flip(0)]
    settings = {"name": "iqareward", "weight": 0.5, "reward": "ssim", "references": "gt"}
    rewards, metrics = project.environment([settings], replicas=3).score_images(IMAGES, PROMPTS, metadata)
    expected = iqareward.load("ssim")(IMAGES, references=IMAGES.flip(0))
    torch.testing.assert_close(rewards, 0.5 * expected, **NETWORK_BATCH)
    assert metrics["reward/iqareward/score_mean"] == pytest.approx(expected.mean().item(), rel=1e-4)
    scores = 0.5 * expected.view(2, 2)
    wanted = -2 * (scores - scores.mean(1, keepdim=True)).flatten() / (scores.std() + 1e-4)
    torch.testing.assert_close(double.policy_gradient(rewards, PROMPTS), wanted, **OTHER_PACKAGE)


def test_yaml_of_the_example(project: double.Project, qalign: Reward) -> None:
    """The settings that the file shows build a plugin, whose scores are logged under the name that it gives."""
    text = project.example.__doc__.partition("env:")
    (entry,) = yaml.safe_load(text[1] + text[2].partition("\n\n")[0])["env"]["image_reward"]["plugins"]
    metadata = [{"gt_path": image} for image in IMAGES.flip(0)]
    rewards, metrics = project.environment([{**entry, "device": "cpu"}]).score_images(IMAGES, PROMPTS, metadata)
    expected = 0.7 * qalign(IMAGES) + 0.3 * iqareward.load("ssim")(IMAGES, references=IMAGES.flip(0))
    torch.testing.assert_close(rewards, expected, **NETWORK_BATCH)
    (logged,) = metrics
    assert logged in project.example.__doc__
    with pytest.raises(ValueError, match="Duplicate image reward plugin"):
        project.environment([entry, entry])


def test_what_it_refuses(project: double.Project) -> None:
    """One NaN would make every advantage of the batch NaN, so an image without a score is an error."""
    assert double.policy_gradient(torch.tensor([1.0, torch.nan, 2.0, 3.0]), PROMPTS).isnan().all()
    images = IMAGES.clone()
    images[1] = torch.nan
    with pytest.raises(ValueError, match="piqe could not score every image"):
        project.environment([{"name": "iqareward", "reward": "piqe"}]).score_images(images, PROMPTS, [{}] * 4)
    with pytest.raises(ValueError, match="IQAReward expected `references`"):
        project.environment([{"name": "iqareward", "reward": "ssim"}])
