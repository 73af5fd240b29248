"""A restorer from scratch: it begins by doing nothing much, survives the disk, and refuses models of another kind."""

import json
import math
import random

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from iqareward.diffusion import (
    DDIM,
    IRSDE,
    Batch,
    FlowCPS,
    Noise,
    PixelPolicy,
    ResShift,
    build_restorer,
    load_restorer,
    rollout,
    save_restorer,
)
from tests.diffusion.tiny import images, seeded, unet
from tests.tolerances import EXACT


def restored(policy):
    """Two images after two deterministic steps."""
    noise = Noise((0, 1))
    condition = policy.condition(Batch(noise.ids, images(2)), noise)
    return policy.decode(rollout(policy, condition, noise, num_steps=2, eta=0.0).sample, condition)


def test_what_was_saved_is_what_is_loaded(tmp_path):
    """Weights, schedule and whether the answer is a change: the restorations are the same to the bit."""
    policy = build_restorer((8, 16), seed=3)
    save_restorer(policy, tmp_path)
    again = load_restorer(tmp_path)
    assert again.residual
    torch.testing.assert_close(restored(again), restored(policy), **EXACT)
    assert again.process.schedule(3) == policy.process.schedule(3)


def test_another_process_is_not_saved(tmp_path):
    """A folder cannot hold a sampling process that is no DDIM: the policy is refused before anything is written."""
    policy = PixelPolicy(unet(), FlowCPS(diffusers.FlowMatchEulerDiscreteScheduler()))
    with pytest.raises(TypeError, match="`process` is a DDIM, got a FlowCPS"):
        save_restorer(policy, tmp_path)
    assert list(tmp_path.iterdir()) == []


WEIGHTS, SCHEDULER = "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w["conv_in.bias"].fill_(torch.nan), r"NaN or infinite values in conv_in\.bias"),
        (lambda w: w.pop("conv_in.weight"), r"lacks conv_in\.weight"),
        (lambda w: w.update({"conv_in.weights": w.pop("conv_in.weight")}), r"lacks conv_in\.weight"),
        (lambda w: w.update({"conv_in.weight": w["conv_in.weight"].to(torch.int8)}), r"conv_in\.weight as torch\.int8"),
        (lambda w: w.update({"conv_in.weight": w["conv_in.weight"][:4].clone()}), r"conv_in\.weight of shape \[4"),
        (lambda w: w.update({"conv_new.weight": torch.ones(1)}), r"holds conv_new\.weight"),
    ],
)
def test_damaged_weights_are_refused(tmp_path, change, message):
    """A weight that is missing, renamed, quantised, misshapen, unknown or NaN is named, with its file."""
    save_restorer(build_restorer((8, 8)), tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    change(weights)
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=rf"diffusion_pytorch_model\.safetensors .*{message}"):
        load_restorer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (SCHEDULER, "{"),
        (SCHEDULER, '{"num_train_timesteps": 0}'),
        (SCHEDULER, '{"timestep_spacing": "another"}'),
        (SCHEDULER, '{"beta_schedule": "another"}'),
        (SCHEDULER, '{"beta_start": NaN}'),
        ("unet/config.json", "{}"),
        ("unet/config.json", "[]"),
        ("restorer.json", "{}"),
        ("restorer.json", "[]"),
        ("restorer.json", '{"residual": "false"}'),
        (WEIGHTS, "{"),
    ],
)
def test_damaged_files_are_refused(tmp_path, file, content):
    """Whatever diffusers would raise, or take as it is, is an error that names the file."""
    save_restorer(build_restorer((8, 8)), tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=str(tmp_path / file)):
        load_restorer(tmp_path)


def _mutated(content: bytes, rng: random.Random) -> bytes:
    """Some bytes replaced, removed or repeated, the front or the back cut off, or one setting dropped or replaced."""
    kind, place = rng.randrange(6), rng.randrange(len(content))
    match kind:
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
        case 2:
            return content[:place] + content[place + rng.randrange(1, 20) :]
        case 3:
            return content[: place + 1] + content[place:]
    if content[:1] != b"{":
        return content[place:]
    settings = json.loads(content)
    key = rng.choice(sorted(settings))
    settings[key] = rng.choice([None, True, -1, 0, 3, 0.5, "", "text", [], {}, [1], math.nan])
    if kind == 4:
        del settings[key]
    return json.dumps(settings).encode()


@pytest.mark.filterwarnings("ignore")  # what diffusers and numpy say of impossible settings
def test_mutated_folders_are_loaded_or_refused(tmp_path):
    """Of 150 damaged folders each is loaded, or refused with an error that names one of its files."""
    rng = random.Random(0)
    save_restorer(build_restorer((8, 8)), tmp_path)
    files = ["unet/config.json", SCHEDULER, "restorer.json", WEIGHTS]
    refused = 0
    for _ in range(150):
        path = tmp_path / rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(_mutated(content, rng))
        try:
            load_restorer(tmp_path)
        except ValueError as error:
            assert any(str(tmp_path / file) in str(error) for file in files)
            refused += 1
        path.write_bytes(content)
    assert 50 < refused < 150


def test_seeds_and_the_callers_random_numbers():
    """Another seed gives other weights, and building draws none of the caller's random numbers."""
    before = torch.random.get_rng_state()
    first, same, other = (build_restorer((8, 8), seed=seed).model.conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_residual_answer_is_added_to_the_degraded_image():
    """A network that answers 0 leaves the image as it is."""
    policy = build_restorer((8, 8))
    with torch.no_grad():
        policy.model.conv_out.weight.zero_()
        policy.model.conv_out.bias.zero_()
    torch.testing.assert_close(restored(policy), images(2), rtol=0.0, atol=1e-6)


def test_only_models_of_the_sample_are_residual():
    """With noise or v as the answer it would mean nothing."""
    with pytest.raises(ValueError, match="prediction_type is 'sample', got 'epsilon'"):
        PixelPolicy(unet(), DDIM(diffusers.DDIMScheduler()), residual=True)
    assert PixelPolicy(unet(), ResShift(), residual=True).residual
    with pytest.raises(ValueError, match="got 'epsilon'"):
        PixelPolicy(unet(), IRSDE(), residual=True)


def test_a_pipeline_of_diffusers_is_loaded(tmp_path):
    """Its UNet and its schedule, without any file of ours; then the answer is no change."""
    network = unet()
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path)
    policy = load_restorer(tmp_path)
    assert not policy.residual
    assert policy.process.scheduler.config.prediction_type == "v_prediction"
    torch.testing.assert_close(policy.model.conv_in.weight, network.conv_in.weight, **EXACT)


def test_other_folders_are_refused(tmp_path):
    """An empty one, and a model that does not see the degraded image."""
    with pytest.raises(ValueError, match=r"hold unet/config\.json"):
        load_restorer(tmp_path)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    blind = seeded(lambda: diffusers.UNet2DModel(block_out_channels=(8,), norm_num_groups=4, **blocks))
    diffusers.DDPMPipeline(blind, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"6 channels in .* got 3 and 3"):
        load_restorer(tmp_path)
