"""What a served judge does when the server, the network or the caller's settings fail."""

import asyncio
import logging
import math
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from iqareward.rewards.mllm.vlm.presets import VISUALQUALITY_R1, ZERO_SHOT_LEVELS
from iqareward.rewards.mllm.vlm.ratings import Ratings
from iqareward.rewards.mllm.vlm.served import ServedVLMReward
from iqareward.rewards.mllm.vlm.served_chat import ChatProtocolError, shares, written_tokens
from iqareward.rewards.mllm.vlm.served_client import ChatServerError, _pause
from tests.mllm.vlm.chat_double import serve
from tests.tolerances import EXACT


def _images(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fault", ["429", "502", "503", "504", "cut"])
def test_passing_faults_are_tried_again(double, make, fault) -> None:
    """A busy server or a cut connection costs time, not scores."""
    expected = make()(_images(2))
    double.requests.clear()
    double.faults.extend([fault, fault])
    torch.testing.assert_close(make(retries=4)(_images(2)), expected, **EXACT)
    assert len(double.requests) == 4


@pytest.mark.parametrize("fault", ["429", "503", "cut"])
def test_passing_faults_that_stay_are_errors(double, make, fault) -> None:
    """After the last attempt the error says what the server did."""
    double.always = fault
    with pytest.raises(ChatServerError, match="cut the connection" if fault == "cut" else fault):
        make(retries=1)(_images(1))
    assert len(double.requests) == 2


@pytest.mark.parametrize("fault", ["500", "404"])
def test_other_statuses_are_not_tried_again(double, make, fault) -> None:
    """They would come again; the server's own words are in the error."""
    double.always = fault
    with pytest.raises(ChatServerError, match=f"{fault}.*asked to fail"):
        make(retries=5)(_images(1))
    assert len(double.requests) == 1


def test_the_server_says_how_long_to_wait(double, make) -> None:
    """Retry-After is waited for; one beyond the deadline is an error at once."""
    double.faults.append("429")
    start = time.monotonic()
    make(retries=1)(_images(1))
    assert time.monotonic() - start >= 0.05
    double.faults.append("429 for an hour")
    start = time.monotonic()
    with pytest.raises(ChatServerError, match="429"):
        make(retries=1, deadline=30.0)(_images(1))
    assert time.monotonic() - start < 10.0


def test_retry_after_is_seconds_or_a_date() -> None:
    """As RFC 9110 allows; anything else asks for nothing."""
    assert _pause("2.5") == 2.5
    assert _pause("-1") == 0.0
    assert _pause("Fri, 31 Dec 1999 23:59:59 GMT") == 0.0
    assert _pause("Fri, 31 Dec 2100 23:59:59 GMT") > 1e9
    assert _pause("soon") == _pause("") == _pause("nan") == 0.0


def test_a_timeout_is_not_tried_again(double, make) -> None:
    """The server is probably still working on the first request."""
    double.always = "slow"
    with pytest.raises(ChatServerError, match=r"within 0\.1 s"):
        make(retries=5, timeout=0.1)(_images(1))
    assert len(double.requests) == 1


def test_the_deadline_covers_all_images_and_attempts(double, make) -> None:
    """Queued images and pauses between attempts end with it."""
    double.seconds = 0.1
    start = time.monotonic()
    with pytest.raises(ChatServerError, match="deadline"):
        make(max_in_flight=1, deadline=0.35)(_images(30))
    assert time.monotonic() - start < 2.0
    assert len(double.requests) <= 5


def test_images_before_the_deadline_keep_their_scores(double, make) -> None:
    """With on_error="nan" only those that did not make it are NaN."""
    double.seconds = 0.2
    scores = make(max_in_flight=1, deadline=1.0, on_error="nan")(_images(12))
    assert 1 <= scores.isfinite().sum() <= 5
    assert scores[5:].isnan().all()


@pytest.mark.parametrize("fault", ["malformed", "no logprobs", "no alternatives", "impossible", "huge"])
def test_answers_without_probabilities_are_errors(double, make, fault) -> None:
    """Never a number: the error shows the beginning of the answer, or its size."""
    double.always = fault
    with pytest.raises((ChatProtocolError, ChatServerError), match=r"log-probabilities|more than"):
        make()(_images(1))
    assert make(on_error="nan")(_images(2)).isnan().all()


def test_one_failure_costs_one_image(double, make, caplog) -> None:
    """With on_error="nan" the others keep their scores; the first error of a kind is logged, later ones are not."""
    expected = make()(_images(3))
    reward = make(on_error="nan", max_in_flight=1)
    double.faults.extend(["500", "", "malformed"])
    with caplog.at_level(logging.WARNING):
        scores = reward(_images(3))
        double.faults.append("500")
        reward(_images(1))
    assert scores.isnan().tolist() == [True, False, True]
    torch.testing.assert_close(scores[1], expected[1], **EXACT)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "answered 500" in caplog.text


def test_a_failed_branch_fails_its_image(double, make) -> None:
    """A rating needs all of its requests: an expectation over some of the digits would be a plausible wrong number."""
    double.faults.extend(["", "500"])
    scores = make(VISUALQUALITY_R1, on_error="nan", min_mass=0.1)(_images(1))
    assert scores.isnan().all()


def test_no_server_is_an_error_that_names_it(make) -> None:
    """After the retries, with the address that was tried."""
    with serve() as gone:
        url = gone.url
    with pytest.raises(ChatServerError, match=f"{url}/chat/completions cannot be reached"):
        make(url=url, retries=1)(_images(1))


def test_an_error_ends_the_other_requests(double, make) -> None:
    """A call that raises leaves nothing running behind it."""
    double.seconds = 0.05
    double.faults.append("500")
    reward = make(max_in_flight=2)
    with pytest.raises(ChatServerError):
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
    monkeypatch.setenv("IQAREWARD_API_KEY", "secret-7")
    reward = make()
    reward(_images(1))
    assert double.headers[0]["Authorization"] == "Bearer secret-7"
    assert b"secret-7" not in pickle.dumps(reward)
    double.always = "500"
    with pytest.raises(ChatServerError) as raised:
        reward(_images(1))
    assert "secret-7" not in str(raised.value)
    monkeypatch.delenv("IQAREWARD_API_KEY")
    double.always = None
    make()(_images(1))
    assert "Authorization" not in double.headers[-1]


def test_a_reward_that_was_copied_by_fork_connects_anew(double, make) -> None:
    """Threads do not survive a fork, so a client of another process is not used."""
    reward = make()
    expected = reward(_images(1))
    client = reward._client
    process, client.process = client.process, -1
    torch.testing.assert_close(reward(_images(1)), expected, **EXACT)
    assert reward._client is not client
    client.process = process
    client.close()


def test_many_threads_may_meet_the_first_call(make) -> None:
    """They make one client together."""
    reward = make()
    with ThreadPoolExecutor(max_workers=8) as pool:
        scores = list(pool.map(reward, [_images(2)] * 16))
    for row in scores:
        torch.testing.assert_close(row, scores[0], **EXACT)


def test_missing_httpx_names_the_extra(make, monkeypatch) -> None:
    """The error ends in the line to type."""
    monkeypatch.setitem(__import__("sys").modules, "httpx", None)
    with pytest.raises(ImportError, match=r"iqareward\[serve\]"):
        make()(_images(1))


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


def test_bad_options_are_refused() -> None:
    """Each error says what was expected, and shows no password."""
    for url in ("127.0.0.1:8000", "ftp://host/v1", "http:///v1"):
        with pytest.raises(ValueError, match="base_url"):
            ServedVLMReward(url, "judge", ZERO_SHOT_LEVELS)
    with pytest.raises(ValueError, match="environment") as raised:
        ServedVLMReward("http://me:hunter2@host/v1", "judge", ZERO_SHOT_LEVELS)
    assert "hunter2" not in str(raised.value)
    for options in ({"scale": "percent"}, {"on_error": "ignore"}, {"max_in_flight": 0}, {"retries": -1},
                    {"timeout": 0}, {"deadline": math.nan}, {"min_mass": 0}, {"min_mass": 1.5}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            ServedVLMReward("http://host/v1", "judge", ZERO_SHOT_LEVELS, **options)
    assert Ratings(1, 5, 2) == VISUALQUALITY_R1.ratings
