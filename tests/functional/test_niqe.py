"""NIQE against published figures, another package, its definition, and the ways a training batch goes wrong."""

import io
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import iqareward
from iqareward.functional.niqe import (
    MIN_SIDE,
    PACKAGED,
    NaturalModel,
    fit_natural_model,
    natural_features,
    niqe,
    packaged_model,
)
from iqareward.functional.nss import clipped_luma
from tests.gpu import no_waits, on_devices
from tests.tolerances import EXACT, FORMULA_FP32, OTHER_PACKAGE

# (figure of the authors' MATLAB release, relative tolerance). Two per cent of the pixels of I03 and I08 lie in exactly
# flat regions. MATLAB counts them left or right of zero by the rounding noise of its filter; here they are zero and on
# neither side. Random signs in their place move I03 by 0.4 % and I08 by 0.7 %.
OFFICIAL = {"I03": (15.7536293917814, 1e-4), "I06": (3.23547743716998, 1e-3), "I08": (3.18403333858339, 6e-3)}


def noisy(seed, height, width, batch=1):
    """8-bit images without flat regions: soft patches under strong grain."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(batch, 3, height // 16 + 2, width // 16 + 2, generator=generator)
    smooth = torch.nn.functional.interpolate(patches, (height, width), mode="bilinear", align_corners=False)
    grain = torch.randn(batch, 3, height, width, generator=generator) * 0.08
    return ((0.15 + 0.7 * smooth + grain).clamp(0, 1) * 255).round() / 255


def singular_model():
    model = packaged_model(torch.device("cpu"))
    values, vectors = torch.linalg.eigh(model.covariance)
    values[:10] = 0.0
    return NaturalModel(model.mean, vectors @ values.diag() @ vectors.T, model.block_size)


def distance_by_definition(image, model):
    """sqrt(delta' pinv((S1 + S2) / 2) delta) for one image, in numpy."""
    features = natural_features((clipped_luma(image[None])[0] * 255).round(), model.block_size)[0].numpy()
    features = features[np.isfinite(features).all(1)]
    pooled = (np.cov(features.T) + model.covariance.numpy()) / 2
    delta = features.mean(0) - model.mean.numpy()
    return float(np.sqrt(delta @ np.linalg.pinv(pooled, hermitian=True, rcond=1e-14) @ delta))


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_official_figures(fixtures_dir, name, dtype):
    """With the published parameters the figures of the MATLAB release come out, up to its noise in flat regions."""
    model = NaturalModel.from_npz(fixtures_dir / "niqe_pris_params.npz")
    pixels = np.asarray(Image.open(fixtures_dir / "calibration" / "dist" / f"{name}.png").convert("RGB"), np.float64)
    image = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255).to(dtype)
    figure, tolerance = OFFICIAL[name]
    torch.testing.assert_close(niqe(image, model=model), torch.tensor([figure], dtype=dtype), rtol=tolerance, atol=0.0)


def test_equals_pyiqa_without_flat_regions(photographs):
    """Same luma, same parameters, no flat regions (the differing step, see OFFICIAL): the same score as pyiqa."""
    arch = pytest.importorskip("pyiqa.archs.niqe_arch")
    model = packaged_model(torch.device("cpu"))
    grain = torch.randn(photographs.shape, generator=torch.Generator().manual_seed(3)) * 0.04
    images = noisy(1, 192, 288, batch=2)
    for batch in (images, (photographs + grain).clamp(0, 1)):
        plane = (clipped_luma(batch)[0] * 255).round().double()[:, None]
        theirs = arch.niqe(plane, model.mean[None], model.covariance, model.block_size, model.block_size)
        torch.testing.assert_close(niqe(batch), theirs.float().flatten(), **OTHER_PACKAGE)


@pytest.mark.parametrize("size", [(96, 96), (100, 190), (192, 144)])
@pytest.mark.parametrize("model", [packaged_model(torch.device("cpu")), singular_model()], ids=["definite", "singular"])
def test_distance_is_the_published_formula(size, model):
    """Cholesky and pseudo-inverse give what numpy's pinv gives, with far fewer blocks than features."""
    images = noisy(5, *size, batch=3)
    expected = torch.tensor([distance_by_definition(image, model) for image in images])
    torch.testing.assert_close(niqe(images, model=model), expected, **FORMULA_FP32)


def test_singular_model_is_recognised():
    """Only an invertible covariance takes the fast path."""
    assert packaged_model(torch.device("cpu")).is_definite
    assert not singular_model().is_definite


def test_float64_agrees():
    """float32 pixels lose nothing beyond the last digits of sums."""
    images = noisy(6, 144, 192, batch=2)
    torch.testing.assert_close(niqe(images).double(), niqe(images.double()), **FORMULA_FP32)


def test_degradation_raises_the_score(photographs, degraded_photographs):
    """Every photograph is closer to nature than its coarse and noisy copy."""
    assert (niqe(degraded_photographs) > niqe(photographs) + 1).all()


@pytest.mark.parametrize("model", [packaged_model(torch.device("cpu")), singular_model()], ids=["definite", "singular"])
def test_score_does_not_depend_on_the_batch(model):
    """An image alone, in a batch, in another order and beside broken images scores bit-identically."""
    images = noisy(7, 200, 250, batch=7)
    together = niqe(images, model=model)
    torch.testing.assert_close(torch.cat([niqe(image[None], model=model) for image in images]), together, **EXACT)
    torch.testing.assert_close(niqe(images.flip(0), model=model), together.flip(0), **EXACT)
    broken = images.clone()
    broken[2, 0, 3, 3], broken[4] = torch.inf, 0.5
    scores = niqe(broken, model=model)
    assert scores.isnan().tolist() == [False, False, True, False, True, False, False]
    torch.testing.assert_close(scores[[0, 1, 3, 5, 6]], together[[0, 1, 3, 5, 6]], **EXACT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (2, 139, 139)])
def test_one_bad_pixel_gives_nan(value, place):
    """One NaN or infinite pixel makes that score NaN, even outside of the whole blocks."""
    images = noisy(8, 140, 140, batch=2)
    images[(0, *place)] = value
    assert niqe(images).isnan().tolist() == [True, False]


def test_images_without_statistics_are_nan():
    """Flat images, and a single varying block, have no covariance: NaN, no exception."""
    flat = torch.stack([torch.full((3, 144, 144), level) for level in (0.0, 0.3, 1.0)])
    one_block = torch.zeros(1, 3, 144, 144)
    one_block[..., 8:40, 8:40] = noisy(9, 32, 32)
    assert niqe(torch.cat([flat, one_block])).isnan().all()


def test_partly_flat_and_repeating_images_have_a_score():
    """Flat blocks are left out; identical blocks have zero covariance, which the model's own makes invertible."""
    half_flat = noisy(10, 192, 192)
    half_flat[..., :96] = 0.0
    tiled = noisy(11, 48, 48).repeat(1, 1, 4, 4)
    scores = niqe(torch.cat([half_flat, tiled]))
    assert scores.isfinite().all()
    assert (scores > 0).all()


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    height=st.integers(96, 160),
    width=st.integers(96, 160),
    density=st.sampled_from([0.0005, 0.01, 0.3, 1.0]),
    scale=st.sampled_from([1e-30, 1 / 255, 1.0, 255.0, 1e30]),
)
def test_scores_are_never_negative_or_infinite(seed, height, width, density, scale):
    """Sparse dots, dense noise, tiny and huge values give a number >= 0 or NaN."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, height, width, generator=generator)
    images = images * (torch.rand(2, 1, height, width, generator=generator) < density) * scale
    scores = niqe(images)
    assert scores.shape == (2,)
    assert (scores.isnan() | ((scores >= 0) & scores.isfinite())).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images_are_computed_in_fp32(dtype):
    """Half-precision images score as their float32 copies do."""
    images = noisy(12, 96, 144).to(dtype)
    torch.testing.assert_close(niqe(images), niqe(images.float()), **EXACT)


def test_caller_settings_do_not_matter():
    """Autocast, the default dtype and grad mode leave the score as it is, and no graph is built."""
    images = noisy(13, 96, 144).requires_grad_()
    expected = niqe(images)
    assert not expected.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        torch.testing.assert_close(niqe(images), expected, **EXACT)
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(niqe(images), expected, **EXACT)
    finally:
        torch.set_default_dtype(torch.float32)


def test_same_scores_from_threads():
    """Concurrent calls neither race nor see each other."""
    batches = [noisy(seed, 100, 100, batch=2) for seed in range(6)]
    expected = [niqe(batch) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        for got, want in zip(pool.map(niqe, batches), expected):
            torch.testing.assert_close(got, want, **EXACT)


def test_out_of_range_luma_saturates():
    """A decoder's overshoot is read like an 8-bit file."""
    gray = noisy(14, 96, 96).mean(1, keepdim=True).expand(-1, 3, -1, -1) * 1.3 - 0.15
    torch.testing.assert_close(niqe(gray), niqe(gray.clamp(0, 1)), **EXACT)


def test_empty_batch():
    """No images give no scores."""
    assert niqe(torch.empty(0, 3, 96, 96)).shape == (0,)


def test_errors_say_what_to_do():
    """Too small for the metric, too small for the model's blocks, model elsewhere."""
    with pytest.raises(ValueError, match=f"H, W >= {MIN_SIDE}, got \\[1, 3, 95, 200\\]"):
        niqe(torch.rand(1, 3, 95, 200))
    model = packaged_model(torch.device("cpu"))
    large = NaturalModel(model.mean, model.covariance, 96)
    with pytest.raises(ValueError, match="two blocks of 96x96"):
        niqe(torch.rand(1, 3, 128, 128), model=large)
    with pytest.raises(ValueError, match=r"model\.to\(images\.device\)"):
        niqe(torch.rand(1, 3, 128, 128), model=model.to("meta"))


@on_devices
def test_any_device_agrees_and_never_waits(device):
    """The same scores as on the CPU, from a call that never synchronises with the host once the model is loaded."""
    images = noisy(15, 256, 320, batch=4)
    images[3] = 0.0
    there = images.to(device)
    niqe(there)
    with no_waits():
        scores = niqe(there)
    torch.testing.assert_close(scores.cpu(), niqe(images), **FORMULA_FP32, equal_nan=True)


def test_model_survives_pickling():
    """A reward that holds a model can be sent to another process, before or after its first use."""
    model = singular_model()
    images = noisy(16, 96, 96)
    expected = niqe(images, model=model)
    stream = io.BytesIO(pickle.dumps(model))
    torch.testing.assert_close(niqe(images, model=pickle.load(stream)), expected, **EXACT)


# ---- the statistics that it compares with


def model_of(value=1.0, block_size=48):
    covariance = torch.eye(36, dtype=torch.float64) * value
    return NaturalModel(torch.arange(36, dtype=torch.float64), covariance, block_size)


def test_save_and_load_round_trip(tmp_path):
    """What `load` returns is what `save` was given, bit for bit, and the file says where it comes from."""
    path = tmp_path / "model.safetensors"
    model_of(2.5, block_size=32).save(path, {"photos": "mine"})
    loaded = NaturalModel.load(path)
    assert loaded.block_size == 32
    torch.testing.assert_close(loaded.mean, model_of().mean, **EXACT)
    torch.testing.assert_close(loaded.covariance, model_of(2.5).covariance, **EXACT)
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["photos"] == "mine"


def test_packaged_model_states_its_provenance():
    """The shipped file names free photographs, options and versions, and can be inverted."""
    path = next((p for p in iqareward.__path__), None)
    with safe_open(f"{path}/functional/data/{PACKAGED}", framework="pt") as file:
        metadata = file.metadata()
    assert {"photos", "source", "options", "versions", "command", "date"} <= set(metadata)
    assert "CC0" in metadata["photos"]
    assert "motorcycle" not in metadata["photos"]
    model = packaged_model(torch.device("cpu"))
    assert model.block_size == 48
    assert model.is_definite
    assert model is packaged_model(torch.device("cpu")), "loaded once, not per call"


def test_packaged_model_is_what_the_fit_gives():
    """Refitting on the same photographs gives the shipped statistics (up to the torch that ran the fit)."""
    data = pytest.importorskip("skimage.data")
    photos = []
    for name in ("astronaut", "coffee", "chelsea", "camera", "rocket"):
        pixels = torch.from_numpy(getattr(data, name)()).float() / 255
        pixels = pixels if pixels.ndim == 3 else pixels.unsqueeze(-1).expand(-1, -1, 3)
        photos.append(pixels.permute(2, 0, 1))
    fitted, packaged = fit_natural_model(photos), packaged_model(torch.device("cpu"))
    torch.testing.assert_close(fitted.mean, packaged.mean, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(fitted.covariance, packaged.covariance, rtol=1e-6, atol=1e-8)


def test_npz_of_published_parameters(tmp_path):
    """The layout of the published file is read; block size 96 is what it was fitted on."""
    path = tmp_path / "params.npz"
    np.savez(path, mu_pris_param=np.arange(36.0)[None], cov_pris_param=np.eye(36), gaussian_window=np.eye(7))
    model = NaturalModel.from_npz(path)
    assert model.block_size == 96
    torch.testing.assert_close(model.mean, model_of().mean, **EXACT)


def test_npz_refuses_pickles_missing_and_broken_arrays(tmp_path):
    """A parameter file may not run code, and a broken one may not become a model."""
    path = tmp_path / "params.npz"
    np.savez(path, mu_pris_param=np.array([{}], dtype=object), cov_pris_param=np.eye(36))
    with pytest.raises(ValueError, match="allow_pickle"):
        NaturalModel.from_npz(path)
    np.savez(path, mu_pris_param=np.zeros(36))
    with pytest.raises(ValueError, match="cov_pris_param"):
        NaturalModel.from_npz(path)
    for mean, covariance, message in (
        (np.full(36, np.nan), np.eye(36), "finite"),
        (np.zeros(35), np.eye(36), "mean"),
        (np.zeros(36, complex), np.eye(36), "numbers"),
        (np.array(["a"] * 36), np.eye(36), "numbers"),
        (np.zeros(36), np.zeros((36, 36)), "variances"),
        (np.zeros(36), -np.eye(36), "variances"),
        (np.zeros(36), np.triu(np.ones((36, 36))), "symmetric"),
    ):
        np.savez(path, mu_pris_param=mean, cov_pris_param=covariance)
        with pytest.raises(ValueError, match=rf"params\.npz.*{message}|{message}.*params\.npz"):
            NaturalModel.from_npz(path)
    with pytest.raises(FileNotFoundError):
        NaturalModel.from_npz(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("kind", ["safetensors", "npz", "compressed"])
def test_damaged_files_raise_nothing_else(tmp_path, kind):
    """A damaged parameter file is a ValueError that names it, or still holds statistics that are finite."""
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.npz")
    if kind == "safetensors":
        model_of().save(path, {})
    else:
        save = np.savez if kind == "npz" else np.savez_compressed
        save(path, mu_pris_param=np.arange(36.0), cov_pris_param=np.eye(36))
    data, rng = path.read_bytes(), random.Random(0)
    for number in range(100):
        damaged, at = bytearray(data), rng.randrange(min(len(data), rng.choice([600, len(data)])))
        if number % 2:
            damaged[at] ^= 1 << rng.randrange(8)
        else:
            del damaged[at : at + rng.choice([1, 100, len(data)])]
        path.unlink()
        path.write_bytes(damaged)
        try:
            loaded = NaturalModel.load(path) if kind == "safetensors" else NaturalModel.from_npz(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert loaded.mean.isfinite().all()
            assert loaded.covariance.isfinite().all()


@pytest.mark.parametrize("block_size", [None, "", "48.0", "-48", "9" * 5000, "15"])
def test_block_size_of_a_file_is_checked(tmp_path, block_size):
    """A file without the size of its blocks, or with an impossible one, is named."""
    path = tmp_path / "model.safetensors"
    tensors = {"mean": torch.zeros(36, dtype=torch.float64), "covariance": torch.eye(36, dtype=torch.float64)}
    save_file(tensors, path, metadata=None if block_size is None else {"block_size": block_size})
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        NaturalModel.load(path)


def test_model_checks_its_fields():
    """Wrong shapes, dtypes and block sizes are errors at construction, not wrong scores later."""
    good = model_of()
    with pytest.raises(ValueError, match=r"mean \[36\]"):
        NaturalModel(good.mean[:35], good.covariance, 48)
    with pytest.raises(TypeError, match="float64"):
        NaturalModel(good.mean.float(), good.covariance, 48)
    with pytest.raises(ValueError, match="even"):
        NaturalModel(good.mean, good.covariance, 47)


def test_fit_needs_more_blocks_than_features():
    """Too few sharp blocks would give a covariance without an inverse: an error that says how many there were."""
    photo = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="more than 36 sharp blocks, got"):
        fit_natural_model([photo], scales=(1.0,))
    with pytest.raises(ValueError, match="got 0"):
        fit_natural_model([])


def test_fit_gives_an_invertible_model_of_its_photographs(photographs):
    """Three photographs are enough for a model with their block size that can score the fourth."""
    model = fit_natural_model(list(photographs[:3]), block_size=32)
    assert model.block_size == 32
    assert model.is_definite
    assert iqareward.functional.niqe(photographs[3:], model=model).isfinite().all()
