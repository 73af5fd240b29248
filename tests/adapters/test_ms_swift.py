"""The example for ms-swift, from its name on the command line to the advantages."""

import importlib
import io
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import iqareward
from iqareward.groups import group_statistics
from tests.adapters.doubles import ms_swift as double
from tests.adapters.restoration_agent import as_pil, photographs

pytestmark = pytest.mark.trainer("ms-swift", "006938b", "caller", "reader", "configuration")
WORDS = ["brighten", "darken", "nothing", "brighten brighten", "darken darken", "brighten", "blur", "darken"]
GROUPS = torch.arange(8) // 4


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch):
    """The file as `--external_plugins` loads it, and the registry that it fills."""
    rewards = SimpleNamespace(orms={})
    monkeypatch.setitem(sys.modules, "swift", SimpleNamespace(rewards=rewards))
    monkeypatch.setitem(sys.modules, "swift.rewards", rewards)
    from examples.adapters import ms_swift

    return importlib.reload(ms_swift), rewards.orms


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    """Two inputs under the same text, four completions each; their images as a path and as bytes."""
    found = []
    for number, image in enumerate(photographs(2, side=32)):
        as_pil(image).save(tmp_path / f"clean{number}.png")
        as_pil(image * 0.7).save(tmp_path / f"degraded{number}.png")
        path = tmp_path / f"degraded{number}.png"
        given = {"bytes": path.read_bytes(), "path": None} if number else {"bytes": None, "path": str(path)}
        found += [{"messages": "restore", "images": [given], "clean": str(tmp_path / f"clean{number}.png")}] * 4
    return found


def direct(rows, completions) -> torch.Tensor:
    """The library's own scores; 0 where no operation is named."""
    scores = []
    for row, text in zip(rows, completions, strict=True):
        given = row["images"][0]
        image = iqareward.to_images(opened(given))
        factors = [{"brighten": 1.25, "darken": 0.8}[word] for word in text.split() if word in ("brighten", "darken")]
        for factor in factors:
            image = (image * factor).clamp(0, 1)
        clean = iqareward.to_images(opened({"bytes": None, "path": row["clean"]}))
        scores.append(iqareward.load("0.7*ssim + 0.3*haarpsi")(image, references=clean).item() if factors else 0.0)
    return torch.tensor(scores)


def opened(given) -> Image.Image:
    return Image.open(io.BytesIO(given["bytes"]) if given["bytes"] else given["path"]).convert("RGB")


@pytest.mark.parametrize("scale", ["group", "batch", "none", "gdpo", "old gdpo"])
def test_the_advantages_are_those_of_the_reward(plugin, rows, scale) -> None:
    """The name selects the class, and the trainer learns from the library's own scores."""
    _, orms = plugin
    rewards = double.score(double.chosen(orms, ["image_quality"]), rows, WORDS)
    wanted = direct(rows, WORDS)
    torch.testing.assert_close(rewards[:, 0], wanted, rtol=1e-5, atol=1e-6)
    found = double.advantages(rewards, torch.ones(1), 4, scale)
    assert torch.equal(found.sign(), (wanted - group_statistics(wanted, GROUPS).mean).sign())


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize("scale", ["group", "batch", "none", "gdpo", "old gdpo"])
def test_unscored_images_have_no_advantage(plugin, rows, scale, monkeypatch) -> None:
    """Their reward is the mean of the same input's others, and the other advantages keep their signs."""
    module, orms = plugin
    monkeypatch.setitem(module.OPERATIONS, "blur", lambda image: image * torch.nan)
    rewards = double.score(double.chosen(orms, ["image_quality"]), rows, WORDS)
    assert rewards.isfinite().all()
    found = double.advantages(rewards, torch.ones(1), 4, scale)
    torch.testing.assert_close(found[6], torch.tensor(0.0), rtol=0, atol=1e-4)
    assert (found[[4, 5, 7]].abs() > 1e-3).all()


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_what_none_would_do(plugin, rows, monkeypatch) -> None:
    """Why None is not passed on: it counts as the worst score of its group, or ends the learning of the batch."""
    module, _ = plugin
    monkeypatch.setitem(module.OPERATIONS, "blur", lambda image: image * torch.nan)

    def plain(completions, clean, **columns):
        return module.REWARD(completions, clean=[module.opened(path) for path in clean], **columns)

    rewards = double.score([plain], rows, WORDS)
    assert double.advantages(rewards, torch.ones(1), 4, "group")[6] < -1
    assert double.advantages(rewards, torch.ones(1), 4, "old gdpo").isnan().all()


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_mistakes_are_explained(plugin, rows, monkeypatch) -> None:
    """A name without its file, and a batch without any score."""
    module, orms = plugin
    with pytest.raises(ValueError, match="not implemented"):
        double.chosen({}, ["image_quality"])
    for word in ("brighten", "darken"):
        monkeypatch.setitem(module.OPERATIONS, word, lambda image: image * torch.nan)
    with pytest.raises(ValueError, match="could not score any of 2 images"):
        double.score(double.chosen(orms, ["image_quality"]), rows[:2], WORDS[:2])
