"""Sana's reward clients of the Cosmos reward service, its table of rewards, and what its NFT trainer makes of them."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.adapters.doubles.cosmos import line_and_npy


class RewardClient:
    """`CosmosImageRewardClient`: any status but 200 of `enqueue` is an error."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.name, self.host = name, environment["REMOTE_REWARD_HOST"].rstrip("/")
        self.token = environment.get("REMOTE_REWARD_TOKEN")

    def post(self, step: str, body: bytes, kind: str) -> tuple[int, str]:
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        request = urllib.request.Request(f"{self.host}/api/reward/{step}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def submit(self, prompts: Sequence[str], images: np.ndarray) -> str:
        line = {"media_type": "image", "prompts": list(prompts), "reward_fn": {self.name: 1.0}}
        status, text = self.post("enqueue", line_and_npy(line, images), "application/octet-stream")
        if status != 200:
            raise RuntimeError(f"Enqueue failed ({status}): {text}")
        return json.loads(text)["uuid"]

    def pull(self, uuid: str) -> tuple[int, str]:
        form = urllib.parse.urlencode({"uuid": uuid, "type": self.name}).encode()
        return self.post("pull", form, "application/x-www-form-urlencoded")

    def check(self, uuid: str) -> dict[str, Any] | None:
        status, text = self.pull(uuid)
        if status == 400:
            return None
        if status != 200:
            raise RuntimeError(f"Pull failed ({status}): {text}")
        return json.loads(text)

    def until_get(self, uuid: str, count: int) -> Tensor:
        """Its other reader, which makes zeros of every error status."""
        while True:
            status, text = self.pull(uuid)
            if status == 200:
                return torch.as_tensor(json.loads(text)["scores"][self.name])
            if status != 400:
                return torch.zeros(count)
            time.sleep(0.01)  # 1 second


def remote_score(name: str, environment: Mapping[str, str]) -> Any:
    """`remote_hpsv3_score` and the like: images [0, 1] as uint8, then scores, or an error."""
    client, wait = RewardClient(name, environment), float(environment.get("REMOTE_REWARD_WAIT_BEFORE_FETCH", "20.0"))

    def score(images: Tensor, prompts: Sequence[str], metadata: Any) -> tuple[np.ndarray, dict]:
        pixels = (images * 255.0).round().clamp(0, 255).to(torch.uint8).numpy().transpose(0, 2, 3, 1)
        uuid = client.submit(prompts, pixels)
        time.sleep(wait)
        deadline = time.monotonic() + 120.0
        while time.monotonic() < deadline:
            result = client.check(uuid)
            if result is None:
                time.sleep(0.01)  # 1 second
                continue
            if name not in result.get("scores", {}):
                raise RuntimeError(f"response missing expected key {name!r}. Raw response: {result}")
            scores = np.asarray(result["scores"][name], dtype=np.float32).reshape(-1)
            if len(scores) != len(images):
                raise RuntimeError("length mismatch")
            return scores, {}
        raise TimeoutError

    return score


def advantages(score_fns: dict[str, Any], weights: dict[str, float], images: Tensor, prompts: list[str]) -> Tensor:
    """`multi_score` and the trainer: `avg` of the details, normalised within each prompt, as NFT's `r`."""
    details: dict[str, Any] = {}
    totals: list[Any] = []
    for name, weight in weights.items():
        scores, _ = score_fns[name](images, prompts, [{}] * len(images))
        details[name] = scores
        weighted = [weight * score for score in scores]
        totals = [a + b for a, b in zip(totals, weighted)] if totals else weighted
    average = torch.as_tensor(np.array(totals)).float()
    rows = torch.tensor([prompts.index(prompt) for prompt in prompts])
    normal = torch.empty_like(average)
    for group in rows.unique():
        values = average[rows == group]
        normal[rows == group] = (values - values.mean()) / (values.std(unbiased=False) + 1e-4)
    return (normal.clamp(-5, 5) / 5 / 2 + 0.5).clamp(0, 1)
