"""Who gets in."""

import asyncio
import base64
from typing import Any

import pytest
import torch

import iqareward
from iqareward.serving import app as serving_app
from iqareward.serving.app import build_app
from iqareward.serving.backend import Service
from iqareward.serving.requests import Settings
from iqareward.serving.wire import encode_request
from tests.serving.in_process import SAFETENSORS, application, error_of, get, post, send, served

TOKEN = "correct horse"


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture(scope="module")
def app():
    return application({"piqe": served(iqareward.load("piqe"))}, Settings(token=TOKEN))


@pytest.mark.parametrize("authorization", [f"Bearer {TOKEN}", f"bearer {TOKEN}", basic("any", TOKEN), basic("", TOKEN)])
def test_right_token(app, authorization):
    """The token opens as bearer token and as the password of a URL."""
    content = encode_request(torch.rand(1, 3, 32, 32), rewards=["piqe"])
    response = post(app, content=content, headers=SAFETENSORS | {"authorization": authorization})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        None, "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Token {TOKEN}",
        "Basic", "Basic !!!", basic(TOKEN, ""), basic("any", "wrong"), "Bearer \u00fcber",
        "Basic " + base64.b64encode(TOKEN.encode()).decode(),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/score", "/v1/rewards", "/metrics", "/openapi.json", "/nope"])
def test_wrong_token(app, authorization, path):
    """Without the token nothing but the health check answers, and errors do not tell which paths exist."""
    headers = {} if authorization is None else {"authorization": authorization.encode()}
    response = post(app, path, content=b"", headers=headers)
    assert error_of(response) == (401, "unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


def test_health_needs_no_token(app):
    """Load balancers have none."""
    assert get(app, "/healthz").status_code == 200


def test_settings():
    """Settings that would leave a server open or dead by mistake are refused, and the token is not shown."""
    for wrong in (
        {"token": ""},
        {"token": " \n"},
        {"token": "schl\u00fcssel"},
        {"token": "a\x00b"},
        {"deadline": 0.0},
        {"deadline": float("nan")},
        {"jpeg": "yes"},
    ):
        with pytest.raises(ValueError, match="Settings"):
            Settings(**wrong)
    assert TOKEN not in repr(Settings(token=TOKEN))


@pytest.mark.parametrize(
    "sent", ["Bearer secret", "Bearer  secret \t", basic("any", "secret"), basic("any", "secret\n")]
)
def test_white_space_around_the_token(sent):
    """A token from a file or a mounted secret ends with a newline, which neither side takes for a part of it."""
    app = application({"piqe": served(iqareward.load("piqe"))}, Settings(token="secret\r\n"))
    assert get(app, "/v1/rewards", headers={"authorization": sent}).status_code == 200


def test_requests_without_a_body_take_no_room_from_scoring():
    """While as many GETs as may be are under way, images are scored, and one more GET is told to come again."""

    async def scenario() -> None:
        release = asyncio.Event()

        async def health() -> dict[str, str]:
            await release.wait()
            return {"piqe": "ok"}

        async def unused() -> Any:
            raise AssertionError

        service = Service({"piqe": served(iqareward.load("piqe"))}, health, unused, unused)
        app = build_app(service, Settings(max_inflight_requests=3))
        waiting = [asyncio.ensure_future(send(app, "GET", "/healthz")) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert error_of(await send(app, "GET", "/healthz")) == (429, "overloaded")
        content = encode_request(torch.rand(1, 3, 32, 32), rewards=["piqe"])
        assert (await send(app, "POST", "/v1/score", content=content, headers=SAFETENSORS)).status_code == 200
        release.set()
        assert [response.status_code for response in await asyncio.gather(*waiting)] == [200] * 3

    asyncio.run(scenario())


@pytest.mark.parametrize(("path", "token"), [("/healthz", ""), ("/v1/rewards", TOKEN), ("/v1/rewards", "wrong")])
def test_scoring_does_not_queue_behind_questions(monkeypatch, app, path, token):
    """Forty clients who ask, or are refused, get their answers one after the other; an image is scored meanwhile."""
    monkeypatch.setattr(serving_app, "PAUSE", 0.2)

    async def scenario() -> None:
        headers = {"authorization": f"Bearer {token}"}
        asking = [asyncio.ensure_future(send(app, "GET", path, headers=headers)) for _ in range(40)]
        content = encode_request(torch.rand(1, 3, 32, 32), rewards=["piqe"])
        headers = SAFETENSORS | {"authorization": f"Bearer {TOKEN}"}
        assert (await send(app, "POST", "/v1/score", content=content, headers=headers)).status_code == 200
        assert not all(task.done() for task in asking)
        for task in asking:
            task.cancel()
        await asyncio.wait(asking)

    asyncio.run(scenario())
