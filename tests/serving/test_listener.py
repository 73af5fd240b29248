"""The process that speaks HTTP by itself, run here without Ray."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx2
import pytest
import torch
from starlette.types import ASGIApp, Receive, Scope, Send

from iqareward.rewards.calls import Call
from iqareward.serving import listener as module
from iqareward.serving.client import RemoteFacts, RemoteReward
from iqareward.serving.listener import Address, Listener
from iqareward.serving.replica import Scored
from iqareward.serving.requests import Settings
from iqareward.serving.wire import Limits, encode_request
from tests.serving.in_process import SAFETENSORS, answering, application, error_of, free_port

LIMITS = Limits(max_bytes=2**20)
CONTENT = encode_request(torch.full((1, 3, 8, 8), 0.5), rewards=["r"])


async def ones(call: Call) -> Scored:
    return Scored(torch.ones(len(call)))


def listening(
    work: Callable[[Listener, str], Coroutine[Any, Any, None]],
    score: Callable[[Call], Coroutine[Any, Any, Scored]] = ones,
    app: ASGIApp | None = None,
) -> None:
    """Run a listener, and the work beside it."""

    async def scenario() -> None:
        nonlocal app
        address = Address("127.0.0.1", free_port())
        app = app or application({"r": answering(score)}, Settings(limits=LIMITS))
        listener = object.__new__(Listener)  # as Ray Serve does, which awaits __init__
        await listener.__init__(lambda: app, address)
        try:
            await work(listener, f"http://127.0.0.1:{address.port}")
        finally:
            await listener.stop()
            assert listener.__del__() is None  # as a collection calls it

    asyncio.run(scenario())


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection without a client that knows HTTP."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


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
        sent = 0
        async with connected(url) as (_, writer):
            writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\ny: ")
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


GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
TOO_LARGE = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 9999999\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "drops"),
    [
        (b"", b""), (b"", b"\r\n"), (b"", b"G"), (b"GET /healthz HTTP/1.1\r\nhost: x\r\n", b"x: y\r\n"),
        (GET, b""), (GET, b"\r\n"), (GET + b"GET /", b"x"), (TOO_LARGE, b"pixels"), (b"nonsense\r\n\r\n", b""),
    ],
)  # fmt: skip
def test_connections_that_do_not_get_on(monkeypatch, first, drops):
    """A client that sends nothing, or drop after drop, is hung up on: at once, in a head, and after an answer."""
    monkeypatch.setattr(module, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.5)

    async def work(listener: Listener, url: str) -> None:
        async def drip(writer: asyncio.StreamWriter) -> None:
            while True:
                await asyncio.sleep(0.05)
                writer.write(drops)

        async with asyncio.timeout(120), connected(url) as (reader, writer):
            writer.write(first)
            dripping = asyncio.create_task(drip(writer))
            try:
                await reader.read()  # to the end of the connection
                closed = reader.at_eof()
            except ConnectionError:
                closed = True
            dripping.cancel()
        assert closed
        async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
            assert (await client.get("/healthz")).status_code == 200

    listening(work)


def test_slow_requests_are_not_cut(monkeypatch):
    """What the deadline bounds, the body and the scoring, may take longer than a head and a pause."""
    monkeypatch.setattr(module, "HEAD_SECONDS", 1.0)
    monkeypatch.setattr(module, "IDLE_SECONDS", 1.0)

    async def slow(call: Call) -> Scored:
        await asyncio.sleep(1.5)
        return await ones(call)

    async def body():
        for byte in CONTENT[:20]:
            await asyncio.sleep(0.1)
            yield bytes([byte])
        yield CONTENT[20:]

    async def work(listener: Listener, url: str) -> None:
        headers = SAFETENSORS | {"content-length": str(len(CONTENT))}
        async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
            response = await client.post("/v1/score", content=body(), headers=headers)
            assert response.json()["scores"] == {"r": [1.0]}

    listening(work, slow)


def test_a_client_that_does_not_read_its_answer(monkeypatch):
    """It is hung up on, and the application is not held up by it for ever."""
    monkeypatch.setattr(module, "WRITE_SECONDS", 0.5)
    finished = asyncio.Event()

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % 2**27)]})
        for _ in range(2**7):
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
        finished.set()

    async def work(listener: Listener, url: str) -> None:
        async with asyncio.timeout(120), connected(url) as (reader, writer):
            writer.write(GET)
            await finished.wait()
            with contextlib.suppress(ConnectionError):
                assert len(await reader.read()) < 2**27

    listening(work, app=large)


@pytest.mark.parametrize(
    "many", [GET * 1000, b"GET /healthz HTTP/1.1\r\n" + b"x:y\r\n" * 1000], ids=["requests", "headers"]
)
def test_too_many(many):
    """Requests before the first answer, and headers, are so many that a 400 and the end of the connection follow."""

    async def work(listener: Listener, url: str) -> None:
        async with asyncio.timeout(120), connected(url) as (reader, writer):
            writer.write(many)
            answers = await reader.read()
        assert b"HTTP/1.1 400 Bad Request" in answers
        assert answers.count(b"HTTP/1.1 200 OK") <= 8

    listening(work)


def test_a_token_from_a_file(monkeypatch):
    """The text of a mounted secret, newline and all, lets the client in that reads the same secret."""
    monkeypatch.setenv("IQAREWARD_TOKEN", "s3cret\n")

    async def work(listener: Listener, url: str) -> None:
        with RemoteReward(url, "r", timeout=120) as remote:
            assert (await remote.ascore(torch.rand(2, 3, 8, 8))).tolist() == [1.0, 1.0]

    listening(work, app=application({"r": answering(ones)}, Settings(token="s3cret\n")))


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
