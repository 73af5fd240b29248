"""Metrics of piq, LPIPS, ST-LPIPS and DISTS as rewards: the packages' figures, without their traps."""

import importlib.util
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import iqareward
from iqareward import to_images
from iqareward.rewards.loading import LazyModel
from iqareward.rewards.perceptual import (
    BACKBONES,
    DISTSReward,
    LPIPSReward,
    PIQReward,
    STLPIPSReward,
    packaged_weights,
)
from iqareward.testing import check_reward
from tests.rewards.pictures import TRAPS, noisy, textures, traps
from tests.tolerances import EXACT, NETWORK_BATCH, OTHER_PACKAGE

piq = pytest.importorskip("piq", reason="the extra `perceptual` is not installed")

STLPIPS = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights" / "stlpips"
MIN_SIDE = {"fsim": 8, "vsi": 8, "mdsi": 8, "srsim": 40, "dss": 32, "iwssim": 161}
FUNCTION = {name: getattr(piq, "information_weighted_ssim" if name == "iwssim" else name) for name in MIN_SIDE}


# ---- piq


@pytest.mark.parametrize("metric", ["fsim", "mdsi", "srsim", "dss", pytest.param("vsi", marks=pytest.mark.slow)])
def test_piq_contract(metric: str) -> None:
    """Every piq metric keeps the whole contract of a reward; IW-SSIM follows on pictures that are harder for it."""
    references = textures(3, 48)
    check_reward(PIQReward(metric), noisy(references), references, degraded=noisy(references, 0.2))


@pytest.mark.parametrize("metric", MIN_SIDE)
def test_piq_figures(metric: str) -> None:
    """A score is what piq gives for the image alone, up to the sign."""
    references = textures(2, max(64, MIN_SIDE[metric]))
    images = noisy(references)
    pairs = zip(images.split(1), references.split(1), strict=True)
    values = torch.cat([FUNCTION[metric](*pair, reduction="none") for pair in pairs])
    expected = -values if metric == "mdsi" else values
    torch.testing.assert_close(PIQReward(metric)(images, references=references), expected, **OTHER_PACKAGE)


@pytest.mark.parametrize("metric", MIN_SIDE)
def test_piq_identical(metric: str) -> None:
    """Identical images get exactly the best score."""
    images = noisy(textures(2, max(48, MIN_SIDE[metric])))
    scores = PIQReward(metric)(images, references=images)
    assert scores.tolist() == [0.0 if metric == "mdsi" else 1.0] * 2


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize("metric", MIN_SIDE)
def test_piq_flat_reference(metric: str) -> None:
    """A flat reference costs its image the score, also where piq raises for the batch, and no other image."""
    references = textures(3, max(48, MIN_SIDE[metric]))
    images = noisy(references)
    alone = PIQReward(metric)(images, references=references)
    for colour in (0.0, 0.5, 1.0):
        flat = references.clone()
        flat[1] = colour
        scores = PIQReward(metric, batch_size=3)(images, references=flat)
        assert scores[1].isnan()
        torch.testing.assert_close(scores[[0, 2]], alone[[0, 2]], **NETWORK_BATCH)


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize("metric", MIN_SIDE)
def test_piq_black_image(metric: str) -> None:
    """A black image gets a low score or none, never an infinite one."""
    references = textures(1, max(48, MIN_SIDE[metric]))
    scores = PIQReward(metric)(torch.zeros_like(references), references=references)
    good = PIQReward(metric)(noisy(references), references=references)
    assert scores.isnan() or scores < good


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize("metric", MIN_SIDE)
def test_piq_small_images(metric: str) -> None:
    """Below the smallest side the score is NaN; at it there is one."""
    side = MIN_SIDE[metric]
    rng = torch.Generator().manual_seed(0)
    references = torch.rand(1, 3, side, side, generator=rng)
    images = noisy(references)
    assert PIQReward(metric)(images, references=references).isfinite()
    assert PIQReward(metric)(images[..., 1:], references=references[..., 1:]).isnan()


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize("kind", TRAPS)
@pytest.mark.parametrize("metric", MIN_SIDE)
def test_piq_on_traps(metric: str, kind: str) -> None:
    """A score does not depend on the batch, is the float64 figure, and is exactly the best one for an equal image."""
    references = traps(max(48, MIN_SIDE[metric]))[kind]
    images = noisy(references, 0.02)
    images[2] = references[2]
    reward = PIQReward(metric, batch_size=3)
    together = reward(images, references=references)
    alone = [reward(images[i : i + 1], references=references[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6, equal_nan=True)
    assert together[2] == reward.bounds[1]
    for score, image, reference in zip(together[:2], images.double(), references.double()):
        try:
            value = FUNCTION[metric](image[None], reference[None], reduction="none").clamp(max=1)[0]
        except torch.linalg.LinAlgError:  # IW-SSIM has no value on stripes
            value = torch.tensor(float("nan"))
        if value.isnan():  # some processors find no eigenvalues, others find NaN
            assert (metric, kind) == ("iwssim", "stripes")
            assert score.isnan()
            continue
        torch.testing.assert_close(score.double(), -value if metric == "mdsi" else value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_nearly_flat_pictures_keep_the_contract_under_iwssim() -> None:
    """The public check passes on pictures whose covariances are next to singular."""
    rng = torch.Generator().manual_seed(0)
    references = 0.5 + 0.002 * torch.randn(3, 3, 161, 161, generator=rng)
    degraded = noisy(references, 0.01)
    check_reward(PIQReward("iwssim"), noisy(references, 0.001), references, degraded=degraded)


@pytest.mark.parametrize("metric", MIN_SIDE)
def test_piq_identical_flat_images(metric: str) -> None:
    """Two black images are equal, so they get the best score although the reference is flat."""
    black = torch.zeros(1, 3, 161, 161)
    reward = PIQReward(metric)
    assert reward(black, references=black).tolist() == [reward.bounds[1]]


def test_fsim_official(fixtures_dir: Path) -> None:
    """FSIM agrees with the figures of the authors' MATLAB code."""
    folder = fixtures_dir / "calibration"
    rows = dict(line.split(",", 1) for line in (folder / "official.csv").read_text().splitlines())
    expected = dict(zip(rows["Method"].split(","), map(float, rows["fsim"].split(",")), strict=True))
    for name, value in expected.items():
        pair = [next((folder / kind).glob(f"{name}*")) for kind in ("dist", "ref")]
        image, reference = (to_images(Image.open(path)) for path in pair)
        score = PIQReward("fsim")(image, references=reference)
        # published with four digits
        torch.testing.assert_close(score, torch.tensor([value]), rtol=0, atol=1.5e-4)


def test_piq_refuses() -> None:
    """Unknown metrics, gradients and a foreign default dtype are refused in words."""
    with pytest.raises(ValueError, match="fsim, vsi, mdsi, srsim, dss, iwssim, got 'psnr'"):
        PIQReward("psnr")
    with pytest.raises(ValueError, match="NaN on ordinary images"):
        PIQReward("fsim", differentiable=True)
    images = textures(1, 48)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(RuntimeError, match="expected float32 as torch's default dtype"):
            PIQReward("dss")(images, references=images)
    finally:
        torch.set_default_dtype(torch.float32)


def test_default_device_does_not_matter() -> None:
    """A trainer's default device changes nothing."""
    references = textures(1, 48)
    images = noisy(references)
    expected = PIQReward("dss")(images, references=references)
    with torch.device("meta"):
        scores = PIQReward("dss")(images, references=references)
    torch.testing.assert_close(scores, expected, **EXACT)


# ---- LPIPS and DISTS


def pretend_download(net: str, files: dict[str, Path], patch: pytest.MonkeyPatch) -> None:
    """Have torchvision's constructor return the weights of our file, as packages call it to download theirs."""
    models = pytest.importorskip("torchvision.models")
    weights = {key.removeprefix("features."): value for key, value in torch.load(files[net]).items()}
    with torch.device("meta"):
        features = getattr(models, BACKBONES[net].function)(weights=None).features
    features.load_state_dict(weights, assign=True)
    patch.setattr(models, BACKBONES[net].function, lambda pretrained: SimpleNamespace(features=features))


@pytest.mark.parametrize("net", BACKBONES)
def test_lpips_package(net: str, backbone_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """LPIPS is the lpips package's on [-1, 1], with equal weights, also when its own module is passed."""
    lpips = pytest.importorskip("lpips")
    references = textures(2, 48)
    images = noisy(references)
    with monkeypatch.context() as patch:
        pretend_download(net, backbone_files, patch)
        package = lpips.LPIPS(net=net, verbose=False)
    with torch.no_grad():
        expected = -package(2 * images - 1, 2 * references - 1).flatten()
    for reward in (LPIPSReward(net, weights=backbone_files[net]), LPIPSReward(net, model=package)):
        torch.testing.assert_close(reward(images, references=references), expected, **OTHER_PACKAGE)
    assert not package.training
    assert not any(parameter.requires_grad for parameter in package.parameters())


def test_dists_package(backbone_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """DISTS is the DISTS-pytorch package's, with equal weights."""
    package = pytest.importorskip("DISTS_pytorch")
    with monkeypatch.context() as patch:
        pretend_download("vgg", backbone_files, patch)
        network = package.DISTS(load_weights=False)  # it looks for its weights where this build does not put them
    learned = packaged_weights("DISTS_pytorch", "weights.pt", purpose="this test")
    shape = network.alpha.shape
    network.alpha.data, network.beta.data = learned.take({"alpha": shape, "beta": shape}).values()
    references = textures(2, 48)
    images = noisy(references)
    scores = DISTSReward(weights=backbone_files["vgg"])(images, references=references)
    torch.testing.assert_close(scores, -network(images, references).detach(), **OTHER_PACKAGE)


needs_stlpips = pytest.mark.skipif(
    importlib.util.find_spec("stlpips_pytorch") is None, reason="stlpips_pytorch, with the weights, is not installed"
)


@needs_stlpips
@pytest.mark.parametrize(
    ("net", "image", "published", "digits"),
    [
        ("alex", "ex_p0", 0.77775550, 1e-6),
        ("alex", "ex_p1", 0.13202165, 1e-6),  # pyiqa 0.1.16 with the same weights
        ("vgg", "ex_p0", 0.652, 5e-4),  # printed with three digits in lpips_2imgs.py of the authors' repository
    ],
)
def test_stlpips_published(net: Any, image: str, published: float, digits: float) -> None:
    """ST-LPIPS gives the authors' figures on their example, in both directions, with their weights."""
    if not STLPIPS.is_dir():
        pytest.skip("the authors' example pictures are not distributed with the repository (no ../shared/data)")
    first, second = (to_images(Image.open(STLPIPS / f"{name}.png")) for name in (image, "ex_ref"))
    reward = STLPIPSReward(net)
    for pair in ((first, second), (second, first)):
        score = reward(pair[0], references=pair[1])
        torch.testing.assert_close(score, torch.tensor([-published]), rtol=0, atol=digits)


@needs_stlpips
def test_stlpips_weights_from_a_file() -> None:
    """The authors' file, and a folder with it, give the installed package's scores; another network's file is named."""
    references = textures(2, 40)
    images = noisy(references)
    expected = STLPIPSReward()(images, references=references)
    folder = Path(importlib.util.find_spec("stlpips_pytorch").submodule_search_locations[0]) / "weights" / "vST0.0"
    file = folder / "alex_shift_tolerant.pth"
    torch.testing.assert_close(STLPIPSReward(weights=file)(images, references=references), expected, **EXACT)
    loaded = iqareward.load(f"stlpips(weights={file})")
    torch.testing.assert_close(loaded(images, references=references), expected, **EXACT)
    with pytest.raises(ValueError, match=r"expected weights of vgg16: .*alex_shift_tolerant\.pth"):
        STLPIPSReward("vgg", weights=file)(images, references=references)
    with pytest.raises(ValueError, match=r"one file of weights .*alex_shift_tolerant\.pth, vgg_shift_tolerant\.pth"):
        STLPIPSReward(weights=folder)(images, references=references)


@needs_stlpips
@pytest.mark.parametrize("differentiable", [False, True])
def test_stlpips_contract(differentiable: bool) -> None:
    """ST-LPIPS keeps the whole contract of a reward."""
    references = textures(3, 40)
    reward = STLPIPSReward(differentiable=differentiable)
    check_reward(reward, noisy(references), references, degraded=noisy(references, 0.2))


@needs_stlpips
def test_stlpips_tolerates_shifts() -> None:
    """A shift of one pixel costs less than visible noise."""
    picture = textures(1, 65)
    references, shifted = picture[..., :64, :64], picture[..., 1:, 1:]
    reward = STLPIPSReward()
    assert reward(shifted, references=references) > reward(noisy(references, 0.2), references=references)


@needs_stlpips
@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize(("net", "side"), [("alex", 21), ("vgg", 18)])
def test_stlpips_small_images(net: Any, side: int) -> None:
    """Below the smallest side the score is NaN; at it there is one."""
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    reward = STLPIPSReward(net)
    assert reward(images[:1], references=images[1:]).isfinite()
    assert reward(images[:1, :, 1:], references=images[1:, :, 1:]).isnan()


class Difference(nn.Module):
    """Mean absolute difference as `[B, 1, 1, 1]`, shaped like LPIPS."""

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        return (images - references).abs().mean((1, 2, 3), keepdim=True)


def test_ranges() -> None:
    """LPIPS networks are fed [-1, 1], DISTS networks [0, 1]."""
    images, references = torch.full((2, 3, 32, 32), 0.5), torch.zeros(2, 3, 32, 32)
    torch.testing.assert_close(LPIPSReward(model=Difference())(images, references), torch.full((2,), -1.0))
    torch.testing.assert_close(DISTSReward(model=Difference())(images, references), torch.full((2,), -0.5))


@pytest.mark.parametrize(
    ("name", "differentiable"), [("lpips", False), ("lpips", True), ("lpips_squeeze", True), ("dists", True)]
)
def test_contract(name: str, differentiable: bool, backbone_files: dict[str, Path]) -> None:
    """LPIPS and DISTS keep the whole contract of a reward."""
    if name == "dists":
        reward = DISTSReward(weights=backbone_files["vgg"], differentiable=differentiable)
    else:
        net = "alex" if name == "lpips" else name.removeprefix("lpips_")
        reward = LPIPSReward(net, weights=backbone_files[net], differentiable=differentiable)
    assert reward.name.startswith(f"{name}(weights=")
    references = textures(3, 16 if name == "dists" else 40)
    check_reward(reward, noisy(references), references, degraded=noisy(references, 0.2))


def test_identical(backbone_files: dict[str, Path]) -> None:
    """Identical images, black ones included, are at distance 0 and not beyond the bound."""
    images = torch.cat([noisy(textures(2, 40)), torch.zeros(1, 3, 40, 40)])
    for reward in (LPIPSReward("alex", weights=backbone_files["alex"]), DISTSReward(weights=backbone_files["vgg"])):
        scores = reward(images, references=images)
        assert bool((scores <= 0).all())
        torch.testing.assert_close(scores, torch.zeros(3), **OTHER_PACKAGE)


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize("net", BACKBONES)
def test_small_images(net: str, backbone_files: dict[str, Path]) -> None:
    """Below the smallest side the score is NaN; at it there is one."""
    side = BACKBONES[net].min_side
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    reward = LPIPSReward(net, weights=backbone_files[net])
    assert reward(images[:1], references=images[1:]).isfinite()
    assert reward(images[:1, :, 1:], references=images[1:, :, 1:]).isnan()


def test_defaults_of_the_trainer(backbone_files: dict[str, Path]) -> None:
    """Building and scoring do not depend on torch's default dtype or device, nor use its random numbers."""
    references = textures(1, 40)
    images = noisy(references)
    expected = LPIPSReward("alex", weights=backbone_files["alex"])(images, references=references)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            scores = LPIPSReward("alex", weights=backbone_files["alex"])(images, references=references)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(scores, expected, **EXACT)
    torch.testing.assert_close(torch.get_rng_state(), state, **EXACT)


def test_offline_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the error says which file belongs where; with the file there, the network is not needed."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    images = textures(1, 40)
    with pytest.raises(OSError, match=r"alexnet-owt-.*pth elsewhere and put it at .*checkpoints.*weights=") as caught:
        LPIPSReward("alex")(images, references=images)
    assert "no route to host" in str(caught.value)
    with pytest.raises(OSError, match="DISTSReward needs the ImageNet weights of vgg16"):
        DISTSReward()(images, references=images)


def test_weights_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone_files: dict[str, Path]
) -> None:
    """A file in torch's cache is used without a network."""
    from torchvision.models import AlexNet_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    file.parent.mkdir(parents=True)
    file.write_bytes(backbone_files["alex"].read_bytes())
    references = textures(1, 40)
    images = noisy(references)
    expected = LPIPSReward("alex", weights=backbone_files["alex"])(images, references=references)
    torch.testing.assert_close(LPIPSReward("alex")(images, references=references), expected, **EXACT)


class Bomb:
    """Pickles as code that writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def test_weight_files(tmp_path: Path, backbone_files: dict[str, Path]) -> None:
    """Safetensors work; another network's file, code in a pickle, and a missing file are errors in words."""
    images = textures(1, 40)
    save_file(torch.load(backbone_files["alex"]), tmp_path / "alex.safetensors")
    assert LPIPSReward("alex", weights=tmp_path / "alex.safetensors")(images, references=images) == 0
    with pytest.raises(ValueError, match="expected weights of alexnet"):
        LPIPSReward("alex", weights=backbone_files["vgg"])(images, references=images)
    torch.save({"features.0.weight": Bomb(tmp_path / "executed")}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth cannot be read as weights"):
        LPIPSReward("alex", weights=tmp_path / "bomb.pth")(images, references=images)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        LPIPSReward("alex", weights=tmp_path / "nowhere.pth")(images, references=images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.fill_(torch.nan), "NaN"),
        (lambda weight: weight.to(torch.int8), "int8"),
        (torch.zeros_like, "nothing but zeros"),
        (lambda weight: weight[1:], r"shape \[191, 64, 5, 5\]"),
        (lambda weight: 3.0, "float for"),
    ],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_damaged_weights(
    tmp_path: Path, backbone_files: dict[str, Path], suffix: str, change: Any, message: str
) -> None:
    """Values that no trained network has, and tensors of another kind, are errors that name the file and the tensor."""
    weights = torch.load(backbone_files["alex"])
    weights["features.3.weight"] = change(weights["features.3.weight"].clone())
    path = tmp_path / f"alex.{suffix}"
    if suffix == "pth":
        torch.save(weights, path)
    elif isinstance(weights["features.3.weight"], Tensor):
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    else:
        path.write_bytes(b"no header")
        message = "cannot be read as weights"
    images = textures(1, 40)
    with pytest.raises(ValueError, match=rf"alex\.{suffix}") as caught:
        LPIPSReward("alex", weights=path)(images, references=images)
    assert re.search(message, str(caught.value))
    if "cannot be read" not in message:
        assert "features.3.weight" in str(caught.value)


@pytest.mark.parametrize("net", BACKBONES)
def test_one_file_with_backbone_and_heads(net: str, tmp_path: Path, backbone_files: dict[str, Path]) -> None:
    """The state dict of the lpips package's network, and of ours, brings trained heads with the backbone."""
    lpips = pytest.importorskip("lpips")
    with warnings.catch_warnings():  # lpips names torchvision's weights as in 2021
        warnings.simplefilter("ignore")
        package = lpips.LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False)
    for head in package.lins:  # as training keeps them
        head.model[1].weight.data.abs_()
    torch.save(package.state_dict(), tmp_path / "whole.pth")
    references = textures(2, 40)
    images = noisy(references)
    with torch.no_grad():
        expected = -package.eval()(2 * images - 1, 2 * references - 1).flatten()
    reward = LPIPSReward(net, weights=tmp_path / "whole.pth")
    torch.testing.assert_close(reward(images, references=references), expected, **OTHER_PACKAGE)
    save_file(reward.model.state_dict(), tmp_path / "ours.safetensors")
    ours = LPIPSReward(net, weights=tmp_path / "ours.safetensors")
    torch.testing.assert_close(ours(images, references=references), expected, **OTHER_PACKAGE)

    heads = {key: value for key, value in package.state_dict().items() if key.startswith("lin")}
    torch.save(heads, tmp_path / "heads.pth")
    torch.save({key: 2 * value for key, value in heads.items()}, tmp_path / "twice.pth")
    backbone = backbone_files[net]
    plain = LPIPSReward(net, weights=backbone, heads=tmp_path / "heads.pth")(images, references=references)
    twice = LPIPSReward(net, weights=backbone, heads=tmp_path / "twice.pth")(images, references=references)
    torch.testing.assert_close(twice, 2 * plain, **OTHER_PACKAGE)
    doubled = LPIPSReward(net, weights=tmp_path / "whole.pth", heads=tmp_path / "twice.pth")  # a file asked for wins
    torch.testing.assert_close(doubled(images, references=references), 2 * expected, **OTHER_PACKAGE)


def test_one_file_with_all_of_dists(tmp_path: Path, backbone_files: dict[str, Path]) -> None:
    """DISTS takes backbone, alpha and beta from the package's state dict, or from two files."""
    package = pytest.importorskip("DISTS_pytorch")
    with pytest.MonkeyPatch.context() as patch:
        pretend_download("vgg", backbone_files, patch)
        network = package.DISTS(load_weights=False)  # random alpha and beta
    state = network.state_dict()
    torch.save(state, tmp_path / "whole.pth")
    torch.save({key: state[key] for key in ("alpha", "beta")}, tmp_path / "learned.pth")
    references = textures(2, 40)
    images = noisy(references)
    expected = -network(images, references).detach()
    whole = DISTSReward(weights=tmp_path / "whole.pth")
    two = DISTSReward(weights=backbone_files["vgg"], heads=tmp_path / "learned.pth")
    torch.save(whole.model.state_dict(), tmp_path / "ours.pth")
    for reward in (whole, two, DISTSReward(weights=tmp_path / "ours.pth")):
        torch.testing.assert_close(reward(images, references=references), expected, **OTHER_PACKAGE)


def test_folders_and_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone_files: dict[str, Path]) -> None:
    """Weights may be named by the folder that holds one file of them, or by a hub id."""
    references = textures(1, 40)
    images = noisy(references)
    expected = LPIPSReward(weights=backbone_files["alex"])(images, references=references)
    with pytest.raises(ValueError, match=r"one file of weights .*, got none"):
        LPIPSReward(weights=tmp_path)(images, references=references)
    (tmp_path / "README.md").write_text("AlexNet")
    (tmp_path / "alex.pth").write_bytes(backbone_files["alex"].read_bytes())
    torch.testing.assert_close(LPIPSReward(weights=tmp_path)(images, references=references), expected, **EXACT)
    save_file(torch.load(backbone_files["alex"]), tmp_path / "model.safetensors")
    (tmp_path / "alex.pth").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub_id, **kwargs: {"me/alex": tmp_path}[hub_id])
    torch.testing.assert_close(LPIPSReward(weights="me/alex")(images, references=references), expected, **EXACT)
    with pytest.raises(FileNotFoundError, match=r"folder/nowhere\.pth"):
        LPIPSReward(weights="folder/nowhere.pth")(images, references=references)


@pytest.mark.parametrize("names", [["alex.pth"], ["model.safetensors", "pytorch_model.bin"]])
def test_a_hub_id_downloads_one_file_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone_files: dict[str, Path], names: list[str]
) -> None:
    """A file of torch.save comes where the repository has no safetensors."""
    cache = tmp_path / "cache"

    def download(hub_id: str, allow_patterns: list[str], **options: object) -> str:
        for name in names:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                cache.mkdir(exist_ok=True)
                tensors = torch.load(backbone_files["alex"])
                save = save_file if name.endswith(".safetensors") else torch.save
                save(tensors, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    references = textures(1, 40)
    images = noisy(references)
    expected = LPIPSReward(weights=backbone_files["alex"])(images, references=references)
    torch.testing.assert_close(LPIPSReward(weights="me/alex")(images, references=references), expected, **EXACT)
    assert [file.name for file in cache.iterdir()] == names[:1]


def test_damaged_file_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone_files: dict[str, Path]
) -> None:
    """A file in torch's cache whose download was interrupted is named."""
    from torchvision.models import AlexNet_Weights

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]
    file.parent.mkdir(parents=True)
    data = backbone_files["alex"].read_bytes()
    images = textures(1, 40)
    for share in (0.0, 0.1, 0.9):
        file.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match=rf"{file.name} cannot be read as weights"):
            LPIPSReward("alex")(images, references=images)


def test_refusals() -> None:
    """Unknown networks and contradicting arguments are refused before anything is loaded."""
    with pytest.raises(ValueError, match="alex, vgg, squeeze, got 'resnet'"):
        LPIPSReward("resnet")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="either `model`, or files of weights"):
        DISTSReward(weights="vgg.pth", model=Difference())
    with pytest.raises(ValueError, match="either `model`, or files of weights"):
        LPIPSReward(heads="heads.pth", model=Difference())
    with pytest.raises(ValueError, match="alex, vgg, got 'squeeze'"):
        STLPIPSReward("squeeze")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ImportError, match=r"iqareward\[perceptual\]"):
        packaged_weights("a_package_that_is_not_there", "weights.pt", purpose="this test")


# ---- loading


class Recorder(nn.Module):
    """Remembers where it was moved to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))
        self.moves: list[str] = []

    def to(self, device: torch.device) -> "Recorder":
        self.moves.append(str(device))
        return self


def build_recorder(device: torch.device) -> Recorder:
    BUILDS.append(str(device))
    return Recorder()


BUILDS: list[str] = []


def test_built_once_from_many_threads() -> None:
    """However many threads ask first, one network is built, frozen, in eval mode, outside inference mode."""
    BUILDS.clear()
    loader = LazyModel(build_recorder)

    def ask(_: int) -> nn.Module:
        with torch.inference_mode():
            return loader.get(torch.zeros(1))

    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(ask, range(32)))
    assert BUILDS == ["cpu"]
    assert all(model is models[0] for model in models)
    weight = models[0].get_parameter("weight")
    assert not models[0].training
    assert not weight.requires_grad
    assert not weight.is_inference()


def test_pickle_leaves_the_network_behind() -> None:
    """A copy of a used loader is small and builds its own network."""
    loader = LazyModel(build_recorder, "cpu")
    first = loader.get()
    copy = pickle.loads(pickle.dumps(loader))
    BUILDS.clear()
    assert copy.get() is not first
    assert BUILDS == ["cpu"]


def test_offload_and_onload() -> None:
    """While offloaded the network is not to be had; `to` before loading decides where to build, later it moves."""
    BUILDS.clear()
    loader = LazyModel(build_recorder)
    loader.offload()  # nothing to move yet
    loader.to("meta")
    moves = loader.ready().moves
    assert BUILDS == ["meta"]
    assert loader.device.type == "meta"
    loader.offload()
    loader.offload()
    with pytest.raises(RuntimeError, match="onload"):
        loader.ready()
    loader.onload()
    loader.onload()
    loader.ready()
    assert moves == []
    loader.offload()
    loader.to("cpu")
    loader.ready()
    assert moves == ["cpu"]


def test_moving_a_reward(backbone_files: dict[str, Path]) -> None:
    """`to` returns the reward, and scores stay where the images are."""
    reward = LPIPSReward("alex", weights=backbone_files["alex"]).to("cpu")
    images = textures(1, 40)
    assert reward(images, references=images).device == images.device
    assert next(reward.model.parameters()).device.type == "cpu"
    assert reward.model is reward.model
