"""A reward is distilled into a small network, in seconds; the report says where it disagrees."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from examples.distill.__main__ import main
from examples.distill.report import kind_and_level, report
from examples.distill.training import Group, Settings, quantiles, train
from iqareward import NoReference
from iqareward.rewards import QuickReward
from tests.rewards.pictures import textures

SIDE = 48
LEVELS = (0, 8, 20, 40)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twenty inputs with four levels of noise each."""
    folder, rng = tmp_path_factory.mktemp("pictures"), torch.Generator().manual_seed(0)
    for number, image in enumerate(textures(20, SIDE)):
        inside = folder / "images" / f"{number:02}"
        inside.mkdir(parents=True)
        (folder / "references").mkdir(exist_ok=True)
        save(image, folder / "references" / f"{number:02}.png")
        for level in LEVELS:
            noise = level / 255 * torch.randn(image.shape, generator=rng)
            save(image + noise, inside / f"noise-{level}.png")
    return folder


def save(image, file):
    Image.fromarray((image.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()).save(file)


@pytest.fixture(scope="module")
def student(pictures):
    """The file of a short training, and what was written beside it."""
    file = pictures / "judge.safetensors"
    arguments = [
        "--teacher", "haarpsi", "--images", pictures / "images", "--references", pictures / "references", "--output",
        file, "--steps", 30, "--crop", SIDE, "--groups", 4, "--members", 4, "--device", "cpu",
        "--learning-rate", 2e-3,
    ]  # fmt: skip
    main([str(each) for each in arguments])
    return file


def test_the_student_orders_held_out_images(student):
    """A constant orders half of the pairs; the network orders most, of inputs that it was not trained on."""
    found = json.loads(student.with_suffix(".report.json").read_text())
    assert found["inputs"] == 2
    assert found["pairs"][0] > 0.8
    assert not student.with_suffix(".part").exists()


def test_the_student_is_a_reward(student, pictures):
    """The file is what `QuickReward` loads; stronger noise has the lower score."""
    images = textures(1, SIDE, seed=9)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    clean, noisy = QuickReward(weights=student, device="cpu")(torch.cat([images, (images + 0.15 * noise).clamp(0, 1)]))
    assert clean > noisy


def test_scores_of_a_table(pictures, tmp_path):
    """Scores that a reward has given before take the place of the teacher."""
    table = tmp_path / "scores.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "judge of mine", "problem", "reference", "inputs"])
        for image in sorted((pictures / "images").rglob("*.png")):
            rows.writerow([image, -kind_and_level(image.stem)[1], "", "", ""])
    file = tmp_path / "judge.safetensors"
    options = ["--steps", "2", "--crop", "32", "--groups", "2", "--members", "2", "--device", "cpu"]
    main(["--scores", str(table), "--images", str(pictures / "images"), "--output", str(file), *options])
    assert QuickReward(weights=file, device="cpu")(textures(2, SIDE)).isfinite().all()


class Roughness(torch.nn.Module):
    """Rates by brightness and roughness; at first the rougher is the better."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, images):
        features = images.mean((1, 2, 3)), 10 * images.diff(dim=3).abs().mean((1, 2, 3))
        return torch.stack(features, 1) @ self.weights


def test_noise_is_worse_though_the_teacher_is_indifferent(pictures, tmp_path):
    """A network that pays for noise unlearns it by the rule alone."""
    files = sorted((pictures / "references").glob("*.png"))
    groups = [Group(file.stem, [file], np.array([0.5])) for file in files]
    network, images = Roughness(), textures(4, SIDE)
    noise = 3 / 255 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert (network(images + noise) > network(images)).all()
    targets, settings = {group.name: group.scores for group in groups}, Settings(60, 8, 1, 1, SIDE, 0.1)
    where = {"device": torch.device("cpu"), "checkpoint": tmp_path / "x.part"}
    train(network, groups, targets, settings, **where, progress=lambda steps, total: steps)
    assert (network(images + noise) < network(images) - 0.02).all()


def test_a_run_of_other_settings_is_refused(pictures, tmp_path):
    """A checkpoint does not go on under another number of updates."""
    file = tmp_path / "judge.safetensors"
    fixed = ["--teacher", "haarpsi", "--images", str(pictures / "images")]
    fixed += ["--references", str(pictures / "references"), "--output", str(file), "--device", "cpu"]
    torch.save({"settings": {"steps": 7}, "step": 3}, file.with_suffix(".part"))
    with pytest.raises(ValueError, match="Delete it"):
        main([*fixed, "--steps", "2", "--crop", "32"])


def test_quantiles():
    """A target is the share of lower scores, where equal ones count half."""
    found = quantiles(np.array([1.0, 2.0, 9.0]), np.array([1.0, 2.0, 2.0, 3.0]))
    np.testing.assert_allclose(found, [0.125, 0.5, 1.0])


def test_the_report_warns_of_a_kind(tmp_path):
    """A student that prefers noise is caught, with the kind and the figures."""
    groups = []
    for number, image in enumerate(textures(12, SIDE)):
        files = []
        for level in LEVELS[:3]:
            files.append(tmp_path / f"{number}" / f"{'noise' if level else 'clean'}-{level}.png")
            files[-1].parent.mkdir(exist_ok=True)
            rng = torch.Generator().manual_seed(number)
            save(image + level / 255 * torch.randn(image.shape, generator=rng), files[-1])
        groups.append(Group(str(number), files, np.array([1.0, 0.5, 0.0])))
    backwards = NoReference(
        lambda images: 10 * images.diff(dim=3).abs().mean((1, 2, 3)), higher_is_better=True, name="x", bounds=(0, None)
    )
    found = report(backwards, groups)
    assert found.pairs[0] < 0.1
    assert "teacher's order" in found.kinds["noise"]["warning"]
