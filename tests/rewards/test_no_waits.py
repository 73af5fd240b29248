"""Nobody waits for ever: not for a call from within its own reward, nor for odd exceptions, forks or an exit."""

import asyncio
import concurrent.futures
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import iqareward
from iqareward import MicroBatched, Overlapped, Reward
from iqareward.adapters.trl import AsyncTRLReward, TRLReward
from iqareward.types import Images, Scores
from tests.rewards.counting import Brightness, flat


def outcome(call: Callable[[], Any], seconds: float = 120) -> Any:
    """What a call returns or raises, of a thread that would not hold up the tests if it waited for ever."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, "nothing came back"
    return result[0]


class Calls(Brightness):
    """Its scores are those of another reward, once there is one."""

    name = "calls"

    def __init__(
        self, other: Reward | None = None, way: Callable[..., Any] = lambda call, *arguments: call(*arguments)
    ):
        super().__init__()
        self.other, self.way = other, way

    def __call__(self, images: Images, *arguments: Any, **keywords: Any) -> Scores:
        return super().__call__(images) if self.other is None else self.way(self.other, images)


def in_a_thread(call: Callable[..., Any], *arguments: Any) -> Any:
    return asyncio.run(asyncio.to_thread(call, *arguments))


WRAPPERS = [MicroBatched, Overlapped]


@pytest.mark.parametrize("way", [lambda call, *arguments: call(*arguments), in_a_thread])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_call_from_within_its_own_reward_is_refused(wrapper: Any, way: Callable[..., Any]) -> None:
    """A reward that calls its own wrapper gets an error that says so, and so does its caller; later calls work."""
    inner = Calls(way=way)
    reward = inner.other = wrapper(inner)
    error = outcome(lambda: reward(flat(0.5)))
    assert isinstance(error, RuntimeError)
    assert "within its own reward" in str(error)
    inner.other = None
    assert outcome(lambda: reward(flat(0.5))).tolist() == [0.5]


@pytest.mark.parametrize("second", WRAPPERS)
@pytest.mark.parametrize("first", WRAPPERS)
def test_a_circle_of_wrappers_is_refused(first: Any, second: Any) -> None:
    """Two wrappers whose rewards call each other get the error; one around the other works."""
    inner = Calls()
    middle = second(inner)
    outer = inner.other = first(Calls(middle))
    error = outcome(lambda: outer(flat(0.5)))
    assert isinstance(error, RuntimeError)
    assert "within its own reward" in str(error)
    inner.other = None
    assert outcome(lambda: outer(flat(0.5))).tolist() == [0.5]


def test_closing_from_within_is_refused() -> None:
    """A reward that closes its own wrapper gets the error, and the wrapper stays open."""
    inner = Calls()
    reward = MicroBatched(inner)
    inner.other, inner.way = Brightness(), lambda call, images: reward.close()
    error = outcome(lambda: reward(flat(0.5)))
    assert isinstance(error, RuntimeError)
    assert "within its own reward" in str(error)
    inner.other = inner.way = None  # pyright: ignore
    assert outcome(lambda: reward(flat(0.5))).tolist() == [0.5]


class Raises(Brightness):
    """Raises what it is told to."""

    name = "raises"
    error: BaseException | None = None

    def __call__(self, images: Images, *arguments: Any, **keywords: Any) -> Scores:
        if self.error is not None:
            raise self.error
        return super().__call__(images)


async def ascore(reward: Any) -> Any:
    return await (reward.ascore(flat(0.5)) if isinstance(reward, MicroBatched) else reward.submit(flat(0.5)))


def trl(reward: Reward) -> AsyncTRLReward:
    return AsyncTRLReward(TRLReward(reward, "restored"))


SIGNALS = [StopIteration, StopAsyncIteration, GeneratorExit, asyncio.CancelledError, concurrent.futures.CancelledError]


@pytest.mark.parametrize("kind", SIGNALS)
def test_signals_of_generators_are_errors(kind: type[BaseException]) -> None:
    """A reward that raises StopIteration or the like fails with an error for threads and coroutines, which go on."""
    inner = Raises()
    for reward in (MicroBatched(inner), Overlapped(inner)):
        for call in (lambda: reward(flat(0.5)), lambda: asyncio.run(ascore(reward))):  # noqa: B023
            inner.error = kind()
            found = outcome(call)
            assert isinstance(found, RuntimeError), found
            assert kind.__name__ in str(found)
            assert isinstance(found.__cause__, kind)
            inner.error = None
            assert outcome(call).tolist() == [0.5]
    inner.error = kind()
    columns = {"completions": ["a"], "restored": [flat(0.5)[0]]}
    assert isinstance(outcome(lambda: asyncio.run(trl(inner)(**columns))), RuntimeError)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_ends_a_program_is_delivered(wrapper: Any, kind: type[BaseException]) -> None:
    """Of a reward that raises KeyboardInterrupt or SystemExit the caller hears, and the worker lives on."""
    inner = Raises()
    reward = wrapper(inner)
    for call in (lambda: reward(flat(0.5)), lambda: asyncio.run(ascore(reward))):
        inner.error = kind()
        assert isinstance(outcome(call), kind)
        inner.error = None
        assert outcome(call).tolist() == [0.5]


def finished(script: str, **options: Any) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a Python program."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False, **options
    )
    return done.returncode, done.stdout, done.stderr


FORK = """
import os, signal, sys, threading, warnings
import torch
from torch import nn
from iqareward.rewards.loading import LazyModel
warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, the point of this program
sys.path.insert(0, {folder!r})
started = threading.Event()

def build(device):
    started.set()
    import slow_to_import
    return nn.Linear(2, 2)

weights = LazyModel(build)
loading = threading.Thread(target=weights.get)
loading.start()
started.wait()
child = os.fork()
if not child:
    signal.alarm(100)
    with torch.no_grad():
        os._exit(0 if weights.get()(torch.zeros(1, 2)).shape == (1, 2) else 1)
print(os.waitpid(child, 0)[1])
loading.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_a_fork_while_weights_are_loaded(tmp_path: Path) -> None:
    """A process that is forked while another thread loads weights, and imports what it needs for that, can use them."""
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1)\n")
    assert finished(FORK.format(folder=str(tmp_path))) == (0, "0\n", "")


FORK_WHILE_SCORING = """
import os, signal, threading, warnings
import torch
from iqareward.adapters.flow_grpo import reward_function
from tests.rewards.counting import Held, flat
warnings.simplefilter("ignore", DeprecationWarning)
held = Held()
score = reward_function(held)
threading.Thread(target=score, args=(flat(0.5), [""], [{}])).start()
held.entered.wait()
child = os.fork()
held.let_go.set()
if not child:
    signal.alarm(100)
    os._exit(0 if score(flat(0.5), [""], [{}])[0] == [0.5] else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_a_fork_while_a_reward_scores() -> None:
    """A process that is forked while another thread holds the lock of a reward function can score."""
    assert finished(FORK_WHILE_SCORING) == (0, "0\n", "")


EXIT = """
import os, sys, threading, time, iqareward
from tests.rewards.counting import Brightness, flat
entered = threading.Event()
class UntilExit(Brightness):
    def __call__(self, images, **ignored):
        os.write(1, b"scored ")
        entered.set()
        while threading.main_thread().is_alive(): time.sleep(0.01)
        time.sleep(0.5)  # to the end of the interpreter
        return super().__call__(images)
def call():
    reward(flat(0.5))
    os.write(1, b"answered")
reward = iqareward.Overlapped(UntilExit())
threading.Thread(target=call, daemon=True).start()
entered.wait()
pending = [reward.submit(flat(0.5)) for _ in range(3)]
{end}
"""


@pytest.mark.parametrize(("end", "status"), [("", 0), ("sys.exit(3)", 3), ("raise ValueError('mine')", 1)])
def test_the_interpreter_exits_beside_pending_scores(end: str, status: int) -> None:
    """A process that exits, by an exception too, ends after the call under way and answers no daemon thread."""
    returned, output, errors = finished(EXIT.format(end=end))
    assert (returned, output) == (status, "scored ")
    assert errors == "" or errors.endswith("ValueError: mine\n")


def test_submitting_while_the_interpreter_exits_is_refused() -> None:
    """A call of a handler that runs at exit gets an error instead of waiting for a thread that has ended."""
    script = (
        "import atexit\n"
        "def late():\n"
        "    try:\n"
        "        reward(flat(0.5))\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
        "atexit.register(late)  # runs last\n"
        "import iqareward\n"
        "from tests.rewards.counting import Brightness, flat\n"
        "reward = iqareward.Overlapped(Brightness())\n"
        "print(reward(flat(0.5)).item())\n"
    )
    expected = "0.5\nOverlapped of brightness was called while the interpreter exits.\n"
    assert finished(script) == (0, expected, "")


def test_pending_scores_outlive_their_reward() -> None:
    """Scores that are under way come although the wrapper itself is gone."""
    pending = [iqareward.Overlapped(Brightness(seconds=0.05)).submit(flat(0.25, 0.5)) for _ in range(2)]
    for scores in pending:
        torch.testing.assert_close(outcome(scores.result), torch.tensor([0.25, 0.5]))
