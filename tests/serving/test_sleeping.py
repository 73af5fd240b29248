"""Rewards give their device back and take it again, over HTTP."""

import asyncio
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import httpx2
import pytest
import torch
from torch import Tensor

import iqareward
from iqareward.rewards.calls import Call
from iqareward.rewards.loading import LazyModel
from iqareward.serving.replica import Failed, RewardReplica, pack
from iqareward.serving.requests import Settings
from iqareward.serving.wire import encode_request
from iqareward.types import Images
from tests.gpu import needs_cuda
from tests.serving.in_process import SAFETENSORS, application, error_of, get, post, run, send, served
from tests.serving.judges import Weighty, means

CALL = Call(torch.full((2, 3, 32, 32), 0.5))


def body(name: str = "weighty") -> bytes:
    return encode_request(CALL.images, rewards=[name])


def test_sleep_and_wake():
    """While it sleeps a reward refuses and says how to wake it; afterwards it scores as before; others go on."""
    reward = Weighty()
    app = application({"weighty": served(reward), "piqe": served(iqareward.load("piqe"))})
    for _ in range(2):
        response = post(app, "/v1/rewards/weighty/sleep")
        assert (response.status_code, response.json()) == (200, {"asleep": True})
        response = post(app, content=body(), headers=SAFETENSORS)
        assert error_of(response) == (409, "asleep")
        assert "wake" in response.json()["error"]["message"]
        assert post(app, content=body("piqe"), headers=SAFETENSORS).status_code == 200
        facts = get(app, "/v1/rewards").json()["rewards"]
        assert {name: row["asleep"] for name, row in facts.items()} == {"weighty": True, "piqe": False}
        health = get(app, "/healthz")
        assert (health.status_code, health.json()["rewards"]["weighty"]) == (200, "asleep")
    response = post(app, "/v1/rewards/weighty/wake")
    assert (response.status_code, response.json()) == (200, {"asleep": False})
    assert post(app, content=body(), headers=SAFETENSORS).json()["scores"]["weighty"] == [0.5, 0.5]
    assert get(app, "/healthz").json()["rewards"]["weighty"] == "ok"
    assert reward.diary == ["scored", "offloaded", "loaded", "scored", "scored"]  # the first and third to warm up


@pytest.mark.parametrize("name", ["piqe", "0.7*ssim + 0.3*haarpsi", "a/b"])
def test_rewards_without_weights(name):
    """Those that have nothing to move sleep too, under any name."""
    app = application({name: served(iqareward.load("piqe"))})
    path = "/v1/rewards/" + name.replace(" ", "%20").replace("+", "%2B").replace("/", "%2F")
    for step, asleep in (("sleep", True), ("wake", False)):
        assert post(app, f"{path}/{step}").json() == {"asleep": asleep}
        assert get(app, "/v1/rewards").json()["rewards"][name]["asleep"] == asleep


def test_parts_of_a_sum_sleep():
    """Every reward inside a reward is moved."""
    inner = Weighty()
    app = application({"sum": served(iqareward.WeightedSum([(1.0, iqareward.load("piqe")), (1.0, inner)]))})
    assert post(app, "/v1/rewards/sum/sleep").status_code == 200
    assert inner.diary == ["scored", "offloaded"]


def test_who_may():
    """The token is asked for, and the reward must be served."""
    app = application({"weighty": served(Weighty())}, Settings(token="secret"))
    assert error_of(post(app, "/v1/rewards/weighty/sleep")) == (401, "unauthorized")
    headers = {"authorization": "Bearer secret"}
    assert error_of(post(app, "/v1/rewards/other/sleep", headers=headers)) == (404, "unknown_reward")
    assert error_of(get(app, "/v1/rewards/weighty/sleep", headers=headers)) == (405, "method_not_allowed")
    assert post(app, "/v1/rewards/weighty/sleep", headers=headers).status_code == 200


def test_no_body_and_no_length():
    """`curl -X POST` sends neither."""
    app = application({"weighty": served(Weighty())})
    sent: list[dict] = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def keep(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/rewards/weighty/sleep", "headers": [], "query_string": b""}
    run(app(scope, receive, keep))
    assert sent[0]["status"] == 200


def test_calls_that_came_before_are_scored_first():
    """What is in work or waits is answered, then the reward is offloaded, and what came later is refused."""
    reward = Weighty(seconds=0.2)
    app = application({"weighty": served(reward)})

    async def scenario() -> list[httpx2.Response]:
        async def soon(path: str, **options) -> httpx2.Response:
            return await send(app, "POST", path, **options)

        score = {"content": body(), "headers": SAFETENSORS}
        before = [asyncio.create_task(soon("/v1/score", **score)) for _ in range(3)]
        await asyncio.sleep(0.1)
        sleep = asyncio.create_task(soon("/v1/rewards/weighty/sleep"))
        await asyncio.sleep(0.05)
        return list(await asyncio.gather(*before, sleep, soon("/v1/score", **score)))

    *before, sleep, after = run(scenario())
    assert [response.status_code for response in before] == [200] * 3
    assert sleep.status_code == 200
    assert error_of(after) == (409, "asleep")
    assert reward.diary[-1] == "offloaded"


def test_waking_without_room():
    """If the device has no room the answer says why, the reward goes on sleeping, and a later attempt succeeds."""
    reward = Weighty()
    app = application({"weighty": served(reward)})
    post(app, "/v1/rewards/weighty/sleep")
    reward.room = False
    response = post(app, "/v1/rewards/weighty/wake")
    assert error_of(response) == (503, "device_busy")
    assert "out of memory" in response.json()["error"]["message"]
    assert error_of(post(app, content=body(), headers=SAFETENSORS)) == (409, "asleep")
    reward.room = True
    assert post(app, "/v1/rewards/weighty/wake").status_code == 200
    assert post(app, content=body(), headers=SAFETENSORS).status_code == 200


def test_a_process_that_starts_while_the_reward_sleeps():
    """It loads nothing, refuses to score, and follows by its health check when it was not told of a change."""
    reward, asleep = Weighty(), True
    replica = RewardReplica(reward, told_to_sleep=lambda: asleep)
    assert reward.diary == []

    async def scenario() -> None:
        nonlocal asleep
        assert (await replica.score(*pack(CALL))).code == "asleep"
        asleep = False
        async with asyncio.timeout(60):
            while isinstance(await replica.score(*pack(CALL)), Failed):
                await replica.check_health()
                await asyncio.sleep(0.01)

    asyncio.run(scenario())
    assert reward.diary == ["loaded", "scored", "scored"]


class Wide:
    """The mean of each image through a network of 256 MiB."""

    name, bounds = "wide", (None, None)
    needs_references = needs_prompts = differentiable = False

    def __init__(self) -> None:
        self._loader = LazyModel(lambda device: torch.nn.Linear(2**13, 2**13, bias=False, device=device), "cuda")
        self.offload, self.onload = self._loader.offload, self._loader.onload

    def __call__(self, images: Images, references: Any = None, prompts: Any = None, **ignored: Any) -> Tensor:
        self._loader.get(images)(torch.zeros(1, 2**13, device=images[0].device))
        return means(images)


def reserved() -> list[int]:
    """What a process reserves on the GPU awake, asleep and awake again; it scores as before."""
    told = [False]
    replica = RewardReplica(Wide(), device="cuda", told_to_sleep=lambda: told[-1])

    async def scenario() -> list[int]:
        first = await replica.score(*pack(CALL))
        held = [torch.cuda.memory_reserved()]
        for asleep in (True, False):
            told.append(asleep)
            assert await replica.follow() is None
            held.append(torch.cuda.memory_reserved())
        again = await replica.score(*pack(CALL))
        assert not isinstance(first, Failed)
        assert not isinstance(again, Failed)
        assert first.scores.tolist() == again.scores.tolist() == [0.5, 0.5]
        return held

    return asyncio.run(scenario())


@pytest.mark.gpu
@needs_cuda
def test_the_memory_of_the_device_is_given_back():
    """Asleep, a process has none of the network on the GPU, also not as a reserve."""
    # in a process of its own: in what other tests have reserved there may be room for the network
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        before, resting, after = fresh.submit(reserved).result()
    assert min(before, after) - resting >= 2**28
