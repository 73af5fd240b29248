"""Autoencoders of diffusers: latents as their pipelines have them, in pieces, with a gradient where one is wanted."""

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from iqareward.diffusion import Autoencoder, add_lora
from iqareward.image_files import read_image
from tests.conftest import center_crop
from tests.diffusion.policies.flow_pipelines import seeded

EXACT = {"rtol": 0.0, "atol": 0.0}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SIZES = {"block_out_channels": (8, 8), "norm_num_groups": 4}
TINY = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
DEEP = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
DEEP |= {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
QWEN = {"dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False], "z_dim": 4}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [1.5, 2.0, 0.5, 3.0]}
BUILD = {
    "kl": lambda: diffusers.AutoencoderKL(**BLOCKS, **SIZES, latent_channels=4, scaling_factor=0.3, shift_factor=0.1),
    "kl-statistics": lambda: diffusers.AutoencoderKL(**BLOCKS, **SIZES, latent_channels=4, **STATISTICS),
    "tiny": lambda: diffusers.AutoencoderTiny(**TINY, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)),
    "qwen": lambda: diffusers.AutoencoderKLQwenImage(8, **QWEN, **STATISTICS),
    "flux2": lambda: diffusers.AutoencoderKLFlux2(**BLOCKS, **SIZES, latent_channels=4),
    "dc": lambda: diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=4, **TINY, **DEEP, scaling_factor=0.4),
    "vq": lambda: diffusers.VQModel(**BLOCKS, **SIZES, latent_channels=3, num_vq_embeddings=64),
}
KINDS = pytest.mark.parametrize("kind", BUILD)


def built(kind, **options) -> Autoencoder:
    """An autoencoder by name, with factor 2."""
    vae = seeded(BUILD[kind], seed=1)
    if kind == "flux2":
        generator = torch.Generator().manual_seed(2)
        vae.bn.running_mean.copy_(torch.randn(16, generator=generator))
        vae.bn.running_var.copy_(torch.rand(16, generator=generator) + 0.5)
    return Autoencoder(vae, **options)


def images(count=3) -> torch.Tensor:
    """Random images, which are not square."""
    return torch.rand(count, 3, 16, 24, generator=torch.Generator().manual_seed(0))


def expected_latents(kind, vae, images):
    """Latents as the pipelines of diffusers scale them, written out for each kind."""
    pixels = 2 * images - 1
    if kind == "tiny":
        return vae.encode(pixels).latents * vae.config.scaling_factor
    if kind == "vq":
        return vae.encode(pixels).latents * vae.config.scaling_factor
    if kind == "dc":
        return vae.encode(pixels).latent * vae.config.scaling_factor
    mean, std = (torch.tensor(STATISTICS[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    if kind == "qwen":
        return (vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2) - mean) / std
    latents = vae.encode(pixels).latent_dist.mode()
    if kind == "kl-statistics":
        return (latents - mean) * vae.config.scaling_factor / std
    if kind == "flux2":
        normalise = torch.nn.BatchNorm2d(16, eps=vae.config.batch_norm_eps, affine=False).eval()
        normalise.load_state_dict(vae.bn.state_dict())
        return normalise(diffusers.Flux2Pipeline._patchify_latents(latents))
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def expected_raw(kind, vae):
    """Encoded and decoded without any scale."""
    pixels = 2 * images() - 1
    if kind == "qwen":
        return vae.decode(vae.encode(pixels.unsqueeze(2)).latent_dist.mode()).sample.squeeze(2)
    found = vae.encode(pixels)
    return vae.decode(found.latents if kind == "tiny" else found.latent).sample


@KINDS
def test_latents_are_scaled_as_in_pipelines(kind) -> None:
    """Shape, scale and shift of each kind, and the way back through the decoder."""
    autoencoder = built(kind)
    latents = autoencoder.encode(images())
    assert latents.shape == (3, *autoencoder.latent_shape(images()))
    assert_close(latents, expected_latents(kind, autoencoder.vae, images()), atol=1e-5, rtol=1e-5)
    decoded = autoencoder.decode(latents)
    assert decoded.shape == images().shape
    assert not decoded.requires_grad
    if kind in ("kl", "kl-statistics", "flux2", "vq"):  # the others' own way back rounds, or needs video
        assert_close(2 * decoded - 1, autoencoder.vae(2 * images() - 1).sample, atol=1e-4, rtol=1e-4)
    else:
        raw = expected_raw(kind, autoencoder.vae)
        assert_close(2 * decoded - 1, raw, atol=1e-4, rtol=1e-4)


@KINDS
def test_pieces_are_the_whole(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image at a time gives the latents, images and gradients of all at once."""
    autoencoder = built(kind)
    autoencoder.vae.double()  # rounding would hide what pieces do, or look like it
    latents = autoencoder.encode(images().double()).requires_grad_()
    decoded = autoencoder.decode(latents)
    gradient = torch.autograd.grad(decoded.square().sum(), latents)[0]
    monkeypatch.setattr("iqareward.diffusion.policies.autoencoders.rows_at_once", lambda *_, **__: 1)
    assert_close(autoencoder.encode(images().double()), latents.detach(), atol=1e-7, rtol=1e-7)
    piecewise = autoencoder.decode(latents)
    assert_close(piecewise, decoded, atol=1e-7, rtol=1e-7)
    assert_close(torch.autograd.grad(piecewise.square().sum(), latents)[0], gradient, atol=1e-7, rtol=1e-7)


@KINDS
def test_checkpointing_gives_the_same_gradient(kind) -> None:
    """Computing activations twice changes memory, not the gradient of images through both halves."""
    gradients = []
    for checkpointed in (True, False):
        autoencoder, pixels = built(kind, checkpointed=checkpointed), images().requires_grad_()
        autoencoder.decode(autoencoder.encode(pixels)).square().sum().backward()
        gradients.append(pixels.grad)
        assert all(weight.grad is None for weight in autoencoder.parameters())
    assert gradients[0].abs().sum() > 0
    assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_an_encoder_with_adapters_trains() -> None:
    """Adapters that are added later get a gradient from encoding, and from nothing without one enabled."""
    autoencoder = built("kl")
    add_lora(autoencoder.vae.encoder, rank=2, targets=["conv_in", "conv1", "to_q"])
    autoencoder(images()).square().sum().backward()
    trained = {name for name, weight in autoencoder.named_parameters() if weight.requires_grad}
    assert trained
    assert trained == {name for name, weight in autoencoder.named_parameters() if weight.grad is not None}
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        assert not autoencoder.encode(images()).requires_grad


@KINDS
def test_bfloat16_stays_close(kind) -> None:
    """A bfloat16 autoencoder takes and gives float32, and its scale is not rounded."""
    exact, half = built(kind), built(kind).to(torch.bfloat16)
    latents = exact.encode(images())
    assert half.encode(images()).dtype == half.decode(latents).dtype == torch.float32
    difference = half.encode(images()) - latents
    assert difference.norm() < 0.05 * latents.norm()


@KINDS
def test_every_part_moves(kind) -> None:
    """After `to`, both halves run on the other device."""
    autoencoder = built(kind).to("meta")
    assert autoencoder.decode(autoencoder.encode(images().to("meta"))).device.type == "meta"


@pytest.mark.parametrize(("kind", "factor"), [("kl", 2), ("flux2", 4), ("qwen", 2), ("dc", 2)])
def test_sides_that_do_not_fit_are_refused(kind, factor) -> None:
    """Odd sides are an error that names the multiple."""
    with pytest.raises(ValueError, match=f"multiples of {factor}, got 15x16"):
        built(kind).encode(torch.zeros(1, 3, 15, 16))


def test_other_modules_are_refused() -> None:
    """What is no autoencoder of diffusers is named when the wrapper is made."""
    with pytest.raises(TypeError, match="got Linear"):
        Autoencoder(torch.nn.Linear(2, 2))


# Channels, and the error that was measured once: 22.7, 26.7 and 25.5 dB.
TAESD = {"taesd": (4, 0.074), "taesd3": (16, 0.045), "taef1": (16, 0.053)}


@pytest.mark.slow
@pytest.mark.parametrize("name", TAESD)
def test_published_weights_reconstruct_photographs(name) -> None:
    """Published tiny autoencoders of SD, SD3 and FLUX.1 bring centres of Kodak images back to their known errors."""
    data = Path(__file__).resolve().parents[4] / "shared" / "data"
    photographs = sorted((data / "kodak24").glob("*.png"))[:8]
    if not photographs:
        pytest.skip("the photographs are not distributed with the repository (no ../shared/data)")
    channels, error = TAESD[name]
    vae = diffusers.AutoencoderTiny(latent_channels=channels)
    for half in ("encoder", "decoder"):
        weights = load_file(data / "weights" / "taesd" / f"{name}_{half}.safetensors")
        getattr(vae, half).layers.load_state_dict(shifted(weights, by=half == "decoder"))
    autoencoder = Autoencoder(vae)
    crops = [center_crop(torch.tensor(read_image(path)).permute(2, 0, 1), 256) for path in photographs]
    pictures = torch.stack(crops).float() / 255
    found = (autoencoder.decode(autoencoder.encode(pictures)).clamp(0, 1) - pictures).square().mean().sqrt()
    assert_close(found, torch.tensor(error), atol=0.002, rtol=0)


def shifted(weights, *, by):
    """Weights under the names of diffusers, which keeps the clamp before the first layer outside of the decoder."""
    names = ((*name.split(".", 1), value) for name, value in weights.items())
    return {f"{int(number) - by}.{rest}": value for number, rest, value in names}
