"""The command `iqareward check`: test a reward that the command line names against the contract."""

import importlib
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from iqareward.diffusion import synthetic_images
from iqareward.image_files import References, find_images
from iqareward.images import to_images
from iqareward.rewards.catalog import load
from iqareward.rewards.specs import PYIQA_PREFIX
from iqareward.testing import MIN_IMAGES, Report, RewardContractError, check_reward, fact, raised
from iqareward.types import Reward

_NUM_IMAGES = 4


def find_reward(spec: str) -> object:
    """Import `module:object`, calling a class without arguments, or load a name of the catalogue.

    Raises:
        ValueError: there is no such module, object or name.
        ImportError: a reward of the catalogue needs an extra.
        RewardContractError: the module or the class fails.
    """
    module, colon, path = spec.partition(":")
    if not colon or spec.startswith(PYIQA_PREFIX):
        return load(spec)
    if not module or not path:
        raise ValueError(f"{spec!r}: expected module:object, such as my_rewards:reward, or a name of `iqareward list`.")
    try:
        found: object = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{spec!r}: there is no module {error.name} in this folder or among the installed packages."
            ) from error
        raise _failure(spec, "can be imported", error) from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ValueError(f"{spec!r}: there is no {part!r} in {module}.") from error
        except (Exception, SystemExit) as error:  # a module may import its names when they are asked for
            raise _failure(spec, "can be imported", error) from error
    if not isinstance(found, type):
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:
        advice = f"If it needs arguments, write reward = {path}(...) in the module and check {module}:reward."
        raise _failure(spec, "can be made without arguments", error, advice) from error


def _failure(spec: str, title: str, error: BaseException, advice: str = "") -> RewardContractError:
    reason = f"{raised(error)}. {advice}".rstrip()
    return RewardContractError(str(Report(spec, failed=[(title, reason)])))


def run_check(
    reward: object, folder: Path | None, size: int, *, degraded_folder: Path | None = None, direction: bool = True
) -> Report:
    """Call `check_reward` with photographs of a folder, or with generated images.

    Squares of side `size` are cut from the centres. The worse versions come from the files of the same names in
    `degraded_folder`, or are coarse and noisy copies; without `direction` there are none.

    Raises:
        ValueError: too few or too small images, files that cannot be read, or no worse versions of them.
        RewardContractError: with all failures.
    """
    if degraded_folder is not None and (folder is None or not direction):
        raise ValueError(
            "--degraded goes with --images, of whose files it has worse versions, and not with --no-direction."
        )
    files = dict(list(find_images([folder]).files.items())[:_NUM_IMAGES]) if folder is not None else {}
    if folder is not None and len(files) < MIN_IMAGES:
        raise ValueError(f"{folder} has {len(files)} images; the check needs {MIN_IMAGES} or more.")
    images = synthetic_images(range(_NUM_IMAGES), size=size)
    if files:
        images = torch.stack([_center(_read(file), file, size) for file in files])
    rng = torch.Generator().manual_seed(0)
    near = (images + 0.01 * torch.randn(images.shape, generator=rng)).clamp(0, 1)
    degraded = None
    if degraded_folder is not None:
        degraded = torch.stack([_worse(*item, degraded_folder, size) for item in files.items()])
    elif direction:
        coarse = interpolate(images, size=(size // 4, size // 4), mode="area")
        coarse = interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
        degraded = (coarse + 0.1 * torch.randn(images.shape, generator=rng)).clamp(0, 1)
    reward = cast(Reward, reward)  # check_reward says if it is none
    if fact(reward, "needs_references", False):
        return check_reward(reward, near, images, degraded=degraded)
    return check_reward(reward, images, degraded=degraded)


def _read(file: Path) -> Tensor:
    return to_images(file, value_range=(0, 1))[0]


def _worse(file: Path, relative: Path, folder: Path, size: int) -> Tensor:
    try:
        worse = References(folder).find(relative)
    except FileNotFoundError as error:
        raise ValueError(f"--degraded {folder} has no version of {file}.") from error
    image, better = _read(worse), _read(file)
    if image.shape != better.shape:
        raise ValueError("{} is {}x{}, {} is {}x{}.".format(file, *better.shape[:0:-1], worse, *image.shape[:0:-1]))
    return _center(image, worse, size)


def _center(image: Tensor, file: Path, size: int) -> Tensor:
    height, width = image.shape[1:]
    if min(height, width) < size:
        raise ValueError(f"{file} is {width}x{height}, smaller than --size {size}.")
    top, left = (height - size) // 2, (width - size) // 2
    return image[:, top : top + size, left : left + size]
