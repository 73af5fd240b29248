"""UniRL: subclasses for both shapes of its requests, the capability it asks for by method, and its reward service."""

import pickle
import re
import sys
from importlib.util import spec_from_loader
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

import iqareward
from iqareward import NoReference
from iqareward.adapters import unirl
from tests.adapters.doubles import unirl as double
from tests.adapters.doubles.pages import DOCS, execute, package
from tests.tolerances import NETWORK_BATCH, OTHER_PACKAGE

pytestmark = pytest.mark.trainer("UniRL", "0104a7e, 0e713d6", "caller", "reader", "configuration")
SERVICE = pytest.mark.trainer("UniRL reward service", "dc8c785", "caller", "reader", "configuration")


@pytest.fixture(params=[False, True], ids=["june", "september"])
def new(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """UniRL of June or September 2026 is importable."""
    package(monkeypatch, **double.modules(new=request.param))
    return request.param


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch):
    """The reward service is importable, and our scorer is registered as the page says."""
    running = double.Service()
    package(monkeypatch, **running.modules())
    running.scorer_modules["iqareward"] = "reward_service.scorers.iqa"
    code = re.search(
        r"^```python\n(from reward_service.*?)^```$", (DOCS / "reference/adapters.md").read_text(), re.M | re.S
    )

    class Finder:
        @staticmethod
        def find_spec(name, path, target=None):
            if name == "reward_service.scorers.iqa":
                return spec_from_loader(name, SimpleNamespace(create_module=lambda spec: None, exec_module=load))

    def load(module):
        execute(code[1], vars(module))

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    yield running
    sys.modules.pop("reward_service.scorers.iqa", None)


def photos(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def backend(kind: str = "IQARewardBackend", **settings):
    return getattr(unirl, kind)(config=unirl.IQASpec(**settings), base_device="cuda")


def test_scores_of_either_request(new: bool) -> None:
    """Pixels are read as tensors, references from the conditioning image or the metadata."""
    images, degraded = photos(3), photos(3, seed=1)
    call = double.request(images, ["a"] * 3, degraded, [{"gt": image} for image in degraded], new=new)
    expected = iqareward.load("ssim")(images, references=degraded)
    for references in ("conditioning", "gt"):
        rewards = double.score_and_attach(backend(reward="ssim", references=references), call, new=new)
        torch.testing.assert_close(rewards, expected, **NETWORK_BATCH)
    without = double.request(images, ["a"] * 3, None, None, new=new)
    with pytest.raises(ValueError, match="expected `conditioning` for every sample, got none"):
        double.score_and_attach(backend(reward="ssim", references="conditioning"), without, new=new)
    with pytest.raises(ValueError, match="'gt' in the metadata of every sample, got none"):
        double.score_and_attach(backend(reward="ssim", references="gt"), without, new=new)


def test_prompts_where_they_are_needed(new: bool) -> None:
    """A reward that reads prompts gets them from either request; another never asks for them."""

    class Length:
        name, needs_references, needs_prompts, differentiable, bounds = "length", False, True, False, (0.0, None)

        def __call__(self, images, references=None, prompts=None, **ignored):
            return torch.tensor([float(len(prompt)) for prompt in prompts])

    call = double.request(photos(2), ["a", "abc"], None, None, new=new)
    assert double.score_and_attach(backend(reward=Length()), call, new=new).tolist() == [1.0, 3.0]
    call.generation_prompt, call.prompts = None, None
    assert len(double.score_and_attach(backend(reward="piqe"), call, new=new)) == 2


def test_an_image_without_a_score(new: bool) -> None:
    """By default the step stops, with the name of the image; NaN stops it in June, and gives no advantage since."""
    images = photos(4)
    images[2] = torch.nan
    call = double.request(images, ["a"] * 4, None, None, new=new)
    with pytest.raises(ValueError, match=r"piqe could not score images \[2\] of 4"):
        double.score_and_attach(backend(reward="piqe"), call, new=new)
    unscored = backend(reward="piqe", on_nan="nan")
    if new:
        gradient = double.DiffusionTrainer(unscored, call, branch=4).train_step()
        scores = iqareward.load("piqe")(images[[0, 1, 3]])
        expected = (scores.mean() - scores) / scores.std(correction=0)
        torch.testing.assert_close(gradient[[0, 1, 3]], expected, **NETWORK_BATCH)
        assert gradient[2] == 0
    else:
        with pytest.raises(RuntimeError, match="flagged a sample as failure"):
            double.score_and_attach(unscored, call, new=new)
    assert double.score_and_attach(backend(reward="piqe", on_nan=-100.0), call, new=new)[2] == -100.0
    with pytest.raises(ValueError, match="IQARewardBackend expected on_nan"):
        backend(reward="piqe", on_nan="zero")


@pytest.mark.trainer("UniRL", "0104a7e, 0e713d6", "gradients", "weights")
def test_weights(new: bool) -> None:
    """The page's trainer multiplies each row's gradient by its RL weight."""
    text = (DOCS / "how-to/adaptive-in-your-trainer.md").read_text().partition("\n## UniRL\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    scope: dict = {}
    execute(code, scope)
    call = double.request(photos(4), ["a"] * 4, None, [{"difficulty": d} for d in (0.1, 0.1, 0.6, 0.6)], new=new)
    plain, weighted = (
        cls(backend(reward="piqe"), call, branch=2).train_step()
        for cls in (double.DiffusionTrainer, scope["AdaptiveTrainer"])
    )
    share = weighted / plain
    torch.testing.assert_close(share[0::2], share[1::2], **OTHER_PACKAGE)
    assert share[0] < 0.5 < share[2]


@pytest.mark.trainer("UniRL", "0104a7e, 0e713d6", "gradients")
def test_differentiable_by_method(new: bool) -> None:
    """UniRL looks for a method, so only the class that has gradients has it, and it refuses a reward without."""
    images = photos(2).requires_grad_()
    reward = NoReference(brightness, higher_is_better=True, differentiable=True)
    double.refl_step(backend("IQADifferentiableBackend", reward=reward), images, ["a", "b"])
    torch.testing.assert_close(images.grad, torch.full_like(images, -1 / images.numel()), **OTHER_PACKAGE)
    images, clean = photos(2).requires_grad_(), photos(2, seed=1)
    judge = backend("IQADifferentiableBackend", reward="ssim", references="gt")
    double.refl_step(judge, images, ["a", "b"], [{"gt": image} for image in clean])
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0
    call = double.request(images, ["a"] * 2, None, [{"gt": c} for c in clean], new=new)
    assert len(double.score_and_attach(judge, call, new=new)) == 2
    assert not isinstance(backend(reward="piqe"), double.DifferentiableReward)
    with pytest.raises(TypeError, match="not a DifferentiableReward"):
        double.refl_step(backend(reward="piqe"), images, ["a", "b"])
    with pytest.raises(ValueError, match="piqe has no useful gradient"):
        backend("IQADifferentiableBackend", reward="piqe")
    with pytest.raises(ValueError, match="expected a differentiable reward, got 'brightness'"):
        backend("IQADifferentiableBackend", reward=NoReference(brightness, higher_is_better=True))
    with pytest.raises(ValueError, match="expected `references` and `inputs` to be keys of the metadata"):
        backend("IQADifferentiableBackend", reward="ssim", references="conditioning")


def test_weights_leave_the_device_when_told(new: bool) -> None:
    """`offload` and `onload` reach every part of a reward that has weights, through sums and wrappers."""
    moves = []

    class Heavy:
        name, needs_references, needs_prompts, differentiable, bounds = "heavy", False, False, False, (0.0, 1.0)

        def __call__(self, images, references=None, prompts=None, **ignored):
            return brightness(images)

        def offload(self):
            moves.append("off")

        def onload(self):
            moves.append("on")

    mixed = iqareward.WeightedSum([(1.0, Heavy()), (0.0, iqareward.load("piqe"))])
    judge = backend(reward=iqareward.FidelityFloor(mixed, iqareward.load("psnr"), floor=20.0, low=0.0), references="gt")
    judge.offload()
    judge.onload()
    assert moves == ["off", "on"]


def test_settings_can_be_sent(new: bool) -> None:
    """The settings are UniRL's kind of settings, and are pickled by name."""
    settings = unirl.IQASpec(reward="ssim", references="conditioning")
    assert isinstance(settings, double.BaseRewardComponentSpec)
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_without_unirl() -> None:
    """Other names are an AttributeError, and a missing UniRL an ImportError that says where it comes from."""
    for name in ("IQARewardBackend", "IQASpec", "IQAScorer"):
        with pytest.raises(ImportError, match="Tencent-Hunyuan/UniRL"):
            getattr(unirl, name)
    with pytest.raises(AttributeError, match="no attribute 'IQA'"):
        unirl.IQA  # noqa: B018


def rounded(images: Tensor) -> Tensor:
    return (images * 255).round() / 255


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy())


@SERVICE
def test_service(service: double.Service) -> None:
    """Items become one sub-metric each, from the last turn, against the first turn or the metadata."""
    images, sources = photos(3), photos(3, seed=1)
    items = [
        double.ScoreItem([("edit", pil(source)), ("edit", pil(image))], {"gt": pil(source)})
        for image, source in zip(images, sources)
    ]
    expected = iqareward.load("ssim")(rounded(images), references=rounded(sources))
    for references in ("history", "gt"):
        results = service.score("iqareward", {"reward": "ssim", "references": references}, items)
        torch.testing.assert_close(torch.tensor([one["score"] for one in results]), expected, **NETWORK_BATCH)
    assert service.score("iqareward", {"reward": "piqe"}, []) == []
    with pytest.raises(ValueError, match="expected `history` for every sample, got none"):
        service.score(
            "iqareward", {"reward": "ssim", "references": "history"}, [double.ScoreItem(items[0].history[1:])]
        )


@SERVICE
@pytest.mark.parametrize("reward", ["ssim", "piqe", "0.5*ssim + 0.5*haarpsi"])
def test_service_starts_with_any_reward(service: double.Service, reward: str) -> None:
    """References come from each request; what is scored at the start needs none of them."""
    assert service.actor("iqareward", {"reward": reward, "references": "gt"}).sub_metric_names == ("score",)


@SERVICE
def test_service_loads_before_the_first_request(service: double.Service) -> None:
    """Weights are loaded by the constructor, for which the service waits, and not while a request's time runs out."""
    loaded = []

    class Lazy:
        name, needs_references, needs_prompts, differentiable, bounds = "lazy", False, False, False, (0.0, 1.0)

        def __call__(self, images, references=None, prompts=None, **ignored):
            loaded.append(len(images))
            return brightness(images)

    service.actor("iqareward", {"reward": Lazy()})
    assert loaded == [1]


@SERVICE
def test_service_imports_what_its_table_names(service: double.Service) -> None:
    """Without an entry in SCORER_MODULES the actor does not know the scorer, whoever else has imported it."""
    del service.scorer_modules["iqareward"]
    with pytest.raises(KeyError, match="unknown scorer: iqareward"):
        service.score("iqareward", {"reward": "piqe"}, [])


@SERVICE
@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_service_scores_for_unirl(service: double.Service) -> None:
    """As PNG the images arrive as they are; as JPEG, UniRL's default, the reward scores the codec too."""
    images, degraded = photos(3), photos(3, seed=1)
    call = double.request(images, ["a"] * 3, degraded, None, new=True)
    for params in ({"reward": "piqe"}, {"reward": "ssim", "references": "history"}):
        references = {} if params["reward"] == "piqe" else {"references": rounded(degraded)}
        expected = iqareward.load(params["reward"])(rounded(images), **references)
        scores = double.score_and_attach(service.backend("iqareward", params, "PNG"), call, new=True)
        torch.testing.assert_close(scores, expected, **NETWORK_BATCH)
        lossy = double.score_and_attach(service.backend("iqareward", params), call, new=True)
        assert (lossy - expected).abs().min() > 1e-3
    tiny = double.request(photos(3)[..., :4, :4], ["a"] * 3, None, None, new=True)
    with pytest.raises(RuntimeError, match="flagged a sample as failure"):
        double.score_and_attach(service.backend("iqareward", {"reward": "piqe"}, "PNG"), tiny, new=True)


@SERVICE
def test_service_marks_what_it_cannot_score(service: double.Service) -> None:
    """A turn without an image, or one too small, is NaN for that item alone; a policy may say otherwise."""
    items = [
        double.ScoreItem([("", pil(photos(1)[0]))]),
        double.ScoreItem([("", None)]),
        double.ScoreItem([("", Image.new("RGB", (4, 4)))]),
    ]
    scores = torch.tensor([one["score"] for one in service.score("iqareward", {"reward": "piqe"}, items)])
    assert scores.isnan().tolist() == [False, True, True]
    with pytest.raises(ValueError, match=r"piqe could not score images \[1, 2\] of 3"):
        service.score("iqareward", {"reward": "piqe", "on_nan": "raise"}, items)
