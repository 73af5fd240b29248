"""Non-finite values anywhere in a run: no good weights are lost, and the run says what was wrong or goes on."""

import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from iqareward.diffusion import (
    FeedForwardPolicy,
    RolloutConfig,
    StoredPairs,
    TrainConfig,
    TrainingError,
    Validation,
    build_restorer,
    save_restorer,
    supervised,
)
from iqareward.diffusion.checkpoint import load_state, previous, trained_weights
from iqareward.diffusion.finite import require_finite, step_if_finite
from iqareward.functional.psnr import psnr
from iqareward.monitor import HackingMonitor
from iqareward.rewards.metric import NoReference
from tests.diffusion.tiny import TinyPairs, images
from tests.diffusion.train_tiny import contrast, experience_of, trainer, use_reward
from tests.tolerances import EXACT

KINDS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
PLACES = {"loss": "inf", "gradient": "-inf", "reward": "-inf", "reference": "inf", "degraded": "-inf", "EMA": "inf"}
INJECTIONS = [*((place, kind) for place, sign in PLACES.items() for kind in ("nan", sign))]
INJECTIONS += [("learning rate", 1e30), ("learning rate", 1e37)]
BAD_UPDATE, UPDATES = 1, 3  # the second of three


class BadPixel:
    """Pairs of which one image has a bad pixel, as long as `active` says so."""

    def __init__(self, pairs, place, value, active):
        self.pairs, self.place, self.value, self.active = pairs, place, value, active

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        item = {name: image.clone() for name, image in self.pairs[index].items()}
        if self.active() and index == self.active.bad:
            item["gt" if self.place == "reference" else "lq"][0, 3, 3] = self.value
        return item


def inject(run, place, kind):
    """Put the value in one place of the second update of `run`."""

    def now():
        return run.updates == BAD_UPDATE

    now.bad = run.order.ids(BAD_UPDATE)[1]
    value, policy, learner = KINDS.get(kind), run.policy, run.learner
    if place == "loss":  # one row of one forward pass overflows
        plain = policy.sft_loss

        def overflowing(*arguments):
            loss = plain(*arguments)
            return torch.cat([loss[:1] * value, loss[1:]]) if now() else loss

        policy.sft_loss = overflowing
    elif place == "gradient":
        learner.weights[0].register_hook(lambda gradient: gradient * value if now() else gradient)
    elif place == "reward":
        use_reward(run, Broken(run.rewards["reward"], value, now))
    elif place in ("reference", "degraded"):
        run.pairs = BadPixel(run.pairs, place, value, now)
    elif place == "EMA":
        plain = learner.ema.step

        def poisoned(weights):
            plain(weights)
            if now():
                learner.ema.shadow_params[0].view(-1)[0] = value

        learner.ema.step = poisoned
    else:
        for group in learner.updates.optimizer.param_groups:
            group["lr"] = kind


class Broken:
    """A reward that gives `value` for every image, as long as `active` says so; what a dead server does."""

    def __init__(self, reward, value, active):
        self.reward, self.value, self.active, self.name = reward, value, active, reward.name

    def __call__(self, images, references=None):
        scores = self.reward(images)
        return torch.full_like(scores, self.value) if self.active() else scores


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run that nothing happens to."""
    from accelerate.state import AcceleratorState

    run = trainer(tmp_path_factory.mktemp("clean"))
    run.train(UPDATES, save_every=1, validate_every=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


@pytest.mark.filterwarnings("ignore:update 2:RuntimeWarning")
@pytest.mark.parametrize(("place", "kind"), INJECTIONS)
def test_no_run_loses_its_last_good_weights(tmp_path, clean, place, kind):
    """It goes on past the bad update or stops; then the checkpoint continues with the numbers of a clean run."""
    run = trainer(tmp_path)
    inject(run, place, kind)
    fatal = place in ("EMA", "learning rate")
    if fatal:
        with pytest.raises(TrainingError, match="not finite"):
            run.train(UPDATES, save_every=1, validate_every=2)
    else:
        run.train(UPDATES, save_every=1, validate_every=2)
        bad, after = run.history[BAD_UPDATE + 1 :]
        assert bad["skipped"] == (place in ("loss", "gradient"))
        assert bad["scored"] == {"reward": 0, "reference": 0.75, "degraded": 0.75}.get(place, 1)
        assert bad["left_out"] == (place in ("reference", "degraded"))
        assert bad["alarms"]
        assert (after["skipped"], after["scored"], after["left_out"]) == (0, 1, 0)
        require_finite("the update after", after)
    learning_rate = place == "learning rate"  # it was wrong from the first update on
    good = 1 if learning_rate else BAD_UPDATE + 1
    assert repr(run.history[:good]) == repr(clean.history[:good])
    saved = load_state(tmp_path / "checkpoint.pt")
    assert saved["updates"] == (good - 1 if fatal else UPDATES)
    require_finite("the checkpoint", saved["learner"])
    if fatal:
        again = trainer(tmp_path)
        again.train(UPDATES, save_every=1, validate_every=2, resume=True)
        assert again.history == clean.history
        torch.testing.assert_close(trained_weights(again.policy.model), trained_weights(clean.policy.model), **EXACT)


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing_that_learns(tmp_path, place):
    """Weights, their averages and the optimiser are those from before, and the inputs are named."""
    run = trainer(tmp_path, validation=None)
    run.calibrate()
    inject(run, place, "nan")
    run.update()
    before = run.learner.state_dict()
    before = {name: [part.clone() for part in tensors_of(before[name])] for name in ("model", "updates", "ema")}
    with pytest.warns(RuntimeWarning, match="update 2: skipped") as told:
        record = run.update()
    assert record["skipped"] == 1
    after = run.learner.state_dict()
    for name, tensors in before.items():
        for old, new in zip(tensors, tensors_of(after[name]), strict=True):
            torch.testing.assert_close(new, old, **EXACT)
    ids = run.order.ids(BAD_UPDATE)
    named = [ids[0]] if place == "loss" else sorted(ids)
    assert str(named) in str(told[0].message)


def tensors_of(state):
    """All tensors of a state, in their order."""
    if isinstance(state, torch.Tensor):
        return [state]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for child in children for tensor in tensors_of(child)]


@pytest.mark.filterwarnings("ignore:update:RuntimeWarning")
@pytest.mark.parametrize("place", ["gradient", "reward"])
def test_failures_in_a_row_end_the_run(tmp_path, place):
    """After as many as the option allows, with an error that names inputs; the last good checkpoint stays."""
    options = TrainConfig(learning_rate=1e-3, inputs_per_update=4, max_failed_updates=2)
    run = trainer(tmp_path, train_config=options, validation=None)
    if place == "gradient":
        run.learner.weights[0].register_hook(lambda gradient: gradient * (torch.nan if run.updates > 1 else 1))
    else:
        use_reward(run, Broken(run.rewards["reward"], float("inf"), lambda: run.updates > 1))
    with pytest.raises(TrainingError, match="2 updates in a row failed") as error:
        run.train(9, save_every=1)
    assert str(sorted(run.order.ids(3))) in str(error.value) or str(run.order.ids(3)) in str(error.value)
    assert [line["update"] for line in run.history] == [0, 1, 2, 3]
    assert load_state(tmp_path / "checkpoint.pt")["updates"] == 2
    assert load_state(previous(tmp_path / "checkpoint.pt"))["updates"] == 1


@pytest.mark.filterwarnings("ignore:update:RuntimeWarning")
def test_a_good_update_forgives(tmp_path):
    """Every other update fails and the run ends well; a checkpoint that is due waits for a good update."""
    options = TrainConfig(learning_rate=1e-3, inputs_per_update=4, max_failed_updates=2)
    run = trainer(tmp_path, train_config=options, validation=None)
    use_reward(run, Broken(run.rewards["reward"], float("nan"), lambda: run.updates % 2 == 1))
    history = run.train(5, save_every=2)
    assert [line["scored"] for line in history[1:]] == [1, 0, 1, 0, 1]
    assert load_state(previous(tmp_path / "checkpoint.pt"))["updates"] == 3


@pytest.mark.filterwarnings("ignore:update:RuntimeWarning", r"ignore:\w+ scored no image")
@pytest.mark.parametrize("end", ["last update", "stopped by a reward"])
def test_a_run_that_ends_with_failures_keeps_weights_that_trained(tmp_path, end):
    """A step that ruins the network shows in the update after it: the error names the checkpoint from before."""
    run = trainer(tmp_path, train_config=TrainConfig(learning_rate=1e3, inputs_per_update=4))
    start = trained_weights(run.policy.model)
    if end != "last update":
        run.validation.stop_on, run.validation.patience = "psnr", 1
        run.validation.rewards = {"psnr": lambda images, references: torch.zeros(len(images))}
    with pytest.raises(TrainingError, match=r"ended with failed updates.*checkpoint-previous\.pt"):
        run.train(4, save_every=1, validate_every=2)
    assert [line["update"] for line in run.history] == list(range(5 if end == "last update" else 3))
    good = load_state(previous(run.checkpoint))
    assert (good["updates"], load_state(run.checkpoint)["updates"]) == (0, 1)
    for name, weight in good["learner"]["model"].items():
        torch.testing.assert_close(weight, start[name], **EXACT)


@pytest.mark.filterwarnings("ignore:update:RuntimeWarning")
@pytest.mark.parametrize(("save_every", "name"), [(1, "checkpoint-previous.pt"), (2, "checkpoint.pt")])
def test_the_error_names_the_newest_checkpoint_that_trained(tmp_path, save_every, name):
    """After three good updates: with a checkpoint of each, the last is in doubt; one of update 2 is not."""
    options = TrainConfig(learning_rate=1e-3, inputs_per_update=4, max_failed_updates=2)
    run = trainer(tmp_path, train_config=options, validation=None)
    run.learner.weights[0].register_hook(lambda gradient: gradient * (torch.nan if run.updates > 2 else 1))
    with pytest.raises(TrainingError, match="2 updates in a row failed") as error:
        run.train(9, save_every=save_every)
    assert str(tmp_path / name) in str(error.value)
    assert load_state(tmp_path / name)["updates"] == 2
    again = trainer(tmp_path, train_config=options, validation=None)
    again.learner.weights[0].register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(TrainingError, match=r"checkpoint-previous\.pt"):  # in doubt, until an update goes well
        again.train(9, resume=True)


@pytest.mark.parametrize("size", [1e300, 1e39])
def test_a_reward_too_large_for_float32_is_not_scored(tmp_path, size):
    """In float64 it is finite; here no image has a score, and the run says so."""
    huge = NoReference(contrast, name="huge", higher_is_better=True)
    run = trainer(tmp_path, reward=huge, validation=None)
    huge = lambda images, references: contrast(images).double() * size  # noqa: E731
    huge.name = "huge"
    use_reward(run, huge)
    with pytest.raises(TrainingError, match="huge scored no image"), pytest.warns(RuntimeWarning, match="scored no"):
        run.train(9)


ANSWERS = {
    "a list": (TypeError, lambda images, references: [0.0] * len(images)),
    "nothing": (TypeError, lambda images, references: None),
    "complex": (TypeError, lambda images, references: torch.zeros(len(images), dtype=torch.complex64)),
    "a column": (ValueError, lambda images, references: torch.zeros(len(images), 1)),
    "too few": (ValueError, lambda images, references: torch.zeros(len(images) - 1)),
    "one number": (ValueError, lambda images, references: torch.zeros(())),
}


@pytest.mark.parametrize("place", ["update", "validation"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_reward_that_answers_something_else_is_named(tmp_path, answer, place):
    """With the shape that was expected and what came."""
    run = trainer(tmp_path)
    error, reward = ANSWERS[answer]
    reward = partial(reward)
    reward.name = "odd"
    use_reward(run, reward)
    with pytest.raises(error, match=r"'odd' was expected .*\[4\].*got"):
        experience_of(run) if place == "update" else run.validate()


def test_one_infinite_reward_is_not_scored(tmp_path):
    """It has advantage 0 and enters no mean, and the memory of its input does not see it."""
    run = trainer(tmp_path, validation=None)
    plain = run.rewards["reward"]

    def with_infinity(images, references):
        scores = plain(images)
        scores[0] = torch.inf
        return scores

    use_reward(run, with_infinity)
    experience = experience_of(run)
    assert experience.rewards.isnan().sum() == 2  # two parts of two inputs, one rollout each
    assert experience.advantages.isfinite().all()
    assert not run.memory.state_dict()["rewards"].isinf().any()


def test_every_input_of_a_batch_can_be_unusable(tmp_path):
    """With one input per update nothing is left of the update; the run goes on."""
    run = trainer(
        tmp_path,
        train_config=TrainConfig(inputs_per_update=1),
        validation=None,
        memory=None,
        rollout_config=RolloutConfig(2, 2),
    )
    stored = StoredPairs.of(run.pairs)
    stored.degraded[run.order.ids(0)] = torch.nan
    run.pairs = stored
    with pytest.warns(RuntimeWarning, match="left out 1 inputs"):
        history = run.train(2)
    assert [line["left_out"] for line in history[1:]] == [1, 0]
    require_finite("weights", trained_weights(run.policy.model))


def test_a_scaler_may_look_for_its_scale_before_a_skipped_step_is_a_failure():
    """Overflows while the loss is scaled are excused until the scale is 1; no step is taken."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    steps = []
    for _ in range(4):
        scaler.scale((weight * torch.inf).sum()).backward()
        scaler.unscale_(optimizer)
        steps.append(step_if_finite(SimpleNamespace(scaler=scaler), optimizer, float(weight.grad.norm())))
    assert [step.failed for step in steps] == [False, False, True, True]
    assert not any(step.moved for step in steps)
    torch.testing.assert_close(weight.detach(), torch.ones(1), **EXACT)


def test_validation_learns_nothing_from_what_is_not_scored():
    """A reward that is NaN or infinite changes neither the best value nor the patience; both are told."""
    values = iter([1.0, float("inf"), float("nan"), 0.5])
    stopping = lambda images, references: torch.full((len(images),), next(values))  # noqa: E731
    validation = Validation(
        StoredPairs(images(4), images(4)), {"stopping": stopping}, num_steps=1, stop_on="stopping", patience=2
    )
    policy = build_restorer((8, 16))
    reward = {"c": NoReference(contrast, name="c", higher_is_better=True)}
    found = [validation(policy, reward, [1.0], seed=0) for _ in range(4)]
    assert [look["best"] for look in found] == [True, False, False, False]
    assert (validation.best, validation.since_best) == (1.0, 1)
    assert [bool(look["alarms"]) for look in found] == [False, True, True, False]


def test_an_infinite_score_does_not_blind_the_monitor():
    """One of sixteen images before RL scored infinity; a reward that rises while another falls is still told."""
    truth, rewards = images(16, seed=1), torch.linspace(0, 1, 16)
    monitor = HackingMonitor({"psnr": psnr}, patience=1)
    broken = rewards.clone()
    broken[3] = torch.inf
    monitor.calibrate(0.9 * truth, truth, broken)
    assert monitor.update(0.5 * truth, truth, rewards + 1).alarms


def test_held_out_images_must_be_finite():
    """They are looked at once, when the validation is built."""
    degraded = images(3)
    degraded[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"inputs \[1\]"):
        Validation(StoredPairs(degraded, images(3)), {})


def test_a_model_that_is_not_finite_is_not_written(tmp_path):
    """The folder from before stays."""
    policy = build_restorer((8, 16))
    save_restorer(policy, tmp_path / "model")
    with torch.no_grad():
        policy.model.conv_in.bias[0] = torch.nan
    with pytest.raises(TrainingError, match=r"conv_in\.bias"):
        save_restorer(policy, tmp_path / "model")
    assert (tmp_path / "model" / "unet" / "config.json").is_file()


def test_sft_leaves_out_a_bad_input():
    """One NaN pixel in one degraded image: the model stays finite and learns from the others."""
    stored = StoredPairs.of(TinyPairs(8))
    stored.degraded[3, 1, 2, 2] = torch.nan
    policy = build_restorer((8, 16))
    before = policy.model.conv_in.weight.detach().clone()
    options = {"num_updates": 2, "batch_size": 4, "learning_rate": 1e-3, "show_progress": False}
    losses = supervised(policy, stored, **options)
    assert torch.tensor(losses).isfinite().all()
    assert all(weight.isfinite().all() for weight in policy.model.parameters())
    assert not torch.equal(policy.model.conv_in.weight, before)


SFT = {"batch_size": 4, "learning_rate": 1e-3, "show_progress": False}


@pytest.mark.parametrize("learning_rate", [1e30, 1e36])
def test_sft_refuses_weights_that_a_step_has_ruined(learning_rate):
    """After the first step already, with the advice to lower the learning rate."""
    with pytest.raises(TrainingError, match=r"Update 1 made weights that are not finite.*Lower learning_rate"):
        supervised(
            build_restorer((8, 16)),
            TinyPairs(8),
            num_updates=2,
            **SFT | {"learning_rate": learning_rate},
        )


@pytest.mark.parametrize("bad", [0, 2])
def test_sft_warns_of_a_skipped_update_and_refuses_to_end_with_one(bad):
    """Each is told with its inputs; after a good update all is well, but the last one must not be skipped."""
    policy, calls = build_restorer((8, 16)), []
    plain = policy.sft_loss

    def spoilt(*arguments):
        calls.append(1)
        return plain(*arguments) * (torch.nan if len(calls) - 1 == bad else 1.0)

    policy.sft_loss = spoilt
    ending = pytest.raises(TrainingError, match="SFT ended with") if bad == 2 else nullcontext()
    with warnings.catch_warnings(record=True) as told, ending:
        warnings.simplefilter("always")
        supervised(policy, TinyPairs(8), num_updates=3, **SFT)
    told = [str(warning.message) for warning in told if warning.category is RuntimeWarning]
    assert [text.partition(":")[0] for text in told] == [f"update {bad + 1} of SFT"]
    assert "inputs [" in told[0]
    assert type(policy.model).__name__ == "UNet2DModel"
    require_finite("weights", trained_weights(policy.model))


def test_weights_of_half_precision_are_refused():
    """AdamW's steps are rounded away in bfloat16, so the run would train nothing; another optimiser may do better."""
    policy = FeedForwardPolicy(torch.nn.Conv2d(3, 3, 3, padding=1).to(torch.bfloat16))
    options = {"num_updates": 1, "batch_size": 2, "learning_rate": 1e-5, "show_progress": False}
    with pytest.raises(ValueError, match=r"in float32, got torch.bfloat16.*mixed_precision"):
        supervised(policy, TinyPairs(4), **options)
    supervised(policy, TinyPairs(4), optimizer=partial(torch.optim.SGD, lr=0.1), **options)


class Scaled(Accelerator):
    """An accelerator that scales losses as in fp16, on the CPU."""

    mixed_precision = "fp16"

    def __init__(self, **options):
        super().__init__(cpu=True, **options)
        self.scaler, self.native_amp = torch.amp.GradScaler("cpu", init_scale=1024.0), True

    def prepare_model(self, model, **options):
        """The model without autocast."""
        return model


@pytest.mark.parametrize("kind", [partial(Scaled), partial(Accelerator, cpu=True)])
def test_the_gradient_does_not_depend_on_what_else_the_accelerator_did(tmp_path, kind):
    """Its optimiser of SFT does not unscale the gradient again, nor do its steps of accumulation divide the loss."""
    norms = []
    for before in (False, True):
        accelerator = kind(gradient_accumulation_steps=4 if before else 1)
        run = trainer(tmp_path / f"{before}", accelerator=accelerator, validation=None)
        if before:
            options = {"num_updates": 1, "batch_size": 2, "learning_rate": 1e-20, "show_progress": False}
            supervised(run.policy, run.pairs, accelerator=accelerator, **options)
        run.calibrate()
        norms.append(run.update()["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
