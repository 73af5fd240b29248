"""Shared inputs of the tests: bundled photographs, seeded noise, and the folder of reference figures."""

import atexit
import gc
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

import iqareward

# helper modules keep their assertions under `python -O`; pytest rewrites only the tests themselves unasked
HELPERS = [path.stem for path in Path(__file__).parent.iterdir() if path.stem != "conftest"]
pytest.register_assert_rewrite(*(f"tests.{stem}" for stem in HELPERS))

# how fast an example is found and tried says how busy the machine is
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that tests start, for the reason below

# imported once for all processes that tests fork from a server, each of which would take seconds
multiprocessing.set_forkserver_preload(
    ["trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer", "tests.diffusion.policies.kinds"]
)

PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")


def pytest_configure() -> None:
    """One thread: small operations spend more time waking threads than computing, many times more on a busy machine.

    It holds from here on, because convolutions round as they did in their first call, which may be at an import.
    """
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Spare each garbage collection the modules and tests there are by now: a million objects, a second each time."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # some packages look at the end whether all of theirs is gone


@pytest.fixture
def exact_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32 on a GPU: cuDNN rounds what goes in to TF32, 11 significant bits, unless told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """Folder of reference figures beside the checkout; they are not ours to distribute."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
    if not folder.is_dir():
        pytest.skip("the reference figures are not distributed with the repository (no ../shared/fixtures)")
    return folder


@pytest.fixture(scope="session")
def photographs() -> Tensor:
    """`[4, 3, 192, 192]`: centres of the colour photographs that scikit-image brings along."""
    skimage = pytest.importorskip("skimage")
    folder = Path(skimage.__file__).parent / "data"
    rows = [iqareward.to_images(folder / name)[0] for name in PHOTOS]
    return torch.stack([center_crop(row, 192) for row in rows])


@pytest.fixture(scope="session")
def degraded_photographs(photographs: Tensor) -> Tensor:
    """The photographs, coarse and noisy: visibly worse."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.nn.functional.interpolate(photographs, scale_factor=0.25, mode="area")
    coarse = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear", align_corners=False)
    return (coarse + 0.05 * torch.randn(coarse.shape, generator=rng)).clamp(0, 1)


def center_crop(image: Tensor, side: int) -> Tensor:
    top, left = ((size - side) // 2 for size in image.shape[-2:])
    return image[..., top : top + side, left : left + side]
