"""Fitting, storing and loading the statistics that NIQE compares with."""

import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import iqareward
from iqareward.functional.niqe import PACKAGED, NaturalModel, fit_natural_model, packaged_model
from tests.tolerances import EXACT


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
