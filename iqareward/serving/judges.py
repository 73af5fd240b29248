"""MLLM judges behind OpenAI-compatible servers: for 70 B models, and one judge for many workers.

vLLM and SGLang take the same request: the last message is the assistant's, `continue_final_message` leaves it open, and
`logprobs` gives the most probable next tokens. Temperature 0 and no penalties: the servers would otherwise take both
from the checkpoint's generation config, and SGLang's probabilities are those after penalties.
"""

import asyncio
import base64
import json
import math
import struct
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, final
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from iqareward.rewards.calls import Call
from iqareward.rewards.core import reward_mode, sanitize
from iqareward.rewards.vlm.presets import LevelPreset, RatingPreset, check_preset
from iqareward.serving.client import HttpReward, RemoteError, together
from iqareward.types import Images, Scores

TOP_LOGPROBS = 20  # vLLM refuses more unless started with --max-logprobs

# What tokens outside the list may hold at most, relative to what was found: no unit score moves by more than this.
_UNSEEN_SHARE = 0.01
_ROUNDING = 1e-3  # half-precision servers may give log-probabilities a little above 0

# A first digit that is less likely than this is not asked about again: its ratings count as their mean, which is at
# most half a unit off, so a rating moves by less than 0.0005 for each such digit.
_NEGLIGIBLE = 1e-3
_IMAGES_AT_ONCE = 16  # that are converted on a device

_Tokens = list[tuple[str, dict[str, float]]]
"""For each token that a server wrote: its text, and the log-probabilities of the most probable texts there."""


class ServedReading(NamedTuple):
    """Scores, and how far they can be trusted.

    Attributes:
        scores: `[B]` on the scale of the reward.
        mass: `[B]` probability of the tokens that count (level words, first digits), as far as the server listed them;
            NaN = there was no answer.
    """

    scores: Scores
    mass: Tensor


class _Answer(NamedTuple):
    """What was read about one image: a value in [0, 1], the probability of the tokens that count, and any error."""

    value: float
    mass: float
    error: str = ""


@final
class ServedVLMReward(HttpReward):
    """The expected answer of a vision-language model that vLLM or SGLang serves: deterministic, no text is parsed.

    Asks for the probabilities of the next token after a begun answer. Images travel as 8-bit PNG, without loss, over
    connections that all threads and coroutines of a process share. Needs the extra `serve`.

    A level preset costs one request per image. A rating preset costs one for the first digit and the decimals of the
    most probable one, and one for every other digit that matters: one or two for a sure model, four for an undecided
    one on [1, 5]. With the server's prefix cache, which is on by default, they are cheap. The first decimal is read,
    later ones count as their mean.

    Args:
        base_url: address of the API, e.g. `"http://127.0.0.1:8000/v1"`, or several that serve the same model.
        model: its name on the server.
        preset: what to ask, and how to read the answer.
        scale: `"unit"` is [0, 1]; `"mos"` is [1, 5] for levels, and for ratings the preset's own range.
        timeout: seconds for a whole call, waiting and repeated requests included. A request that is lost, or finds no
            server or a busy one, is sent again until then; what the server refuses is not repeated.
        max_in_flight: requests at the same time.
        on_error: `"raise"`, or `"nan"`: images without a usable answer are NaN, with a RuntimeWarning. A wrong token or
            model name is raised in any case.
        min_mass: probability that the tokens that count must hold; below it the score is NaN, whatever `on_error` is.
        token_variable: environment variable with the bearer token; nothing is sent if it is not set.
        name: Name of the reward; by default `"served:<model>"`.

    Raises:
        ImportError: httpx2 is missing.
        ValueError: an option is out of its range.
        RemoteError: no usable answer, and `on_error` is `"raise"` (at a call).

    Example:
        >>> from iqareward.rewards import ZERO_SHOT_LEVELS
        >>> reward = ServedVLMReward("http://127.0.0.1:8000/v1", "Qwen/Qwen2.5-VL-72B-Instruct", ZERO_SHOT_LEVELS)
        >>> reward.name, reward.bounds  # nothing is sent yet
        ('served:Qwen/Qwen2.5-VL-72B-Instruct', (0.0, 1.0))
    """

    def __init__(
        self,
        base_url: str | Sequence[str],
        model: str,
        preset: LevelPreset | RatingPreset,
        *,
        scale: Literal["unit", "mos"] = "unit",
        timeout: float = 300.0,
        max_in_flight: int = 32,
        on_error: Literal["raise", "nan"] = "raise",
        min_mass: float = 0.5,
        token_variable: str = "IQAREWARD_VLM_TOKEN",
        name: str = "",
    ) -> None:
        check_preset("ServedVLMReward", preset, LevelPreset, RatingPreset)
        if scale not in ("unit", "mos"):
            raise ValueError(f'ServedVLMReward expected `scale` "unit" or "mos", got {scale!r}.')
        if not 0 < min_mass <= 1:
            raise ValueError(f"ServedVLMReward expected `min_mass` in (0, 1], got {min_mass}.")
        if any(urlsplit(url).username is not None for url in ([base_url] if isinstance(base_url, str) else base_url)):
            raise ValueError(
                f"ServedVLMReward expected `base_url` without a name or password: put a token in {token_variable}."
            )
        super().__init__(
            base_url, timeout=timeout, max_in_flight=max_in_flight, on_error=on_error, token_variable=token_variable
        )
        self.model, self.preset, self.scale, self.min_mass = model, preset, scale, min_mass
        self.name = name or f"served:{model}"
        self.bounds = self._low, self._high = _span(preset, scale)

    def reading(self, images: Images) -> ServedReading:
        """Scores, and how much probability the tokens held that they were read from."""
        call = self._call(images)
        answers = self._run(self._answered(self._prepared(call)))
        scores = self._scores(call, answers)
        return ServedReading(scores, torch.tensor([answer.mass for answer in answers]).to(call.device))

    def _prepared(self, call: Call) -> list[np.ndarray | None]:
        """`[H, W, 3]` uint8 of each image, the nearest of 256 levels; None for those that cannot be scored."""
        images = call.check(self.name).images
        rows: list[np.ndarray | None] = []
        with reward_mode(differentiable=False):
            whole = isinstance(images, Tensor)
            for batch in images.split(_IMAGES_AT_ONCE) if whole else [image[None] for image in images]:
                clean, valid = sanitize(batch)
                levels = (clean * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
                rows += [row if intact else None for row, intact in zip(levels, valid.tolist(), strict=True)]
        return rows

    async def _answered(self, prepared: list[np.ndarray | None]) -> list[_Answer]:
        deadline = self._deadline()
        slots = asyncio.Semaphore(self.max_in_flight)  # no more files in memory than can be on the way

        async def one(image: np.ndarray | None) -> _Answer:
            if image is None:
                return _Answer(math.nan, math.nan)
            async with slots:
                return await self._read_image(image, deadline)

        return await together(one(image) for image in prepared)

    def _scores(self, call: Call, answer: list[_Answer]) -> Scores:
        with torch.inference_mode(False), torch.no_grad():
            values = torch.tensor([each.value for each in answer], dtype=torch.float32)
            scores = self._low + (self._high - self._low) * values
            reason = f"the tokens that count held too little probability (min_mass={self.min_mass:g})"
            self._warn(call, scores, [(1, each.error) for each in answer if each.error], otherwise=reason)
            return scores.to(call.device)

    async def _read_image(self, image: np.ndarray, deadline: float) -> _Answer:
        preset = self.preset
        url = "data:image/png;base64," + await asyncio.to_thread(_base64_png, image)

        async def ask(answer: str, max_tokens: int) -> _Tokens:
            body = _chat_request(self.model, preset, url, answer, max_tokens)
            return written_tokens(
                await self._request(
                    "POST", "/chat/completions", deadline=deadline, content=body, content_type="application/json"
                )
            )

        read = _read_level if isinstance(preset, LevelPreset) else _read_rating
        try:
            return await read(ask, preset, self.min_mass)  # pyright: ignore[reportArgumentType]
        except RemoteError as error:
            if not self._tolerates(error):
                raise
            return _Answer(math.nan, math.nan, str(error))


_Ask = Callable[[str, int], Awaitable[_Tokens]]
"""`ask(answer, max_tokens)`: the tokens that follow a begun answer, each with its alternatives."""


async def _read_level(ask: _Ask, preset: LevelPreset, min_mass: float) -> _Answer:
    """The expected worth of the level word: one request."""
    ((_, logprobs), *_) = await ask(preset.stem, 1)
    probabilities, mass = shares(logprobs, preset.levels, min_mass)
    return _Answer(math.fsum(p * worth for p, worth in zip(probabilities, preset.worth, strict=True)), mass)


async def _read_rating(ask: _Ask, preset: RatingPreset, min_mass: float) -> _Answer:
    """The expected rating. The first request writes three tokens, so that it also answers for the decimals there."""
    ratings = preset.ratings
    written = await ask(preset.answer_prefix, 3)
    first = [str(digit) for digit in ratings.digits_after("")]
    probabilities, mass = shares(written[0][1], first, min_mass)
    if math.isnan(probabilities[0]):
        return _Answer(math.nan, mass)
    known = {written[0][0]: written[2][1]} if len(written) == 3 and written[1][0] == "." else {}

    async def worth(start: str, probability: float) -> float:
        decimals = [f"{start}.{digit}" for digit in ratings.digits_after(f"{start}.")]
        if len(decimals) == 1 or probability < _NEGLIGIBLE:
            return ratings.mean(start)
        logprobs = known.get(start)
        if logprobs is None:
            ((_, logprobs), *_) = await ask(f"{preset.answer_prefix}{start}.", 1)
        found, _ = shares(logprobs, [rating[-1] for rating in decimals], min_mass)
        return math.fsum(p * ratings.mean(rating) for p, rating in zip(found, decimals, strict=True))

    values = await together(worth(*branch) for branch in zip(first, probabilities, strict=True))
    rating = math.fsum(p * value for p, value in zip(probabilities, values, strict=True))
    return _Answer((rating - ratings.low) / (ratings.high - ratings.low), mass)


def shares(logprobs: Mapping[str, float], texts: Sequence[str], min_mass: float) -> tuple[list[float], float]:
    """How the probability of the tokens that count is shared among them, and the probability that they hold together.

    The shares are NaN if the tokens hold less than `min_mass`, or if what the server's list leaves out could matter.
    """
    found = [math.exp(logprobs[text]) if text in logprobs else 0.0 for text in texts]
    mass = math.fsum(found)
    unseen = sum(text not in logprobs for text in texts) * math.exp(min(logprobs.values(), default=0.0))
    if not mass >= min_mass or not unseen <= _UNSEEN_SHARE * mass:
        return [math.nan] * len(texts), mass
    return [probability / mass for probability in found], mass


def written_tokens(body: bytes) -> _Tokens:
    """The tokens in a server's answer, or a `RemoteError` if it has no log-probabilities."""
    try:
        positions = json.loads(body)["choices"][0]["logprobs"]["content"]
        tokens = [(_text(position), _alternatives(position["top_logprobs"])) for position in positions]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        why = f"no log-probabilities ({type(error).__name__}: {error})"
        raise RemoteError("malformed_answer", f"{why} in {body[:200]!r}") from error
    if not tokens:
        raise RemoteError("malformed_answer", f"no token in {body[:200]!r}")
    return tokens


def _text(token: Mapping[str, Any]) -> str:
    """A token's text from its bytes where the server gives them, which are exact."""
    given = token.get("bytes")
    # a list, or a number would ask for that many bytes
    return bytes(given).decode("utf-8", "replace") if isinstance(given, list) and given else str(token["token"])


def _alternatives(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in entries:
        text, logprob = _text(entry), float(entry["logprob"])
        if not logprob < _ROUNDING:
            raise ValueError(f"{logprob} is not a log-probability")
        found[text] = float(np.logaddexp(found.get(text, -math.inf), logprob))  # ids of the same text are one answer
    total = math.fsum(map(math.exp, found.values()))
    if not 0 < total < 1 + 10 * _ROUNDING:
        raise ValueError(f"`top_logprobs` hold a probability of {total}")
    return found


def _chat_request(model: str, preset: LevelPreset | RatingPreset, url: str, answer: str, max_tokens: int) -> bytes:
    """The body of a request for the tokens that follow `answer`; "" = the model begins the answer."""
    image = {"type": "image_url", "image_url": {"url": url}}
    question = {"type": "text", "text": preset.question}
    content = [image, question] if preset.image_first else [question, image]
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


def _base64_png(pixels: np.ndarray) -> str:
    """A PNG file of 8-bit RGB pixels `[H, W, 3]`, stored without compression.

    Pillow filters each row to compress it, and takes nine times as long for a photograph of 512 x 512 even without
    compression (22 ms against 2.5), which pays on a network slower than about 100 Mbit/s only.
    """
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter: 0 = none
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of RGB
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows.tobytes(), 0), b"IEND": b""}
    file = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks.items()
    )
    return base64.b64encode(file).decode("ascii")


def _span(preset: LevelPreset | RatingPreset, scale: Literal["unit", "mos"]) -> tuple[float, float]:
    """Lowest and highest score."""
    if scale == "unit":
        return 0.0, 1.0
    return (1.0, 5.0) if isinstance(preset, LevelPreset) else (float(preset.ratings.low), float(preset.ratings.high))
