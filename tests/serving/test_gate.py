"""Who gets in."""

import base64

import pytest
import torch

import iqareward
from iqareward.rewards.wire import encode_request
from iqareward.serving.settings import Settings
from tests.serving.in_process import SAFETENSORS, application, error_of, get, post, served

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
@pytest.mark.parametrize("path", ["/v1/score", "/v1/rewards", "/metrics", "/openapi.json", "/flow_grpo", "/nope"])
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
    for wrong in ({"token": ""}, {"deadline": 0.0}, {"deadline": float("nan")}, {"jpeg": "yes"}):
        with pytest.raises(ValueError, match="Settings expected"):
            Settings(**wrong)
    assert TOKEN not in repr(Settings(token=TOKEN))
