"""A vision-language judge behind an OpenAI-compatible server: for 70 B models, and one judge for many workers."""

import asyncio
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, final
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from iqareward.rewards.calls import Call
from iqareward.rewards.core import BaseReward
from iqareward.rewards.vlm.png import encode_png, host_pixels
from iqareward.rewards.vlm.presets import LevelPreset, RatingPreset
from iqareward.serving.http_client import HttpClient, RemoteError
from iqareward.serving.served_chat import chat_request, data_url, written_tokens
from iqareward.serving.served_readout import Answer, read_level, read_rating, together
from iqareward.types import Images, Scores

_REFUSED = {401, 403, 404}  # a wrong token or model name: no policy turns that into NaN
_JSON = {"Content-Type": "application/json"}


class ServedReading(NamedTuple):
    """Scores, and how far they can be trusted.

    Attributes:
        scores: `[B]` on the scale of the reward.
        mass: `[B]` probability of the tokens that count (level words, first digits), as far as the server listed them;
            NaN = there was no answer.
    """

    scores: Scores
    mass: Tensor


@final
class ServedVLMReward(BaseReward):
    """The expected answer of a vision-language model that vLLM or SGLang serves: deterministic, no text is parsed.

    Asks for the probabilities of the next token after a begun answer. Images travel as 8-bit PNG, without loss, over
    connections that all threads and coroutines of a process share. Needs the extra `serve`.

    A level preset costs one request per image. A rating preset costs one for the first digit and the decimals of the
    most probable one, and one for every other digit that matters (`served_readout.read_rating`); with the server's
    prefix cache, which is on by default, they are cheap. The first decimal is read, later ones count as their mean.

    Args:
        base_url: of the API, e.g. `"http://127.0.0.1:8000/v1"`, or several that serve the same model.
        model: its name on the server.
        preset: what to ask, and how to read the answer.
        scale: `"unit"` is [0, 1]; `"mos"` is [1, 5] for levels, and for ratings the preset's own range.
        timeout: seconds for a whole call, waiting and repeated requests included.
        max_in_flight: requests at the same time.
        on_error: `"raise"`, or `"nan"`: images without a usable answer are NaN, with a RuntimeWarning. A wrong token or
            model name is raised in any case.
        attempts: how often a request may be lost on the way. A server that is busy is asked again until the timeout;
            what it refuses is not repeated.
        hedge_after: seconds after which an unanswered request is sent once more; None = never.
        min_mass: probability that the tokens that count must hold; below it the score is NaN, whatever `on_error` is.
        token_variable: environment variable with the bearer token; nothing is sent if it is not set.
        name: default: `"served:<model>"`.

    Raises:
        ImportError: httpx2 is missing.
        ValueError: an option is out of its range.
        RemoteError: no usable answer, and `on_error` is `"raise"` (at a call).

    Example:
        >>> from iqareward.rewards.vlm.presets import ZERO_SHOT_LEVELS
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
        attempts: int = 4,
        hedge_after: float | None = None,
        min_mass: float = 0.5,
        token_variable: str = "IQAREWARD_VLM_TOKEN",
        name: str = "",
    ) -> None:
        if scale not in ("unit", "mos"):
            raise ValueError(f'ServedVLMReward expected `scale` "unit" or "mos", got {scale!r}.')
        if on_error not in ("raise", "nan"):
            raise ValueError(f'ServedVLMReward expected `on_error` "raise" or "nan", got {on_error!r}.')
        if not timeout > 0:
            raise ValueError(f"ServedVLMReward expected `timeout` > 0 seconds, got {timeout}.")
        if not 0 < min_mass <= 1:
            raise ValueError(f"ServedVLMReward expected `min_mass` in (0, 1], got {min_mass}.")
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        if any(urlsplit(url).username is not None for url in urls):
            raise ValueError(
                f"ServedVLMReward expected `base_url` without a name or password: put a token in {token_variable}."
            )
        self.model, self.preset, self.scale, self.timeout = model, preset, scale, timeout
        self.bounds = self._low, self._high = _span(preset, scale)
        self.name = name or f"served:{model}"
        self.max_in_flight, self.on_error, self.min_mass = max_in_flight, on_error, min_mass
        self._client = HttpClient(
            urls,
            purpose="ServedVLMReward",
            max_in_flight=max_in_flight,
            attempts=attempts,
            hedge_after=hedge_after,
            token_variable=token_variable,
        )

    def score_call(self, call: Call) -> Scores:
        return self.reading(call.images).scores

    def reading(self, images: Images) -> ServedReading:
        """Scores, and how much probability the tokens held that they were read from."""
        pixels, device = host_pixels(self.name, self._call(images).images)
        return self._reading(images, self._client.run(self._read(pixels)), device)

    async def ascore(
        self,
        images: Images,
        references: Images | None = None,
        *,
        inputs: Images | None = None,
        prompts: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """The same without blocking the event loop; cancelling it cancels its requests."""
        pixels, device = host_pixels(self.name, self._call(images).images)
        return self._reading(images, await self._client.arun(self._read(pixels)), device).scores

    def close(self) -> None:
        """End the connections of this process; a later call opens new ones."""
        self._client.close()

    async def _read(self, pixels: list[np.ndarray | None]) -> list[Answer]:
        deadline = asyncio.get_running_loop().time() + self.timeout
        slots = asyncio.Semaphore(self.max_in_flight)  # no more files in memory than can be on the way

        async def one(image: np.ndarray | None) -> Answer:
            if image is None:
                return Answer(math.nan, math.nan)
            async with slots:
                return await self._read_image(image, deadline)

        return await together(one(image) for image in pixels)

    async def _read_image(self, image: np.ndarray, deadline: float) -> Answer:
        preset = self.preset
        url = await asyncio.to_thread(lambda: data_url(encode_png(image)))

        async def ask(answer: str, max_tokens: int) -> list[tuple[str, dict[str, float]]]:
            body = chat_request(self.model, preset, url, answer, max_tokens)
            path = "/chat/completions"
            return written_tokens(
                await self._client.request("POST", path, deadline=deadline, content=body, headers=_JSON)
            )

        try:
            if isinstance(preset, LevelPreset):
                return await read_level(ask, preset, self.min_mass)
            return await read_rating(ask, preset, self.min_mass)
        except RemoteError as error:
            if self.on_error == "raise" or error.status in _REFUSED:
                raise
            return Answer(math.nan, math.nan, str(error))

    def _reading(self, images: Images, answers: list[Answer], device: torch.device) -> ServedReading:
        failures = [answer.error for answer in answers if answer.error]
        if failures:
            message = f"{self.name}: {len(failures)} of {len(answers)} images are not scored: {failures[0]}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        with torch.inference_mode(False), torch.no_grad():
            values, mass = (torch.tensor([answer[i] for answer in answers], dtype=torch.float32) for i in range(2))
            scores = self._low + (self._high - self._low) * values
            if not failures:
                reason = f"the tokens that count held too little probability (min_mass={self.min_mass:g})"
                self._watch.look(self.name, scores, images, otherwise=reason)
            return ServedReading(scores.to(device), mass.to(device))


def _span(preset: LevelPreset | RatingPreset, scale: Literal["unit", "mos"]) -> tuple[float, float]:
    """Lowest and highest score."""
    if scale == "unit":
        return 0.0, 1.0
    return (1.0, 5.0) if isinstance(preset, LevelPreset) else (float(preset.ratings.low), float(preset.ratings.high))
