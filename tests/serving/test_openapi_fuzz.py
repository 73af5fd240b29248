"""Schemathesis against the server's own OpenAPI document: whatever comes in, what goes out is as documented."""

from collections import Counter

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance

import iqareward
from iqareward.serving.requests import Settings
from iqareward.serving.wire import Limits, encode_request
from tests.serving.in_process import application, post, served

EXAMPLES, DAMAGED_BODIES = 25, 150  # per route; of each kind


def damaged(documents: list[bytes]) -> st.SearchStrategy[bytes]:
    """Good bodies, and bodies with some bytes replaced, inserted or cut away."""
    good = st.sampled_from(documents)
    cut = st.tuples(good, st.integers(0, 400), st.integers(0, 30), st.binary(max_size=12))
    return good | cut.map(lambda parts: parts[0][: parts[1]] + parts[3] + parts[0][parts[1] + parts[2] :]) | st.binary()


def requests() -> list[bytes]:
    images = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    pixels = (images * 255).to(torch.uint8)
    return [
        encode_request(images, rewards=["piqe"]),
        encode_request(pixels, pixels, ["a", "b"], rewards=["piqe"], deadline=5.0),
        encode_request([pixels[0], pixels[1, :, :18]], rewards=["piqe"]),
    ]


schemathesis.openapi.media_type("application/x-safetensors", damaged(requests()))

app = application(
    {"piqe": served(iqareward.load("piqe"))}, Settings(limits=Limits(max_bytes=2**20), jpeg="always", token="fuzz")
)
TOKEN = {"Authorization": "Bearer fuzz"}
schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=TOKEN)


@pytest.mark.slow
@schema.parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)
def test_answers_are_as_documented(case):
    """No request of the document's shape, and none near it, gets an undocumented status, form or server error."""
    if "reward" in (case.path_parameters or {}) and len(case.path_parameters["reward"]) % 2:
        case.path_parameters["reward"] = "piqe"  # half of the time a name that is served
    response = case.call(headers=TOKEN)
    # a JSON schema cannot say which bytes are a picture, so not every body of the document's shape can be accepted
    case.validate_response(response, excluded_checks=[positive_data_acceptance])


@pytest.mark.slow
def test_damaged_bodies():
    """Bodies that are nearly right are scored or refused, and never break the server."""
    statuses: Counter[int] = Counter()
    documents, headers = requests(), TOKEN | {"content-type": "application/x-safetensors"}

    @settings(max_examples=DAMAGED_BODIES, deadline=None, database=None, derandomize=True)
    @given(damaged(documents))
    def send_all(body: bytes) -> None:
        statuses[post(app, content=body, headers=headers).status_code] += 1

    send_all()
    assert set(statuses) <= {200, 400, 404, 413, 415, 422}
    assert statuses[200] >= len(documents)
    assert statuses[400] > DAMAGED_BODIES / 10
