"""A vision-language judge behind an OpenAI-compatible server: for 70 B models, and one judge for many workers."""

import asyncio
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple, final
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from iqareward.rewards.mllm.vlm.png import encode_png, host_pixels
from iqareward.rewards.mllm.vlm.presets import LevelPreset, RatingPreset
from iqareward.rewards.mllm.vlm.served_chat import ChatProtocolError, chat_request, data_url, written_tokens
from iqareward.rewards.mllm.vlm.served_client import ChatClient, ChatServerError
from iqareward.rewards.mllm.vlm.served_readout import Answer, read_level, read_rating, together
from iqareward.types import Images, Scores

_LOGGER = logging.getLogger(__name__)
_NOT_SCORED = Answer(math.nan, math.nan)


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
class ServedVLMReward:
    """The expected answer of a vision-language model that vLLM or SGLang serves: deterministic, no text is parsed.

    Asks for the probabilities of the next token after a begun answer. Images travel as 8-bit PNG, without loss. One
    background thread and its open connections serve all callers of this object, threads and coroutines alike.
    Needs the extra `serve`.

    A level preset costs one request per image. A rating preset costs one for the first digit and the decimals of the
    most probable one, and one for every other digit that matters (`served_readout.read_rating`); turn the server's
    prefix cache on (it is by default) and they are cheap. Its first decimal is read, later ones count as their mean.

    Args:
        base_url: of the API, e.g. `"http://127.0.0.1:8000/v1"`.
        model: its name on the server.
        preset: what to ask, and how to read the answer.
        scale: `"unit"` is [0, 1]; `"mos"` is [1, 5] for levels, and for ratings the preset's own range.
        max_in_flight: requests at one time, over all callers.
        timeout: seconds for one attempt.
        deadline: seconds for one call of the reward, all images and attempts.
        retries: further attempts where no connection was made, one was cut, or the server was busy (429, 502 to 504).
        on_error: what an image gets that the server gave no usable answer for: `"raise"`, or `"nan"`, with the first
            error of each kind logged.
        min_mass: probability that the tokens that count must hold; below it the score is NaN.
        api_key_variable: environment variable with the bearer token; nothing is sent if it is not set.
        name: default: `"served:<model>"`.

    Raises:
        ValueError: an option is out of its range.
        ImportError: httpx is not installed (at the first call).
        ChatServerError: the server did not answer, with `on_error="raise"` (at a call).
        ChatProtocolError: its answer holds no log-probabilities, with `on_error="raise"` (at a call).

    Example:
        >>> from iqareward.rewards.mllm.vlm.presets import ZERO_SHOT_LEVELS
        >>> reward = ServedVLMReward("http://127.0.0.1:8000/v1", "Qwen/Qwen2.5-VL-72B-Instruct", ZERO_SHOT_LEVELS)
        >>> reward.name, reward.bounds  # nothing is sent yet
        ('served:Qwen/Qwen2.5-VL-72B-Instruct', (0.0, 1.0))
    """

    needs_references = False
    needs_prompts = False
    differentiable = False

    def __init__(
        self,
        base_url: str,
        model: str,
        preset: LevelPreset | RatingPreset,
        *,
        scale: Literal["unit", "mos"] = "unit",
        max_in_flight: int = 32,
        timeout: float = 60.0,
        deadline: float = 600.0,
        retries: int = 3,
        on_error: Literal["raise", "nan"] = "raise",
        min_mass: float = 0.5,
        api_key_variable: str = "IQAREWARD_API_KEY",
        name: str = "",
    ) -> None:
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname or address.username is not None:
            raise ValueError(
                'ServedVLMReward expected `base_url` as "http://host:port/v1", without a name or password (a token '
                f"belongs in the environment variable {api_key_variable}), got scheme {address.scheme!r} and host "
                f"{address.hostname!r}."
            )
        if scale not in ("unit", "mos"):
            raise ValueError(f'ServedVLMReward expected `scale` "unit" or "mos", got {scale!r}.')
        if on_error not in ("raise", "nan"):
            raise ValueError(f'ServedVLMReward expected `on_error` "raise" or "nan", got {on_error!r}.')
        if max_in_flight < 1 or retries < 0 or not timeout > 0 or not deadline > 0:
            raise ValueError(
                "ServedVLMReward expected `max_in_flight` >= 1, `retries` >= 0, and `timeout` and `deadline` > 0, got "
                f"{max_in_flight}, {retries}, {timeout} and {deadline}."
            )
        if not 0 < min_mass <= 1:
            raise ValueError(f"ServedVLMReward expected `min_mass` in (0, 1], got {min_mass}.")
        self.model, self.preset, self.scale = model, preset, scale
        self.bounds = self._low, self._high = _span(preset, scale)
        self.name = name or f"served:{model}"
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.max_in_flight, self.timeout, self.deadline, self.retries = max_in_flight, timeout, deadline, retries
        self.on_error, self.min_mass, self.api_key_variable = on_error, min_mass, api_key_variable
        self._start()

    def __call__(
        self,
        images: Images,
        references: Images | None = None,
        prompts: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """Score each image; `[B]` float32, higher is better, NaN = not scored. Only `images` is used."""
        return self.reading(images).scores

    def reading(self, images: Images) -> ServedReading:
        """Scores, and how much probability the tokens held that they were read from."""
        pixels, device = host_pixels(self.name, images)
        future = self._submit(pixels)
        try:
            return self._readout(future.result(), device)
        except BaseException:  # also an interrupt while waiting: nothing goes on in the background
            future.cancel()
            raise

    async def ascore(self, images: Images) -> Scores:
        """The same as a call, without blocking the caller's event loop."""
        pixels, device = host_pixels(self.name, images)
        return self._readout(await asyncio.wrap_future(self._submit(pixels)), device).scores

    def close(self) -> None:
        """Close the connections and end the thread; the next call opens new ones. Runs by itself at the end."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the connections: a copy in another process opens its own."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_client", "_lock", "_reported")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _start(self) -> None:
        self._client: ChatClient | None = None
        self._lock = threading.Lock()
        self._reported: set[str] = set()

    def _connect(self) -> ChatClient:
        with self._lock:
            if self._client is None or self._client.process != os.getpid():
                self._client = ChatClient(
                    self.url,
                    max_in_flight=self.max_in_flight,
                    timeout=self.timeout,
                    retries=self.retries,
                    api_key_variable=self.api_key_variable,
                    purpose="ServedVLMReward",
                )
                weakref.finalize(self, self._client.close)
            return self._client

    def _submit(self, pixels: list[np.ndarray | None]) -> "Future[list[Answer]]":
        client, deadline = self._connect(), time.monotonic() + self.deadline
        crowd = asyncio.Semaphore(self.max_in_flight)  # images whose PNG is in memory

        async def read_all() -> list[Answer]:
            return await together(self._read_image(client, image, deadline, crowd) for image in pixels)

        return client.submit(read_all())

    async def _read_image(
        self, client: ChatClient, image: np.ndarray | None, deadline: float, crowd: asyncio.Semaphore
    ) -> Answer:
        if image is None:
            return _NOT_SCORED
        preset = self.preset
        async with crowd:
            url = await asyncio.to_thread(lambda: data_url(encode_png(image)))

            async def ask(answer: str, max_tokens: int) -> list[tuple[str, dict[str, float]]]:
                request = chat_request(self.model, preset, url, answer, max_tokens)
                return written_tokens(await client.post(request, deadline))

            try:
                if isinstance(preset, LevelPreset):
                    return await read_level(ask, preset, self.min_mass)
                return await read_rating(ask, preset, self.min_mass)
            except (ChatServerError, ChatProtocolError) as error:
                if self.on_error == "raise":
                    raise
                self._report(error)
                return _NOT_SCORED

    def _readout(self, answers: list[Answer], device: torch.device) -> ServedReading:
        with torch.inference_mode(False), torch.no_grad():
            values, mass = (torch.tensor([answer[i] for answer in answers], dtype=torch.float32) for i in range(2))
            return ServedReading((self._low + (self._high - self._low) * values).to(device), mass.to(device))

    def _report(self, error: Exception) -> None:
        if type(error).__name__ not in self._reported:
            self._reported.add(type(error).__name__)
            _LOGGER.warning("%s answers NaN: %s (further errors of this kind are not logged)", self.name, error)


def _span(preset: LevelPreset | RatingPreset, scale: Literal["unit", "mos"]) -> tuple[float, float]:
    """Lowest and highest score."""
    if scale == "unit":
        return 0.0, 1.0
    return (1.0, 5.0) if isinstance(preset, LevelPreset) else (float(preset.ratings.low), float(preset.ratings.high))
