"""Optimisers, learning-rate schedules and ways to distribute that users bring along."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from iqareward.diffusion import DDIM, PixelPolicy, TrainConfig
from iqareward.diffusion.checkpoint import load_state, trained_weights
from iqareward.diffusion.updates import Updates
from tests.diffusion.tiny import pixel_policy, unet
from tests.diffusion.train_tiny import trainer
from tests.tolerances import EXACT


def torchao(weights):
    """Its states are tensors of a class of its own, for weights of 4096 elements and more."""
    return pytest.importorskip("torchao.optim").AdamW8bit(weights, lr=1e-3, block_size=64)


def bitsandbytes(weights):
    """Its states are plain tensors of bytes."""
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(weights, lr=1e-3, min_8bit_size=4096)


def warmup(optimizer):
    """From a tenth of the learning rate to all of it."""
    return torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 4)


def run_of(folder, **options):
    """A run whose network has weights of more than 4096 elements."""
    policy = PixelPolicy(unet(24), DDIM(diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False)))
    config = TrainConfig(inputs_per_update=4, rows_at_once=4, **options)
    return trainer(folder, policy=policy, train_config=config, validation=None)


def resumed_and_whole(folder, **options):
    """A run of three updates, and one that stopped after two and went on in a new trainer."""
    whole = run_of(folder / "whole", **options)
    whole.train(3)
    run_of(folder / "parts", **options).train(2, save_every=1)
    resumed = run_of(folder / "parts", **options)
    resumed.train(3, resume=True)
    return resumed, whole


@pytest.mark.filterwarnings("ignore")  # of other packages, as they are imported
@pytest.mark.parametrize("make", [torchao, bitsandbytes])
def test_an_8_bit_optimiser_trains_and_resumes(make, tmp_path):
    """The weights move, the states have eight bits, and a resumed run ends in the same weights."""
    torch.compiler.set_stance("force_eager")  # compiling takes minutes
    try:
        before = trained_weights(run_of(tmp_path / "start", optimizer=make).policy.model)
        resumed, whole = resumed_and_whole(tmp_path, optimizer=make)
    finally:
        torch.compiler.set_stance("default")
    states = [value for state in whole.learner.updates.optimizer.state.values() for value in state.values()]
    codes = [getattr(value, "codes", value) for value in states if isinstance(value, torch.Tensor)]
    assert any(code.dtype == torch.uint8 for code in codes)
    load_state(resumed.checkpoint)  # which runs no code from the file
    after, expected = trained_weights(resumed.policy.model), trained_weights(whole.policy.model)
    assert any(not torch.equal(before[name], weight) for name, weight in after.items())
    for name, weight in after.items():
        torch.testing.assert_close(weight, expected[name], **EXACT)


def test_a_learning_rate_schedule_resumes(tmp_path):
    """The learning rate follows the schedule and goes on where it was."""
    resumed, whole = resumed_and_whole(tmp_path, learning_rate=1e-3, lr_schedule=warmup)
    for run in (resumed, whole):
        assert run.learner.updates.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * (0.1 + 0.9 * 3 / 4))
    after, expected = trained_weights(resumed.policy.model), trained_weights(whole.policy.model)
    for name, weight in after.items():
        torch.testing.assert_close(weight, expected[name], **EXACT)


@pytest.mark.parametrize(
    ("version", "offload", "said"), [(1, None, "version 2, got 1"), (2, CPUOffloadPolicy(), "cpu_offload")]
)
def test_fsdp_that_cannot_be_saved_is_refused(version, offload, said):
    """Its first version, whose weights are flattened, and weights that wait in CPU memory."""
    plugin = SimpleNamespace(fsdp_version=version, cpu_offload=offload)
    accelerator = SimpleNamespace(distributed_type="DistributedType.FSDP", state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match=said):
        Updates(pixel_policy(), accelerator, torch.optim.SGD, max_grad_norm=1.0)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
def test_other_ways_to_divide_a_model_are_refused(kind):
    """By name, before anything is moved or wrapped."""
    accelerator = SimpleNamespace(distributed_type=f"DistributedType.{kind}")
    with pytest.raises(ValueError, match=kind):
        Updates(pixel_policy(), accelerator, torch.optim.SGD, max_grad_norm=1.0)
