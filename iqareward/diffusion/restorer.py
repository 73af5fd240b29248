"""Build, save and load a pixel-space restorer in the folder layout of diffusers."""

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from iqareward.atomic import atomic_folder
from iqareward.diffusion.finite import is_count, require_finite
from iqareward.diffusion.policies.pixel import PixelPolicy
from iqareward.diffusion.processes import DDIM
from iqareward.optional import require_diffusers
from iqareward.weight_files import WeightFile, check_values, listed

PURPOSE = "a pixel restorer"
SETTINGS = "restorer.json"  # what diffusers has no place for
CONFIG, WEIGHTS = "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


def build_restorer(channels: Sequence[int], *, layers: int = 1, scale: int = 1, seed: int = 0) -> PixelPolicy:
    """Build a convolutional UNet that predicts the change to the degraded image; train it by SFT first.

    It takes images of any size whose sides are multiples of `2 ** (len(channels) - 1)`.

    Args:
        channels: Channels per resolution; multiples of 8.
        layers: Blocks per resolution.
        scale: How many times larger than the degraded images the restored ones are.
        seed: Seed of the weights.

    Returns:
        A policy on the CPU.

    Example:
        >>> policy = build_restorer((8, 16))
        >>> policy.residual, policy.model.config.in_channels
        (True, 6)
    """
    diffusers = require_diffusers(PURPOSE)
    blocks = len(channels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        unet = diffusers.UNet2DModel(
            in_channels=6,
            out_channels=3,
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            norm_num_groups=8,
            down_block_types=("DownBlock2D",) * blocks,
            up_block_types=("UpBlock2D",) * blocks,
        )
    scheduler = diffusers.DDIMScheduler(
        prediction_type="sample", timestep_spacing="trailing", clip_sample=False, rescale_betas_zero_snr=True
    )
    return PixelPolicy(unet, DDIM(scheduler), residual=True, scale=scale)


def save_restorer(policy: PixelPolicy, folder: Path | str) -> None:
    """Write the model to `unet/` and the scheduler to `scheduler/` of a folder, both with `save_pretrained`.

    Args:
        policy: Whose `process` is a `DDIM`.
        folder: Made if it is missing; one that is there is replaced as a whole.

    Raises:
        TypeError: The policy has another `process`.
        TrainingError: A weight is not finite.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_restorer(build_restorer((8, 16)), f"{folder}/model")
        ...     sorted(path.name for path in Path(folder, "model").iterdir())
        ['restorer.json', 'scheduler', 'unet']
    """
    process, model = policy.process, cast(Any, policy.model)
    if not isinstance(process, DDIM):
        raise TypeError(f"save_restorer expected a policy whose `process` is a DDIM, got a {type(process).__name__}.")
    require_finite("The restorer", model.state_dict())
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as whole:
        model.save_pretrained(whole / "unet")
        process.scheduler.save_pretrained(whole / "scheduler")
        settings = {"residual": policy.residual, "scale": policy.scale}
        (whole / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")


def load_restorer(folder: Path | str) -> PixelPolicy:
    """Load a policy from a folder of `save_restorer`, or from a diffusers pipeline with a 6-channel `UNet2DModel`.

    Args:
        folder: Holds `unet/` and `scheduler/`.

    Returns:
        A policy on the CPU.

    Raises:
        ValueError: The folder is another one; a file is damaged or contradicts another one; a weight is missing,
            unknown, quantised, misshapen or not finite; or the model has another number of channels.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_restorer(build_restorer((8, 16)), f"{folder}/model")
        ...     load_restorer(f"{folder}/model").residual
        True
    """
    diffusers = require_diffusers(PURPOSE)
    folder = Path(folder)
    for part in (CONFIG, WEIGHTS, SCHEDULER):
        if not (folder / part).is_file():
            raise ValueError(
                f"load_restorer expected {folder} to hold {part}, which is missing. Give a folder that save_restorer "
                "or a diffusers pipeline with a UNet2DModel wrote."
            )
    with _naming(folder / CONFIG), torch.random.fork_rng(devices=[]):
        config = diffusers.UNet2DModel.load_config(folder / "unet", local_files_only=True)
        with torch.device("meta"):
            described = diffusers.UNet2DModel.from_config(config)
    found = (described.config.in_channels, described.config.out_channels)
    if found != (6, 3):
        raise ValueError(
            f"load_restorer expected a UNet2DModel with 6 channels in (noisy and degraded image) and 3 out, got "
            f"{found[0]} and {found[1]} in {folder / CONFIG}."
        )
    weights = _read_weights(folder / WEIGHTS, described)
    with _naming(folder / CONFIG), torch.random.fork_rng(devices=[]):
        model = diffusers.UNet2DModel.from_config(config).eval()
        model.load_state_dict(weights)
    with _naming(folder / SCHEDULER):
        scheduler = _scheduler(folder / "scheduler")
        process = DDIM.from_scheduler(scheduler)
        process.schedule(1)  # a method that does not exist shows only here
        alpha_bars = scheduler.alphas_cumprod
        if not ((alpha_bars >= 0) & (alpha_bars <= 1)).all():
            raise ValueError("its betas give alpha-bars that do not lie in [0, 1].")
    with _naming(folder / SETTINGS):
        return PixelPolicy(model, process, **_settings(folder / SETTINGS))


@contextmanager
def _naming(file: Path) -> Generator[None]:
    """Turn whatever is raised for a damaged file into an error that names it."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"load_restorer cannot use {file}: {type(error).__name__}: {error}") from error


def _read_weights(path: Path, described: nn.Module) -> dict[str, Tensor]:
    """The tensors of the file, if they are those of the network `described`."""
    file, expected = WeightFile(path), described.state_dict()
    weights = {key: file.tensor(key, value.shape) for key, value in expected.items()}
    if unknown := file.keys() - expected.keys():
        raise ValueError(f"{path} holds {listed(unknown)}, which the network of {CONFIG} does not have.")
    check_values(path, weights, may_be_zero=True)
    return weights


def _scheduler(folder: Path) -> Any:
    """The scheduler of the class that its configuration names; DDIM if it names none."""
    import diffusers

    config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    name = config.get("_class_name", "DDIMScheduler")
    kind = getattr(diffusers, name, None) if isinstance(name, str) and name.endswith("Scheduler") else None
    if kind is None:
        raise ValueError(f"expected the name of a scheduler of diffusers, got {name!r:.100}")
    return kind.from_pretrained(folder, local_files_only=True)


def _settings(file: Path) -> dict[str, Any]:
    """The options of the policy."""
    if not file.is_file():  # a pipeline of diffusers
        return {}
    content = json.loads(file.read_text(encoding="utf-8"))
    residual, scale = (content.get("residual"), content.get("scale", 1)) if isinstance(content, dict) else (None, 1)
    if not isinstance(residual, bool) or not is_count(scale):
        raise ValueError(f'expected {{"residual": true or false, "scale": an integer >= 1}}, got {content!r:.100}')
    return {"residual": residual, "scale": scale}
