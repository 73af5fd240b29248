"""The process that speaks HTTP by itself, run here without Ray."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2
import pytest
import torch

from iqareward.rewards.calls import Call
from iqareward.rewards.remote import RemoteFacts, RemoteReward
from iqareward.rewards.wire import Limits, encode_request
from iqareward.serving.dispatch import Scored
from iqareward.serving.listener import Address, Listener
from iqareward.serving.settings import Settings
from tests.serving.in_process import SAFETENSORS, answering, application, error_of, free_port

LIMITS = Limits(max_bytes=2**20)
CONTENT = encode_request(torch.full((1, 3, 8, 8), 0.5), rewards=["r"])


async def ones(call: Call) -> Scored:
    return Scored(torch.ones(len(call)))


def listening(
    work: Callable[[Listener, str], Coroutine[Any, Any, None]],
    score: Callable[[Call], Coroutine[Any, Any, Scored]] = ones,
) -> None:
    """Run a listener, and the work beside it."""

    async def scenario() -> None:
        address = Address("127.0.0.1", free_port())
        app = application({"r": answering(score)}, Settings(limits=LIMITS))
        listener = object.__new__(Listener)  # as Ray Serve does, which awaits __init__
        await listener.__init__(lambda: app, address)
        try:
            await work(listener, f"http://127.0.0.1:{address.port}")
        finally:
            await listener.stop()
            assert listener.__del__() is None  # as a collection calls it

    asyncio.run(scenario())


def test_a_large_body_is_refused_before_it_is_sent():
    """The answer arrives although the client would have sent 200 MB, and the next request is served."""

    async def work(listener: Listener, url: str) -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
            response = await client.post("/v1/score", content=bytes(200 * 2**20), headers=SAFETENSORS)
            assert error_of(response) == (413, "body_too_large")
            response = await client.post("/v1/score", content=CONTENT, headers=SAFETENSORS)
            assert response.json()["scores"] == {"r": [1.0]}

    listening(work)


@pytest.mark.parametrize("endless", [b"a" * 2**16, b"x: y\r\n" * 2**13])
def test_headers_without_end(endless):
    """One header that does not end, and headers that do not end: a 400 and no connection, after a megabyte at most."""

    async def work(listener: Listener, url: str) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\ny: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 * len(endless):
                writer.write(endless)
                await writer.drain()
                await asyncio.sleep(0)  # to the server, which runs on the same loop
                sent += len(endless)
            pytest.fail("the server went on reading")
        assert sent <= 2**21
        async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
            headers = {"x": "y" * 60_000}
            assert (await client.get("/healthz", headers=headers)).status_code == 200

    listening(work)


def test_remote_reward_halves_what_is_too_large():
    """Sixty images of 768 kB against a limit of 1 MiB: single images get through, and each has its score."""

    async def work(listener: Listener, url: str) -> None:
        images = torch.rand(60, 3, 16, 16).repeat(1, 1, 16, 16)
        with RemoteReward(url, "r", facts=RemoteFacts(False, False, (0.0, 1.0)), timeout=120) as remote:
            assert (await remote.ascore(images)).tolist() == [1.0] * 60

    listening(work)


def test_stopping_answers_what_has_come_in():
    """A request that is being scored when the process is told to end gets its answer; after it nothing listens."""

    entered, release = asyncio.Event(), asyncio.Event()

    async def held(call: Call) -> Scored:
        entered.set()
        await release.wait()
        return await ones(call)

    async def work(listener: Listener, url: str) -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
            request = asyncio.create_task(client.post("/v1/score", content=CONTENT, headers=SAFETENSORS))
            await entered.wait()
            listener.check_health()
            stopping = listener.__del__()  # as Ray Serve calls it
            assert stopping is not None
            asyncio.get_running_loop().call_later(0.2, release.set)  # while it is stopping
            await stopping
            assert (await request).json()["scores"] == {"r": [1.0]}
            with pytest.raises(httpx2.ConnectError):
                await client.get("/healthz")
        with pytest.raises(RuntimeError, match="has ended"):
            listener.check_health()

    listening(work, held)


def test_addresses():
    """A taken port and a foreign address are errors that say so; several processes may share a port if all want to."""
    address = Address("127.0.0.1", free_port())
    with address.bind(), pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{address.port}"):
        address.bind()
    with pytest.raises(OSError, match=r"192\.0\.2\.1"):
        Address("192.0.2.1", address.port).bind()
    shared = Address(address.host, address.port, processes=2)
    with shared.bind(), shared.bind(), pytest.raises(OSError, match="cannot listen"):
        address.bind()
