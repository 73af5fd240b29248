"""Requests to an OpenAI-compatible chat server that begin the answer themselves, and the token probabilities it gives.

vLLM and SGLang take the same request: the last message is the assistant's, `continue_final_message` leaves it open, and
`logprobs` gives the most probable next tokens. Temperature 0 and no penalties: the servers would otherwise take both
from the checkpoint's generation config, and SGLang's probabilities are those after penalties.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iqareward.rewards.vlm.presets import LevelPreset, RatingPreset
from iqareward.serving.http_client import RemoteError

# vLLM refuses more unless started with --max-logprobs
TOP_LOGPROBS = 20

# What tokens outside the list may hold at most, relative to what was found: no unit score moves by more than this.
UNSEEN_SHARE = 0.01

ROUNDING = 1e-3  # half-precision servers may give log-probabilities a little above 0


def data_url(png: bytes) -> str:
    """A PNG file as the address that chat messages carry images in."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def chat_request(model: str, preset: LevelPreset | RatingPreset, image: str, answer: str, max_tokens: int) -> bytes:
    """The body of a request for the tokens that follow `answer`.

    Args:
        model: its name on the server.
        preset: what to ask, and in which order.
        image: address of the image, usually a `data_url`.
        answer: how the assistant's answer begins; "" = the model begins it.
        max_tokens: how many tokens to write, each with its alternatives.
    """
    picture = {"type": "image_url", "image_url": {"url": image}}
    question = {"type": "text", "text": preset.question}
    content = [picture, question] if preset.image_first else [question, picture]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if preset.system is not None:
        messages.insert(0, {"role": "system", "content": preset.system})
    if answer:
        messages.append({"role": "assistant", "content": answer})
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "logprobs": True,
        "top_logprobs": TOP_LOGPROBS,
        "add_generation_prompt": not answer,
        "continue_final_message": bool(answer),
        "chat_template_kwargs": dict(preset.template),
    }
    return json.dumps(body).encode()


def written_tokens(body: bytes) -> list[tuple[str, dict[str, float]]]:
    """For each token that the server wrote: its text, and the log-probabilities of the most probable texts there.

    Raises:
        RemoteError: not JSON, no choice, or no log-probabilities in it.
    """
    try:
        positions = json.loads(body)["choices"][0]["logprobs"]["content"]
        tokens = [(_text(position), _alternatives(position["top_logprobs"])) for position in positions]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        why = f"no log-probabilities ({type(error).__name__}: {error})"
        raise RemoteError("malformed_answer", f"{why} in {body[:200]!r}") from error
    if not tokens:
        raise RemoteError("malformed_answer", f"no token in {body[:200]!r}")
    return tokens


def shares(logprobs: Mapping[str, float], texts: Sequence[str], min_mass: float) -> tuple[list[float], float]:
    """How the probability of some tokens is shared among them.

    Args:
        logprobs: of the most probable tokens, by text.
        texts: the tokens that count.
        min_mass: probability that they must hold together.

    Returns:
        One share per text, summing to 1, all NaN if the tokens hold too little or if what the list leaves out could
        matter; and the probability that they hold together.
    """
    found = [math.exp(logprobs[text]) if text in logprobs else 0.0 for text in texts]
    mass = math.fsum(found)
    unseen = sum(text not in logprobs for text in texts) * math.exp(min(logprobs.values(), default=0.0))
    if not mass >= min_mass or not unseen <= UNSEEN_SHARE * mass:
        return [math.nan] * len(texts), mass
    return [probability / mass for probability in found], mass


def _text(token: Mapping[str, Any]) -> str:
    """A token's text from its bytes where the server gives them, which are exact."""
    given = token.get("bytes")
    # a list, or a number would ask for that many bytes
    return bytes(given).decode("utf-8", "replace") if isinstance(given, list) and given else str(token["token"])


def _alternatives(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in entries:
        text, logprob = _text(entry), float(entry["logprob"])
        if not logprob < ROUNDING:
            raise ValueError(f"{logprob} is no log-probability")
        found[text] = float(np.logaddexp(found.get(text, -math.inf), logprob))  # ids of the same text are one answer
    total = math.fsum(map(math.exp, found.values()))
    if not 0 < total < 1 + 10 * ROUNDING:
        raise ValueError(f"`top_logprobs` hold a probability of {total}")
    return found
