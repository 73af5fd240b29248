"""What a served judge does when the server, the network or the caller's settings fail."""

import asyncio
import json
import math
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iqareward.rewards.vlm.presets import VISUALQUALITY_R1, ZERO_SHOT_LEVELS
from iqareward.serving.client import RemoteError
from iqareward.serving.judges import ServedVLMReward, shares, written_tokens
from tests.tolerances import EXACT
from tests.vlm.chat_double import serve


def _images(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fault", ["429", "502", "503", "cut"])
def test_passing_faults_are_tried_again(double, make, fault) -> None:
    """A busy server or a cut connection costs time, not scores."""
    expected = make()(_images(2))
    double.requests.clear()
    double.faults.extend([fault, fault])
    torch.testing.assert_close(make()(_images(2)), expected, **EXACT)
    assert len(double.requests) == 4


@pytest.mark.parametrize("fault", ["500", "504", "400"])
def test_what_the_server_refuses_is_not_tried_again(double, make, fault) -> None:
    """It would come again; the server's own words are in the error."""
    double.always = fault
    with pytest.raises(RemoteError, match="asked to fail") as raised:
        make()(_images(1))
    assert raised.value.status == int(fault)
    assert len(double.requests) == 1


@pytest.mark.parametrize("fault", ["401", "404"])
def test_a_wrong_setup_is_an_error_in_any_case(double, make, fault) -> None:
    """A wrong token or model name would make every score NaN."""
    double.always = fault
    with pytest.raises(RemoteError, match="asked to fail"):
        make(on_error="nan")(_images(2))


def test_the_timeout_covers_all_images_and_attempts(double, make) -> None:
    """Queued images and pauses between attempts end with it."""
    double.seconds = 1.0
    start = time.monotonic()
    with pytest.raises(RemoteError, match="deadline_exceeded"):
        make(max_in_flight=1, timeout=1.5)(_images(30))
    assert time.monotonic() - start < 15  # half a minute without a timeout
    assert len(double.requests) <= 5
    double.always = "429 for an hour"
    with pytest.raises(RemoteError, match="http_429"):
        make(timeout=60.0)(_images(1))


def test_images_before_the_timeout_keep_their_scores(double, make) -> None:
    """With on_error="nan" only those that did not make it are NaN."""
    double.faults.extend(["", "", "slow"])
    with pytest.warns(RuntimeWarning, match="2 of 4 images are not scored: deadline_exceeded"):
        scores = make(max_in_flight=1, timeout=3.0, on_error="nan")(_images(4))
    assert scores.isfinite().tolist() == [True, True, False, False]


@pytest.mark.parametrize("fault", ["malformed", "no logprobs", "no alternatives", "impossible", "huge"])
def test_answers_without_probabilities_are_errors(double, make, fault) -> None:
    """Never a number: the error shows the beginning of the answer, or its size."""
    double.always = fault
    with pytest.raises(RemoteError, match="malformed_answer"):
        make()(_images(1))
    with pytest.warns(RuntimeWarning, match="2 of 2 images"):
        assert make(on_error="nan")(_images(2)).isnan().all()


def test_one_failure_costs_one_image(double, make) -> None:
    """With on_error="nan" the others keep their scores, and a warning says how many are missing, and why."""
    expected = make()(_images(3))
    reward = make(on_error="nan", max_in_flight=1)
    double.faults.extend(["500", "", "malformed"])
    with pytest.warns(RuntimeWarning, match=r"2 of 3 images are not scored: 500: asked to fail"):
        scores = reward(_images(3))
    assert scores.isnan().tolist() == [True, False, True]
    torch.testing.assert_close(scores[1], expected[1], **EXACT)


def test_a_failed_branch_fails_its_image(double, make) -> None:
    """A rating needs all of its requests: an expectation over some of the digits would be a plausible wrong number."""
    double.faults.extend(["", "500"])
    with pytest.warns(RuntimeWarning, match="asked to fail"):
        scores = make(VISUALQUALITY_R1, on_error="nan", min_mass=0.1)(_images(1))
    assert scores.isnan().all()


def test_no_server_is_an_error_that_names_it(double, make) -> None:
    """With the address that was tried; a second server that serves the same is asked instead."""
    with serve() as gone:
        url = gone.url
    with pytest.raises(RemoteError, match=f"unreachable: {url}/chat/completions"):
        make(url=url, timeout=1.0)(_images(1))
    torch.testing.assert_close(make(url=[url, double.url])(_images(3)), make()(_images(3)), **EXACT)


def test_an_error_ends_the_other_requests(double, make) -> None:
    """A call that raises leaves nothing running behind it."""
    double.seconds = 0.05
    double.faults.append("500")
    reward = make(max_in_flight=2)
    with pytest.raises(RemoteError):
        reward(_images(40))
    time.sleep(0.3)
    assert len(double.requests) < 8


def test_a_cancelled_coroutine_ends_its_requests(double, make) -> None:
    """A caller's own timeout stops the work, and the reward goes on working."""
    double.seconds = 0.05
    reward = make(max_in_flight=2)

    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reward.ascore(_images(100)), 0.2)

    asyncio.run(impatient())
    time.sleep(0.2)
    assert len(double.requests) < 20
    assert reward(_images(1)).isfinite().all()


def test_the_key_comes_from_the_environment(double, make, monkeypatch) -> None:
    """It is sent as a bearer token, and stands neither in the object, nor in its pickle, nor in an error."""
    monkeypatch.setenv("IQAREWARD_VLM_TOKEN", "secret-7")
    reward = make()
    reward(_images(1))
    assert double.headers[0]["Authorization"] == "Bearer secret-7"
    assert b"secret-7" not in pickle.dumps(reward)
    double.always = "500"
    with pytest.raises(RemoteError) as raised:
        reward(_images(1))
    assert "secret-7" not in str(raised.value)
    monkeypatch.delenv("IQAREWARD_VLM_TOKEN")
    double.always = None
    make()(_images(1))
    assert "Authorization" not in double.headers[-1]


def test_many_threads_may_meet_the_first_call(make) -> None:
    """They make one client together."""
    reward = make()
    with ThreadPoolExecutor(max_workers=8) as pool:
        scores = list(pool.map(reward, [_images(2)] * 16))
    for row in scores:
        torch.testing.assert_close(row, scores[0], **EXACT)


def test_missing_httpx_names_the_extra(make, monkeypatch) -> None:
    """The error ends in the line to type."""
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(ImportError, match=r"iqareward\[serve\]"):
        make()


def test_shares_need_mass_and_a_complete_list() -> None:
    """They sum to one over the tokens that count, or are NaN."""
    logprobs = {"1": math.log(0.6), "2": math.log(0.2), "x": math.log(1e-6)}
    found, mass = shares(logprobs, ["1", "2", "3"], 0.5)
    assert math.isclose(mass, 0.8)
    assert [round(share, 6) for share in found] == [0.75, 0.25, 0.0]
    assert all(map(math.isnan, shares(logprobs, ["1", "2"], 0.9)[0]))
    assert all(map(math.isnan, shares(logprobs | {"x": math.log(0.1)}, ["1", "2", "3"], 0.5)[0]))
    assert all(map(math.isnan, shares({}, ["1"], 0.5)[0]))


def test_tokens_of_the_same_text_are_one_answer() -> None:
    """Several ids may read the same; bytes, where given, count rather than the printed token."""
    body = b"""{"choices": [{"logprobs": {"content": [{"token": "?", "bytes": [52], "logprob": -0.1, "top_logprobs": [
        {"token": "4", "logprob": -1.0}, {"token": "?", "bytes": [52], "logprob": -2.0}]}]}}]}"""
    ((text, found),) = written_tokens(body)
    assert text == "4"
    assert math.isclose(found["4"], math.log(math.exp(-1.0) + math.exp(-2.0)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries({}, optional={"token": JSON, "logprob": JSON, "bytes": JSON, "top_logprobs": JSON})


@given(content=JSON | st.lists(ENTRY | st.fixed_dictionaries({"token": st.just("4"), "top_logprobs": st.lists(ENTRY)})))
@settings(max_examples=100, deadline=None)
def test_any_answer_is_read_or_refused(content) -> None:
    """Whatever stands where the log-probabilities should be: probabilities that make sense, or a RemoteError."""
    body = json.dumps({"choices": [{"logprobs": {"content": content}}]}).encode()
    try:
        tokens = written_tokens(body)
    except RemoteError as error:
        assert error.code == "malformed_answer"
    else:
        assert all(0 < sum(map(math.exp, found.values())) <= 1.01 for _, found in tokens)


def test_a_number_in_place_of_bytes_takes_no_memory() -> None:
    """`bytes(10**15)` would."""
    entry = {"token": "4", "logprob": -0.1, "bytes": 10**15}
    body = json.dumps({"choices": [{"logprobs": {"content": [entry | {"top_logprobs": [entry]}]}}]}).encode()
    assert written_tokens(body)[0][0] == "4"


def test_bad_options_are_refused() -> None:
    """Each error says what was expected, and shows no password."""
    for url in ("127.0.0.1:8000", "ftp://host/v1", []):
        with pytest.raises(ValueError, match="http"):
            ServedVLMReward(url, "judge", ZERO_SHOT_LEVELS)
    with pytest.raises(ValueError, match="IQAREWARD_VLM_TOKEN") as raised:
        ServedVLMReward("http://me:hunter2@host/v1", "judge", ZERO_SHOT_LEVELS)
    assert "hunter2" not in str(raised.value)
    for options in ({"scale": "percent"}, {"on_error": "ignore"}, {"max_in_flight": 0},
                    {"timeout": 0}, {"timeout": math.nan}, {"min_mass": 0}, {"min_mass": 1.5}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            ServedVLMReward("http://host/v1", "judge", ZERO_SHOT_LEVELS, **options)
