"""A run survives being killed at any moment, and its folder takes no other run and no other settings unnoticed."""

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from iqareward.advantages import RewardMemory
from iqareward.diffusion import (
    Degradation,
    DiffusionNFT,
    PixelPolicy,
    RolloutConfig,
    StoredPairs,
    TrainConfig,
)
from iqareward.diffusion.checkpoint import (
    load_state,
    load_trained_weights,
    previous,
    save_state,
    trained_weights,
)
from iqareward.rewards.metric import NoReference
from iqareward.schedules import Schedule, constant
from iqareward.weighting import AdaptiveWeighter
from tests.diffusion.tiny import TinyPairs, pixel_policy, unet
from tests.diffusion.train_tiny import contrast, trainer
from tests.tolerances import EXACT

ROOT = Path(__file__).parents[2]


def assert_same_run(run, expected):
    """The same history and the same weights, bit for bit."""
    assert run.history == expected.history
    torch.testing.assert_close(trained_weights(run.policy.model), trained_weights(expected.policy.model), **EXACT)


@pytest.mark.slow
def test_twelve_kills_change_nothing(tmp_path):
    """After each there is a whole checkpoint or none yet; the run ends where one does that nothing has happened to."""
    folder = tmp_path / "killed"
    program = [sys.executable, "-W", "ignore", "-m", "tests.diffusion.train_tiny", str(folder), "12"]
    said = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert said.returncode == 0, said.stderr
    reached = [int(updates) for updates in said.stdout.split()]
    assert len(reached) == 12
    assert reached == sorted(reached), "a checkpoint was lost"
    runs = [trainer(place, sft_scale="balanced") for place in (folder, tmp_path / "unbroken")]
    for run, resume in zip(runs, (True, False), strict=True):
        run.train(max(reached) + 2, save_every=1, validate_every=2, resume=resume)
    assert_same_run(*runs)
    assert (folder / "history.jsonl").read_text() == (tmp_path / "unbroken" / "history.jsonl").read_text()
    assert not list(folder.glob("*.part"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder of a run of two updates."""
    from accelerate.state import AcceleratorState

    folder = tmp_path_factory.mktemp("begun")
    trainer(folder).train(2, save_every=1)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def files_of(folder):
    """Content by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_a_folder_with_a_run_is_not_written_over(begun):
    """Without `resume` it is refused with what to do, and no file changes."""
    before = files_of(begun)
    with pytest.raises(ValueError, match="resume=True, or choose another folder"):
        trainer(begun).train(1)
    assert files_of(begun) == before


def test_a_folder_in_use_is_refused(tmp_path):
    """As long as another process holds it, and no longer, however that process ends."""
    program = "import filelock, sys; f = filelock.FileLock(sys.argv[1]); f.acquire(); print(1, flush=True); input()"
    command = [sys.executable, "-c", program, str(tmp_path / ".lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline()
        with pytest.raises(ValueError, match="in use by another run"):
            trainer(tmp_path, validation=None).train(1)
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    trainer(tmp_path, validation=None).train(1)


SLOWER = {"learning_rate": 1e-3, "inputs_per_update": 4, "rows_at_once": 4, "balance_every": 2, "ema_decay": 0.9}
CHANGES = {
    "seed": {"seed": 1},
    "reward.name": {"reward": NoReference(contrast, name="other", higher_is_better=True)},
    "train_config.learning_rate": {"train_config": TrainConfig(**SLOWER | {"learning_rate": 1e-4})},
    "train_config.inputs_per_update": {"train_config": TrainConfig(**SLOWER | {"inputs_per_update": 8})},
    "train_config.ema_decay": {"train_config": TrainConfig(**SLOWER | {"ema_decay": 0.5})},
    "rollout_config.num_steps": {"rollout_config": RolloutConfig(group_size=2, num_steps=4, inputs_at_once=2)},
    "objective": {"objective": DiffusionNFT()},
    "weighter.steepness": {"weighter": AdaptiveWeighter(steepness=3.0)},
    "weighter": {"weighter": Schedule(partial(constant, share=0.5))},
    "memory": {"memory": None},
    "memory.length": {"memory": RewardMemory(16, length=5)},
    "validation": {"validation": None},
    "process.scheduler.prediction_type": {"policy": pixel_policy("v_prediction")},
    "policy.residual": {"policy": PixelPolicy(unet(), pixel_policy("sample").process, residual=True)},
    "pairs.seed": {"pairs": TinyPairs(16, seed=9)},
    "pairs.degradation.max_noise": {"pairs": TinyPairs(16, Degradation(max_noise=9.0))},
    "pairs": {"pairs": StoredPairs.of(TinyPairs(16))},
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_named(begun, name):
    """Each by its name, before anything is loaded or written."""
    before, run = files_of(begun), trainer(begun, **CHANGES[name])
    weights = trained_weights(run.policy.model)
    with pytest.raises(ValueError, match=rf"other settings.*\b{name}\b.* was .*allow_changes=True"):
        run.train(3, resume=True)
    assert files_of(begun) == before
    assert (run.updates, run.history) == (0, [])
    for key, weight in trained_weights(run.policy.model).items():
        torch.testing.assert_close(weight, weights[key], **EXACT)


def test_a_memory_that_was_not_there_is_named_and_can_be_allowed(tmp_path):
    """It starts empty; the new learning rate holds, and so do the averages that are new."""
    options = TrainConfig(learning_rate=1e-3, inputs_per_update=4)
    trainer(tmp_path, memory=None, train_config=options).train(1)
    with pytest.raises(ValueError, match=r"memory was None.*ema_decay|ema_decay.*memory was None"):
        trainer(tmp_path).train(2, resume=True)
    run = trainer(tmp_path, train_config=TrainConfig(learning_rate=1e-2, inputs_per_update=4, ema_decay=0.5))
    assert run.load(allow_changes=True)
    saved = load_state(tmp_path / "checkpoint.pt")["learner"]
    assert [group["lr"] for group in run.learner.updates.optimizer.param_groups] == [1e-2]
    with run.learner.averaged():
        for name, weight in trained_weights(run.policy.model).items():
            torch.testing.assert_close(weight, saved["model"][name], **EXACT)
    run = trainer(tmp_path, train_config=TrainConfig(learning_rate=1e-2, inputs_per_update=4, ema_decay=0.5))
    history = run.train(2, resume=True, allow_changes=True)
    assert [line["update"] for line in history] == [0, 1, 2]
    again = trainer(tmp_path, train_config=run.train_config)
    assert again.train(2, resume=True) == history  # now these are its settings


@pytest.mark.parametrize("part", ["model", "weighter"])
def test_a_part_that_cannot_be_loaded_leaves_the_trainer_as_it_was(begun, tmp_path, part):
    """Another network, or a state that its part refuses after others were loaded: an error, and nothing has changed."""
    policy = pixel_policy()
    if part == "model":
        policy.model = unet(channels=16)
    run = trainer(begun, policy=policy)
    if part == "weighter":
        plain = run.weighter.load_state_dict
        run.weighter.load_state_dict = lambda state: plain(state) if state["anchor"] is None else refuse()
    before = run.learner.state_dict()
    with pytest.raises(ValueError, match="expected"):
        run.train(3, resume=True)
    after = run.learner.state_dict()
    for key, weight in before["model"].items():
        torch.testing.assert_close(after["model"][key], weight, **EXACT)
    for old, new in zip(before["ema"]["shadow_params"], after["ema"]["shadow_params"], strict=True):
        torch.testing.assert_close(new, old, **EXACT)
    assert after["updates"]["optimizer"]["state"] == before["updates"]["optimizer"]["state"] == {}
    assert (run.updates, run.history) == (0, [])


def refuse():
    raise ValueError("expected another state")


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "something else", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_older_one_offered(begun, tmp_path, damage):
    """By name; moved to its place the older one continues with the numbers of the unbroken run."""
    for path in begun.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "checkpoint.pt"
    content = bytearray(file.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 4
    file.write_bytes({"truncated": content[:-100], "something else": b"hello"}.get(damage, content))
    if damage == "missing":  # as between two renames, where a file system has no hard links
        file.unlink()
    else:
        with pytest.raises(ValueError, match=r"checkpoint\.pt expected.*checkpoint-previous\.pt of update 1, is whole"):
            trainer(tmp_path).train(2, save_every=1, resume=True)
        previous(file).replace(file)
    run, unbroken = trainer(tmp_path), trainer(begun)
    run.train(2, save_every=1, resume=True)
    unbroken.train(2, resume=True)
    assert_same_run(run, unbroken)


def test_without_an_older_one_a_damaged_checkpoint_says_to_start_anew(tmp_path):
    """There is nothing to offer."""
    (tmp_path / "checkpoint.pt").write_bytes(b"hello")
    with pytest.raises(ValueError, match="Start anew"):
        trainer(tmp_path).train(1, resume=True)


def test_processes_that_see_other_files_stop(begun, monkeypatch):
    """All of them, instead of some that go on and some that start anew, as on machines without a shared folder."""
    monkeypatch.setattr("accelerate.utils.gather_object", lambda found: [*found, None])
    with pytest.raises(ValueError, match=r"same files.*\['checkpoint.pt', None\].*all machines share"):
        trainer(begun).train(3, resume=True)


def test_a_finished_run_stays_as_it_is(begun):
    """Resumed with no more updates it writes no checkpoint and returns its history."""
    before = (begun / "checkpoint.pt").read_bytes()
    assert [line["update"] for line in trainer(begun).train(2, resume=True)] == [0, 1, 2]
    assert (begun / "checkpoint.pt").read_bytes() == before


FOREIGN = {"another program's": {"a": 1}, "no settings": {"updates": 1, "history": []}, "no model": {"learner": {}}}


@pytest.mark.parametrize("content", FOREIGN)
def test_a_whole_file_of_something_else_is_refused(begun, tmp_path, content):
    """It has the right checksum and lacks what a checkpoint has: an error that names the file."""
    state = FOREIGN[content]
    if content == "no model":
        state = load_state(begun / "checkpoint.pt") | state
    save_state(tmp_path / "checkpoint.pt", state)
    run = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt expected a checkpoint of"):
        run.train(3, resume=True)
    assert (run.updates, run.history) == (0, [])


def test_a_linked_checkpoint_keeps_its_predecessor(tmp_path):
    """Both files are where the link leads, and the run goes on from there."""
    store, folder = tmp_path / "store", tmp_path / "run"
    store.mkdir(), folder.mkdir()
    (folder / "checkpoint.pt").symlink_to(store / "checkpoint.pt")
    trainer(folder).train(2, save_every=1)
    assert (folder / "checkpoint.pt").is_symlink()
    assert load_state(folder / "checkpoint.pt")["updates"] == 2
    assert load_state(previous(folder / "checkpoint.pt"))["updates"] == 1
    (store / "checkpoint.pt").unlink()
    assert [line["update"] for line in trainer(folder).train(2, resume=True)] == [0, 1, 2]


def test_a_learning_rate_of_numpy_is_saved_as_a_number(tmp_path):
    """A schedule may compute with NumPy; its checkpoint can be read, and the run goes on exactly."""
    schedule = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: np.cos(step / 4))
    config = TrainConfig(learning_rate=1e-3, inputs_per_update=4, lr_schedule=schedule)
    whole = trainer(tmp_path / "a", train_config=config)
    whole.train(3)
    trainer(tmp_path / "b", train_config=config).train(2)
    again = trainer(tmp_path / "b", train_config=config)
    again.train(3, resume=True)
    torch.testing.assert_close(trained_weights(again.policy.model), trained_weights(whole.policy.model), **EXACT)


def test_the_older_weights_stay_when_a_part_cannot_be_loaded(tmp_path):
    """Those that DiffusionNFT samples with are put back like all others."""
    begun = trainer(tmp_path, objective=DiffusionNFT(num_terms=1))
    begun.train(1)
    fresh = trainer(tmp_path, objective=DiffusionNFT(num_terms=1))
    before = [weight.clone() for weight in fresh.learner.versions.state_dict()["old"]]
    state = load_state(fresh.checkpoint)
    save_state(fresh.checkpoint, state | {"memory": {}})
    with pytest.raises(ValueError, match="cannot be loaded"):
        fresh.load()
    for weight, expected in zip(fresh.learner.versions.state_dict()["old"], before, strict=True):
        torch.testing.assert_close(weight, expected, **EXACT)


def test_a_compiled_model_has_the_checkpoint_of_the_model_itself(tmp_path):
    """Names of weights do not depend on `torch.compile`."""
    policy = pixel_policy()
    names = trained_weights(policy.model).keys()
    policy.model = torch.compile(policy.model, backend="eager")
    assert trained_weights(policy.model).keys() == names
    load_trained_weights(policy.model, trained_weights(pixel_policy().model))


def test_the_reference_comes_from_the_checkpoint(tmp_path):
    """A resumed run is compared with the weights from before RL, whatever the policy is that it is built with."""
    config = TrainConfig(learning_rate=1e-3, inputs_per_update=4, kl_beta=0.1)
    whole = trainer(tmp_path / "a", train_config=config)
    expected = whole.train(3)
    trainer(tmp_path / "b", train_config=config).train(2)
    other = pixel_policy()
    with torch.no_grad():
        next(other.model.parameters()).add_(1.0)
    again = trainer(tmp_path / "b", train_config=config, policy=other)
    assert again.train(3, resume=True)[-1]["kl"] == expected[-1]["kl"] > 0


def test_another_objective_samples_with_the_weights_of_now(tmp_path):
    """A run that goes on with DiffusionNFT takes the trained weights for old, not those that it was built with."""
    begun = trainer(tmp_path)
    begun.train(1)
    again = trainer(tmp_path, objective=DiffusionNFT(num_terms=1))
    again.load(allow_changes=True)
    with again.learner.versions.sampling():
        sampling = trained_weights(again.policy.model)
    for name, weight in trained_weights(begun.policy.model).items():
        torch.testing.assert_close(sampling[name], weight, **EXACT)
