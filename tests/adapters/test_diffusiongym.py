"""The examples for diffusiongym: its `valid` mask is our NaN, in Flow-GRPO, DiffusionNFT and the release."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import iqareward
from examples.adapters.diffusiongym import IQAEvaluator, IQAReward
from iqareward import NoReference
from tests.adapters.doubles import diffusiongym as double
from tests.adapters.doubles.pages import DOCS, execute, package
from tests.adapters.restoration_agent import photographs
from tests.tolerances import NETWORK_BATCH, OTHER_PACKAGE

pytestmark = [
    pytest.mark.trainer("diffusiongym", "2.0, 85391c0", "caller", "reader", "gradients"),
    pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning"),
]
IMAGES = photographs(6, side=32)


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


@pytest.fixture(autouse=True)
def successor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The successor is importable."""
    package(monkeypatch, **double.modules())


def test_scores_of_both_forms() -> None:
    """Rewards and the mask arrive, with references from the conditioning."""
    conditioning = {"clean": IMAGES.flip(0), "prompt": ["a"] * 6}
    expected = iqareward.load("ssim")(IMAGES, references=IMAGES.flip(0))
    batch = double.evaluate_terminal(IQAEvaluator("ssim", references="clean"), IMAGES, conditioning)
    torch.testing.assert_close(batch.rewards, expected, **NETWORK_BATCH)
    assert batch.valid.all()
    costs = double.release_costs(IQAReward("ssim", references="clean"), IMAGES, conditioning, reward_scale=2.0)
    torch.testing.assert_close(costs, -2 * expected.expand(2, 6), **NETWORK_BATCH)
    with pytest.raises(ValueError, match="IQAReward expected `references`"):
        IQAReward("ssim")
    with pytest.raises(ValueError, match=r"expected conditioning 'clean', got \['cfg_scale', 'prompt'\]"):
        double.release_costs(IQAReward("ssim", references="clean"), IMAGES, {"prompt": ["a"] * 6, "cfg_scale": 7.5})


def test_images_without_a_score_are_not_valid() -> None:
    """They get no advantage and an r of 0.5, and the others of their group are compared among themselves."""
    images = IMAGES.clone()
    images[1] = torch.nan
    batch = double.evaluate_terminal(IQAEvaluator(NoReference(brightness, higher_is_better=True)), images, {})
    assert batch.valid.tolist() == [True, False, True, True, True, True]
    mean = brightness(IMAGES[[0, 2, 3, 4, 5]]).mean().item()
    gradient, metrics = double.train(batch, group_size=3)
    assert metrics == pytest.approx({"r_mean": mean, "valid_frac": 5 / 6})
    first = brightness(IMAGES[[0, 2]])
    assert gradient[1] == 0
    torch.testing.assert_close(gradient[[0, 2]], (first.mean() - first) / (first.std() + 1e-4), **OTHER_PACKAGE)
    probability = double.nft_probability(batch)
    assert probability.isfinite().all()
    assert probability[1] == pytest.approx(0.5, abs=1e-5)
    with_nan = double.RewardBatch(batch.rewards.where(batch.valid, torch.nan), batch.valid)
    assert double.train(with_nan, group_size=3)[0][:3].isnan().any()  # why the mask alone is not enough
    with pytest.raises(ValueError, match="could not score any of 6 images"):
        double.evaluate_terminal(IQAEvaluator("piqe"), IMAGES * torch.nan, {})


@pytest.mark.trainer("diffusiongym", "2.0, 85391c0", "weights")
def test_recipe() -> None:
    """The page's loop gives each sample's policy loss its RL weight, and its supervised loss its SFT weight."""
    text = (DOCS / "how-to/adaptive-in-your-trainer.md").read_text()
    text = text.partition("\n## diffusiongym\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    clean = torch.eye(4)
    latent = clean + torch.tensor([0.1, 0.1, 0.8, 0.8])[:, None]  # the second input is far from its ground truth
    batch = double.RewardBatch(torch.tensor([1.0, 3.0, 2.0, 6.0]))
    algorithm = double.FlowGRPO(2, (latent, batch))
    policy = nn.Parameter(torch.zeros(4))
    policies, optimizer = SimpleNamespace(train=policy), torch.optim.SGD([policy], lr=0.0)
    context = SimpleNamespace(environment=double.FlowEnvironment(), policies=policies, optimizer=optimizer)
    scope = {"algorithm": algorithm, "context": context, "dynamics": None, "time_grid": None}
    execute(code, {**scope, "batches": [({}, double.DDTensor(clean))]})
    share = algorithm.gradients / double.train(batch, group_size=2)[0]
    assert share[0] == share[1] < 0.5 < share[2] == share[3]
    # row i is the only one with a ground truth in component i, so component i holds the gradient of its loss
    torch.testing.assert_close(policy.grad, (1 - share) * 2 / 4 / 4, **OTHER_PACKAGE)
