"""A restorer from scratch: it begins by doing nothing much, survives the disk, and refuses models of another kind."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from iqareward.diffusion.ddim import DDIM
from iqareward.diffusion.pixel import PixelPolicy
from iqareward.diffusion.restorer import build_restorer, load_restorer, save_restorer
from iqareward.diffusion.rollout import rollout
from tests.diffusion.gaussian_policy import TwoSteps
from tests.diffusion.tiny import images, seeded, unet
from tests.tolerances import EXACT


def restored(policy):
    """Two images after two deterministic steps."""
    options = {"ids": [0, 1], "group_size": 1, "num_steps": 2, "eta": 0.0, "seed": 0}
    return policy.decode(rollout(policy, images(2), **options).sample)


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
    policy = PixelPolicy(unet(), TwoSteps())
    with pytest.raises(TypeError, match="`process` is a DDIM, got a TwoSteps"):
        save_restorer(policy, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_are_refused(tmp_path):
    """A file that was cut short, and a weight that is NaN, are refused by the folder's name."""
    save_restorer(build_restorer((8, 8)), tmp_path / "whole")
    file = tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file(weights | {"conv_in.bias": torch.full_like(weights["conv_in.bias"], torch.nan)}, file)
    with pytest.raises(ValueError, match=r"unet has NaN or infinite values in conv_in\.bias"):
        load_restorer(tmp_path / "whole")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot load .*unet"):
        load_restorer(tmp_path / "whole")


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
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        PixelPolicy(unet(), DDIM(diffusers.DDIMScheduler()), residual=True)


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
