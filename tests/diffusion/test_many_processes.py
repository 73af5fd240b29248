"""Two processes do what one does, with whole weights and with FSDP, whatever the objective; kills change nothing."""

import shutil
import socket
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessException

from iqareward.diffusion.checkpoint import load_state, trained_weights
from tests.diffusion.processes import SHARDED, UPDATES, all_cases, cases, killed, resumed, run_of, sft_of
from tests.tolerances import EXACT

pytestmark = pytest.mark.slow
CLOSE = {"rtol": 1e-4, "atol": 5e-5}  # gradients are summed in another order; every case moves weights by 1e-3 or more
FIGURES = {"rel": 1e-3, "abs": 1e-4}  # a policy loss is what is left of advantages that cancel
ADAMW = {"rtol": 1e-3, "atol": 1e-4}  # where a gradient is near 0, its sign is rounding, and a step is 1e-3
KINDS = {"whole": False, "FSDP": True}


def started(target, *arguments):
    """Two processes of `target(rank, *arguments, environment, ...)`; not waited for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    folder, *more = arguments
    return mp.start_processes(target, (folder, shared, *more), nprocs=2, join=False, start_method="forkserver")


def wait_for(ranks):
    """Until all have ended; the error of one of them."""
    while not ranks.join(300):
        pass


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder with the results of two processes."""
    folder = tmp_path_factory.mktemp("two")
    wait_for(started(all_cases, folder, tuple(KINDS.values())))
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Maps a case to the weights and the history of one process, which runs it once."""
    found = {}

    def alone(name):
        if name not in found:
            run = run_of(name, tmp_path_factory.mktemp("one"))
            before = trained_weights(run.policy.model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                run.train(UPDATES, save_every=2, validate_every=2)
            found[name] = before, trained_weights(run.policy.model), run.history
        return found[name]

    return alone


@pytest.mark.parametrize(("name", "kind"), [(n, k) for k in KINDS for n in (SHARDED if KINDS[k] else cases())])
def test_two_processes_end_where_one_does(name, kind, one, two):
    """The same weights and the same figures, up to the order of sums."""
    weights, history = torch.load(two / f"{name} {KINDS[kind]}.pt")
    before, expected, lines = one(name)
    tolerance = ADAMW if name == "adamw" else CLOSE
    moved = max((expected[key] - weight).abs().max() for key, weight in before.items())
    assert moved > 10 * tolerance["atol"], "nothing was learned, so that nothing is compared"
    torch.testing.assert_close(weights, expected, **tolerance)
    for line, wanted in zip(history, lines, strict=True):
        assert line == {
            key: value if isinstance(value, str) else pytest.approx(value, **FIGURES, nan_ok=True)
            for key, value in wanted.items()
        }


def test_the_plugin_of_accelerate_does_the_same(one, two):
    """It shards the model and hands the optimiser the shares."""
    weights, sharded = torch.load(two / "plugin.pt")
    assert sharded
    torch.testing.assert_close(weights, one("clipped")[1], **CLOSE)


def test_a_reward_that_scores_some_inputs_only_is_among_the_cases(one):
    """The case of NaN scores has updates with scores and without."""
    scored = [line["scored"] for line in one("nan")[2][1:]]
    assert 0 < sum(scored) < len(scored)


@pytest.mark.parametrize("name", ["rows: all", "rows: 1"])
def test_small_passes_equal_a_large_one(name, one):
    """Gradients of parts of a batch add up to that of the whole."""
    reference = "rows: all" if name == "rows: 1" else "rows: 1"
    torch.testing.assert_close(one(name)[1], one(reference)[1], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_sft_of_batches_that_do_not_divide(kind, two):
    """Five inputs on two processes; with whole weights also one input, of which a process has none."""
    for batch_size in (5, 1) if kind == "whole" else (5,):
        weights, losses = torch.load(two / f"sft of {batch_size} {KINDS[kind]}.pt")
        expected, alone = sft_of(batch_size)
        torch.testing.assert_close(weights, expected, **CLOSE)
        assert losses == pytest.approx(alone, rel=1e-4)


@pytest.fixture(scope="module")
def after_kills(tmp_path_factory):
    """Folders of runs of which one process was killed, as they were then."""
    folders = {sharded: tmp_path_factory.mktemp("killed") for sharded in KINDS.values()}
    begun = {sharded: started(killed, folder, sharded) for sharded, folder in folders.items()}
    for ranks in begun.values():
        with pytest.raises(ProcessException):
            wait_for(ranks)
        assert ranks.processes[1].exitcode == -9
    return folders


@pytest.fixture(scope="module")
def gone_on(after_kills, tmp_path_factory):
    """The runs after they were resumed by two processes."""
    folders = {kind: tmp_path_factory.mktemp("resumed") / "run" for kind in KINDS.values()}
    for kind, folder in folders.items():
        shutil.copytree(after_kills[kind], folder)
    wait_for(started(resumed, folders))
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_process_changes_nothing(kind, two, gone_on):
    """Resumed after `kill -9` of one of two processes, a run ends with exactly the weights of an unbroken one."""
    weights, history, learner = torch.load(gone_on[KINDS[kind]] / "final.pt")
    expected, lines = torch.load(two / f"adamw {KINDS[kind]}.pt")
    torch.testing.assert_close(weights, expected, **EXACT)
    assert history == lines
    unbroken = load_state(two / f"adamw {KINDS[kind]}" / "checkpoint.pt")["learner"]
    assert learner["ema"]["shadow_params"], "an average is part of it"
    assert learner["updates"]["optimizer"]["state"], "so is AdamW's state"
    torch.testing.assert_close(learner, unbroken, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_two_processes_goes_on_in_one(kind, after_kills, one, tmp_path):
    """It holds whole weights, averages and states of the optimiser, so one process without FSDP ends where they do."""
    shutil.copytree(after_kills[KINDS[kind]], tmp_path / "run")
    run = run_of("adamw", tmp_path / "run")
    run.train(UPDATES, save_every=1, validate_every=2, resume=True)
    _, expected, lines = one("adamw")
    torch.testing.assert_close(trained_weights(run.policy.model), expected, **ADAMW)
    assert run.history[-1]["reward"] == pytest.approx(lines[-1]["reward"], rel=1e-3)
