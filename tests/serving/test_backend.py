"""What happens between the front and the processes of a reward, with their failures simulated."""

import asyncio
import os
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import torch

import iqareward
from iqareward.rewards.calls import Call
from iqareward.serving import backend
from iqareward.serving.backend import RayBackend
from iqareward.serving.replica import Failed, RewardReplica, ScoredRows, pack
from iqareward.serving.requests import ServiceError
from tests.serving.judges import Fragile, Slow
from tests.serving.ray_quietly import ray

CALL = Call(torch.full((2, 3, 8, 8), 0.5))


class Response:
    """What a deployment handle gives."""

    def __init__(self, outcome) -> None:
        self.outcome, self.cancelled = outcome, False

    def __await__(self):
        if isinstance(self.outcome, float):
            yield from asyncio.sleep(self.outcome).__await__()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment handle that gives one outcome after the other."""

    def __init__(self, *outcomes) -> None:
        self.responses = [Response(outcome) for outcome in outcomes]
        self.sent = []
        self.score = self

    def remote(self, *arguments):
        self.sent.append(arguments)
        return self.responses[len(self.sent) - 1]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(backend, "PAUSE", 0.0)


SCORES = ScoredRows(np.array([0.5, 0.25], dtype=np.float32), {"part": np.array([1.0, 2.0], dtype=np.float32)})
DIED = ray.exceptions.RayActorError()


def rpc_error(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="as told")


@pytest.mark.parametrize("deaths", [0, 1, 2])
def test_calls_of_a_process_that_died_are_made_again(deaths):
    """Up to three attempts, each with the same images."""
    handle = Handle(*[DIED] * deaths, SCORES)
    scored = asyncio.run(RayBackend(handle, "reward")(CALL))
    assert (scored.scores.tolist(), scored.components["part"].tolist()) == ([0.5, 0.25], [1.0, 2.0])
    assert len(handle.sent) == deaths + 1
    assert all((images == CALL.images.numpy()).all() for images, *_ in handle.sent)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([DIED] * 4, (503, "unavailable", True)),
        ([ray.serve.exceptions.BackPressureError(1, 1)], (429, "overloaded", True)),
        ([ray.serve.exceptions.DeploymentUnavailableError("reward")], (503, "unavailable", True)),
        ([Failed(422, "refused_by_reward", "no")], (422, "refused_by_reward", False)),
        ([DIED, Failed(500, "reward_failed", "no")], (500, "reward_failed", False)),
        ([rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED)], (413, "message_too_large", False)),
        ([rpc_error(grpc.StatusCode.UNAVAILABLE)] * 3, (503, "unavailable", True)),
        (
            [rpc_error(grpc.StatusCode.INTERNAL), DIED, Failed(500, "reward_failed", "no")],
            (500, "reward_failed", False),
        ),
        ([ray.exceptions.OutOfMemoryError("killed")] * 3, (503, "unavailable", True)),
        ([ray.exceptions.OutOfDiskError()] * 3, (503, "unavailable", True)),
        ([ray.exceptions.OwnerDiedError("", b"", "")] * 3, (503, "unavailable", True)),
        ([ray.serve.exceptions.ReplicaUnavailableError("one")], (503, "unavailable", True)),
    ],
)
def test_failures_have_a_status(outcomes, expected):
    """What kills processes does not kill them all; what may succeed later says when."""
    handle = Handle(*outcomes)
    with pytest.raises(ServiceError) as caught:
        asyncio.run(RayBackend(handle, "reward")(CALL))
    assert (caught.value.status, caught.value.code, caught.value.retry_after is not None) == expected
    assert len(handle.sent) <= 3


def test_giving_up_cancels_the_work():
    """When nobody waits any more, the images leave the queue of the process."""
    handle = Handle(30.0)

    async def give_up() -> None:
        async with asyncio.timeout(0.05):
            await RayBackend(handle, "reward")(CALL)

    with pytest.raises(TimeoutError):
        asyncio.run(give_up())
    assert handle.responses[0].cancelled


def test_a_process_with_a_lost_gpu_is_replaced():
    """After an error that poisons the CUDA context the health check fails; other errors pass."""
    black = pack(Call(torch.zeros(1, 3, 8, 8)))
    replica = RewardReplica(Fragile(RuntimeError("bad luck")))
    assert asyncio.run(replica.score(*black)) == Failed(500, "reward_failed", "RuntimeError: bad luck")
    asyncio.run(replica.check_health())
    replica = RewardReplica(Fragile(RuntimeError("CUDA error: device-side assert triggered\nmore")))
    assert asyncio.run(replica.score(*black)).message.endswith("device-side assert triggered")
    with pytest.raises(RuntimeError, match="CUDA error"):
        asyncio.run(replica.check_health())


def test_a_reward_that_cannot_score_is_never_ready():
    """Weights that are missing show when the process starts, and not to the first client."""
    from iqareward import QAlignReward

    with pytest.raises((OSError, ValueError)):
        RewardReplica(QAlignReward("no/such-folder-anywhere/at-all"))


def test_a_reward_that_scores_no_flat_image_starts_without_a_warning(recwarn: pytest.WarningsRecorder):
    """A warning that no image was scored would look like a broken server."""
    RewardReplica(iqareward.load("niqe"))
    assert not recwarn.list


def test_batches_are_told():
    """The observer hears the reward, the images and the seconds of each batch, but not of the warm-up."""
    told = []
    replica = RewardReplica(Slow(0.01), observer=lambda: lambda *batch: told.append(batch))
    asyncio.run(replica.score(*pack(CALL)))
    ((name, count, seconds),) = told
    assert (name, count) == ("slow", 2)
    assert seconds >= 0.01
    assert replica.statistics() == (os.getpid(), {"slow": (1, 2)})


def test_read_only_shared_memory():
    """Arrays as Ray hands them over, read-only, are scored without a warning or a write."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    array = images.numpy().copy()
    array.setflags(write=False)
    rows = asyncio.run(RewardReplica(iqareward.load("piqe")).score(array))
    assert isinstance(rows, ScoredRows)
    assert rows.components == {}
    assert torch.equal(torch.from_numpy(rows.scores), iqareward.load("piqe")(images))


def test_health_shows_no_traceback(monkeypatch):
    """Anyone may ask for it, and Ray's message holds paths and code."""
    unhealthy = ray.serve.schema.DeploymentStatus.UNHEALTHY
    part = SimpleNamespace(status=unhealthy, replica_states={}, message="Traceback: /private/path")
    found = SimpleNamespace(applications={"server": SimpleNamespace(deployments={"part": part})})
    monkeypatch.setattr(ray.serve, "status", lambda: found)
    monkeypatch.setattr(backend, "is_asleep", lambda deployment: False)
    health = asyncio.run(backend.deployment_health("server", {"broken": "part", "missing": "other"}))
    assert health == {"broken": "no process is running: UNHEALTHY", "missing": "no process is running: not deployed"}
