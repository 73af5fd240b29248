"""Best-of-N with real pipelines: the best wins, whatever the batches, and what was not scored never does."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

import iqareward
from iqareward.adapters.best_of import generate_best
from iqareward.rewards.fidelity import FidelityFloor
from iqareward.rewards.metric import NoReference
from tests.adapters.restoration_agent import as_pil
from tests.adapters.tiny_pipelines import flow, img2img, prompt
from tests.diffusion.tiny import images
from tests.tolerances import NETWORK_BATCH

TRUTH = images(3, seed=1)


def brightness(batch: Tensor) -> Tensor:
    """A stand-in for a judge."""
    return batch.mean((1, 2, 3))


JUDGE = NoReference(brightness, higher_is_better=True)


def restore(image, generator, output_type, strength=0.5, **more) -> SimpleNamespace:
    """Stands for a pipeline: noise of each row's generator, mixed into the image."""
    assert output_type == "pt"
    assert len(generator) == len(image)
    pixels = iqareward.to_images(image, value_range=(0, 1))
    noise = torch.stack([torch.rand(row.shape, generator=g) for row, g in zip(pixels, generator, strict=True)])
    return SimpleNamespace(images=(1 - strength) * pixels + strength * noise)


def best(pipeline=restore, reward=JUDGE, inputs=None, **options):
    """Four candidates of each of three inputs."""
    inputs = {"image": images(3)} if inputs is None else inputs
    return generate_best(pipeline, reward, inputs, **{"num_candidates": 4, "show_progress": False} | options)


@pytest.mark.parametrize("kind", ["Stable Diffusion", "Stable Diffusion 3"])
def test_best_of_real_pipelines(kind) -> None:
    """Of the candidates of a real pipeline the one with the highest score comes back, whatever the batch size."""
    if kind == "Stable Diffusion":
        pipeline = img2img(diffusers.DDIMScheduler(clip_sample=False, steps_offset=1))
    else:
        pipeline = flow(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    inputs = {"image": images(3), **prompt(3, pooled=kind == "Stable Diffusion 3")}
    options = {"strength": 0.9, "num_inference_steps": 3, "guidance_scale": 1.0}
    alone, together = (best(pipeline, JUDGE, inputs, batch_size=size, **options) for size in (1, 5))
    assert alone.scores.shape == (3, 4)
    assert alone.scores.unique().numel() == 12
    assert torch.equal(alone.chosen, alone.scores.argmax(1))
    torch.testing.assert_close(JUDGE(alone.images), alone.scores.amax(1))
    torch.testing.assert_close(together.scores, alone.scores, **NETWORK_BATCH)
    torch.testing.assert_close(torch.stack(together.images), torch.stack(alone.images), rtol=0, atol=1e-3)


def test_candidates_have_seeds_of_their_own() -> None:
    """More candidates leave the first ones as they are; another seed changes all of them."""
    four, two, other = best(), best(num_candidates=2), best(seed=1)
    assert torch.equal(four.scores[:, :2], two.scores)
    assert not torch.isclose(four.scores, other.scores).any()
    assert torch.equal(best().scores, four.scores)


def test_unscored_candidates_never_win() -> None:
    """A NaN loses against any number; where all are NaN nothing is chosen, and the first candidate comes back."""

    class Fussy:
        name, needs_references, needs_prompts, differentiable, bounds = "fussy", False, False, False, (None, None)
        calls = 0

        def __call__(self, batch, references=None, prompts=None, **ignored) -> Tensor:
            scores = -brightness(torch.stack(list(batch)))
            keep = [(self.calls + row) % 4 in (1, 2) and self.calls + row < 8 for row in range(len(batch))]
            self.calls += len(batch)
            return torch.where(torch.tensor(keep), scores, torch.nan)

    found = best(reward=Fussy(), batch_size=3)
    assert found.scores.isnan().tolist() == [[True, False, False, True]] * 2 + [[True] * 4]
    expected = [1 + int(row.argmax()) for row in found.scores[:2, 1:3]]
    assert found.chosen.tolist() == [*expected, -1]
    first = best(num_candidates=1)
    assert torch.equal(found.images[2], first.images[2])


def test_inputs_of_different_sizes_never_share_a_batch() -> None:
    """Batches are as large as they may be within one size, and each image keeps its own."""
    seen = []

    def watched(image: list[Image.Image], **call) -> SimpleNamespace:
        seen.append([one.size for one in image])
        return restore(image, **call)

    photographs = images(3)
    pictures = [as_pil(photographs[0]), as_pil(photographs[1]), as_pil(photographs[2, :, :8])]
    found = best(watched, inputs={"image": pictures}, batch_size=5)
    assert [len(sizes) for sizes in seen] == [5, 3, 4]
    assert all(len(set(sizes)) == 1 for sizes in seen)
    assert [tuple(image.shape) for image in found.images] == [(3, 16, 16), (3, 16, 16), (3, 8, 16)]
    torch.testing.assert_close(JUDGE(found.images), found.scores.amax(1))


def test_references_and_prompts_follow_their_input() -> None:
    """Every candidate is compared with the ground truth of its own input."""
    found = best(reward="psnr", references=TRUTH, batch_size=5)
    torch.testing.assert_close(found.scores.amax(1), iqareward.load("psnr")(found.images, references=list(TRUTH)))
    guarded = FidelityFloor(JUDGE, iqareward.load("psnr"), floor=5.0, low=0.0)
    assert best(reward=guarded, references=TRUTH).scores.shape == (3, 4)

    class Longest:
        name, needs_references, needs_prompts, differentiable, bounds = "longest", False, True, False, (0.0, None)

        def __call__(self, batch, references=None, prompts=(), **ignored) -> Tensor:
            return torch.tensor([float(len(text)) for text in prompts])

    texts = {"image": images(3), "prompt": ["a", "bb", "ccc"]}
    assert best(reward=Longest(), inputs=texts, batch_size=5).scores[:, 0].tolist() == [1.0, 2.0, 3.0]


def test_progress_is_shown_on_request(capsys) -> None:
    """The bar is on the error stream, and absent if not wanted."""
    best(show_progress=True)
    shown = capsys.readouterr()
    assert "candidates" in shown.err
    assert shown.out == ""
    best()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": {"image": images(3), "prompt": ["one"]}}, "as many values for every input"),
        ({"inputs": {"image": images(3), "prompt": "one for all"}}, "as many values for every input"),
        ({"inputs": {"image": images(3)}, "references": TRUTH[:2]}, "as many values for every input"),
        ({"inputs": {"image": []}}, "as many values for every input"),
        ({"inputs": {}}, "as many values for every input"),
        ({"num_candidates": 0}, "num_candidates and batch_size"),
        ({"batch_size": 0}, "num_candidates and batch_size"),
        ({"reward": "ssim"}, "no `references`"),
        ({"pipeline": lambda **call: SimpleNamespace(images=torch.zeros(2, 3, 8, 8))}, "one image per row"),
    ],
)
def test_mistakes_are_explained(options, message) -> None:
    """What does not fit together is named before, or at, the first call."""
    with pytest.raises(ValueError, match=message):
        best(**options)
