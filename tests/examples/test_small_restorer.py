"""The small restorer restores photographs that it never saw, and its training runs from photographs to weights."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import iqareward
from examples.small_restorer import photographs
from examples.small_restorer.restorer import WEIGHTS, build, load
from examples.small_restorer.tasks import TASKS, InTurns, damaged
from examples.small_restorer.train import cut, turned
from iqareward.diffusion import Batch, Noise, Validation

SIDE = 128


@pytest.fixture(scope="module")
def unseen_pairs() -> iqareward.diffusion.StoredPairs:
    """The middle of every Kodak crop, each with one of the five kinds of damage."""
    return damaged(photographs.kodak()[:, :, 64:192, 64:192], 0.7, seed=1)


def test_it_restores_what_it_never_saw(unseen_pairs: iqareward.diffusion.StoredPairs) -> None:
    """In three steps and in one it is nearer to the truth than the damaged photographs, in error and to the eye."""
    policy = load()
    haarpsi = iqareward.load("haarpsi")
    truth = unseen_pairs.references
    before = {"error": iqareward.reference_distance(unseen_pairs.degraded, truth).mean()}
    before["haarpsi"] = haarpsi(unseen_pairs.degraded, references=truth).mean()
    for steps in (1, policy.num_steps):
        validation = Validation(unseen_pairs, {}, num_steps=steps, inputs_at_once=24)
        restored = validation.restore(policy, *validation.batches, seed=0)
        assert iqareward.reference_distance(restored, truth).mean() < 0.95 * before["error"]
        assert haarpsi(restored, references=truth).mean() > before["haarpsi"] + 0.01


def test_it_is_small_and_stored_in_half_precision() -> None:
    """At most 3 million weights, in files of fp16 without anything that would be unpickled."""
    policy = build()
    assert sum(weight.numel() for weight in policy.model.parameters()) <= 3_000_000
    for name in ("converged", "early"):
        stored = load_file(WEIGHTS / f"{name}.safetensors")
        assert {weight.dtype for weight in stored.values()} == {torch.float16}
        loaded = load(name).model.state_dict()
        assert all(torch.equal(loaded[key], weight.float()) for key, weight in stored.items())


def test_untrained_it_changes_nothing_in_one_step(unseen_pairs: iqareward.diffusion.StoredPairs) -> None:
    """The network's answer is 0 at first: one step answers the damaged photograph, but for the sampler's noise."""
    policy, noise = build(), Noise((0, 1))
    batch = Batch((0, 1), unseen_pairs.degraded[:2])
    condition = policy.condition(batch, noise)
    (step,) = policy.schedule(condition, 1)
    clean = policy.step(policy.start(condition, noise), step, condition, eta=0.0).clean
    # at the noisiest level 2 % of the residual are left in the latents, beside noise of .3
    assert (clean - condition["latents"]).abs().max() < 0.02


def test_photographs_come_with_their_authors() -> None:
    """A row of the training sheet for each line of the licences; crops that differ; 24 Kodak pictures."""
    lines = (photographs.FOLDER / "LICENSES.tsv").read_text().splitlines()
    crops = photographs.training()
    assert crops.shape == (len(lines) * photographs.COLUMNS, 3, 128, 128)
    assert all(line.split("\t")[1].startswith(("CC-BY", "CC0")) for line in lines)
    assert len({crop.mul(255).byte().numpy().tobytes() for crop in crops}) == len(crops)
    assert photographs.kodak().shape == (24, 3, 256, 256)


def test_an_input_has_one_task_whatever_its_batch() -> None:
    """The id chooses the task and the noise; strengths of their own without a severity."""
    images = photographs.training()[:10, :, :64, :64]
    severity = torch.linspace(0.1, 1, 10)
    together = InTurns()(images, severity, range(10), seed=3)
    for row in range(10):
        alone = InTurns()(images[row : row + 1], severity[row : row + 1], [row], seed=3)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=0)
    denoising = TASKS["denoising"](images[:1], severity[:1], [0], seed=3)
    torch.testing.assert_close(denoising[0], together[0], rtol=0, atol=0)
    assert not torch.equal(InTurns()(images, None, range(10), seed=3), together)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three photographs of 420 pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(3):
        coarse = Image.fromarray(draws.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        coarse.resize((560, 420), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def test_crops_are_the_same_for_any_number_of_workers(photos: Path) -> None:
    """Each crop comes from its number alone: a photograph, a place and a kind of damage."""
    files = sorted(photos.iterdir())
    one, three = cut(files, 10, 1, 5), cut(files, 10, 3, 5)
    for alone, shared in zip(one, three, strict=True):
        assert torch.equal(alone, shared)
    assert one.references.shape == (10, 3, 128, 128)
    assert (one.degraded != one.references).flatten(1).any(1).all()


def test_training_from_photographs_to_weights(photos: Path, tmp_path: Path) -> None:
    """The command writes two sets of weights that the restorer takes, the early one from before the other."""
    command = [sys.executable, "-m", "examples.small_restorer.train", "--photos", str(photos), "--count", "8"]
    command += ["--batch", "2", "--minutes", "0.1", "--output", str(tmp_path / "weights")]
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=Path(iqareward.__file__).parents[1])
    before = build().model.state_dict()
    early, late = (load_file(tmp_path / "weights" / f"{name}.safetensors") for name in ("early", "converged"))
    assert early.keys() == late.keys() == before.keys()
    assert any(not torch.equal(value, before[key].half()) for key, value in late.items())
    assert any(not torch.equal(value, early[key]) for key, value in late.items())


def test_all_images_of_a_batch_turn_alike() -> None:
    """Damaged and clean crops stay pairs, in each of the eight ways."""
    images = torch.arange(16.0).view(1, 1, 4, 4)
    torch.manual_seed(0)
    seen = set()
    for _ in range(200):
        first, second = turned(images, -images)
        assert torch.equal(first, -second)
        seen.add(tuple(first.flatten().tolist()))
    assert len(seen) == 8


def test_windows_are_parts_of_their_crops():
    """Each has the pixels of its crop from its corner on, mirrored where that is asked for."""
    crops = torch.rand(3, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    rows, corners = torch.tensor([2, 0, 2]), torch.tensor([[5, 3], [0, 0], [1, 2]])
    found = photographs.windows(crops, rows, corners, 4, torch.tensor([0, 0, 1]))
    assert found[0].equal(crops[2, :, 5:, 3:])
    assert found[1].equal(crops[0, :, :4, :4])
    assert found[2].equal(crops[2, :, 1:5, 2:6].flip(2))
    assert photographs.windows(crops, rows, corners, 4)[2].equal(crops[2, :, 1:5, 2:6])
