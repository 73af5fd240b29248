"""cosmos-rl, from the images of a rollout to the loss of its diffusion trainer, with local and with remote rewards."""

import io
import json
import queue
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class RewardFn:
    """An entry of `[[train.train_policy.remote_reward.reward_fns]]`."""

    name: str
    weight: float = 1.0
    score_key: str | None = None
    clip_min: float = -5.0
    clip_max: float = 5.0


def configuration(remote: Sequence[RewardFn] = (), clip: float = 5.0, **policy: Any) -> SimpleNamespace:
    """`train.train_policy` with its defaults, and remote rewards if there are any."""
    settings = {"group_reward_calculation": False, "use_remote_reward": bool(remote), "advantage_high": 5.0}
    rewards = SimpleNamespace(reward_fns=remote, reward_clip_min=-clip, reward_clip_max=clip, scale=1.0)
    return SimpleNamespace(
        train=SimpleNamespace(train_policy=SimpleNamespace(**settings | policy, remote_reward=rewards))
    )


@dataclass
class Payload:
    """One prompt and its completions; what the trainer needs beside them is in `extra_info`."""

    prompt: dict[str, Any]
    completions: Any
    extra_info: dict[str, Any] | None = None
    reference_answer: Any = ""
    prompt_idx: int = 0
    completion_trainable: list[bool] | None = None
    rewards: list[float] | None = None
    filter_rewards: list[float] | None = None
    advantages: list[float] | None = None
    report_metrics: list[dict[str, float]] | None = None
    valid: bool = True


def rollout(images: Tensor, latents: Tensor, reference: Any = "", **fields: Any) -> Payload:
    """What the diffusion rollout makes: one tensor of `[n, 3, H, W]` in [0, 1], and latents for the trainer."""
    extra = {"modality": "image", "latents_clean": latents, "timesteps": torch.full((len(images), 1), 500.0)}
    return Payload({"prompt": "restore", "metadata": {}}, images, extra, reference, **fields)


def locally(config: SimpleNamespace, reward_fns: Sequence[Any], payloads: Sequence[Payload]) -> list[Payload]:
    """The dispatcher with two threads, one payload each; an exception of the function ends the rollout."""
    assert not config.train.train_policy.use_remote_reward  # the functions would not be called
    with ThreadPoolExecutor(2) as executor:
        return [
            task.result()
            for task in [executor.submit(_local_rewards, config, reward_fns, payload) for payload in payloads]
        ]


def _local_rewards(config: SimpleNamespace, reward_fns: Sequence[Any], payload: Payload) -> Payload:
    assert payload.reference_answer is not None
    count, group = len(payload.completions), config.train.train_policy.group_reward_calculation
    totals, metrics = [0.0] * count, [{} for _ in range(count)]
    for entry in reward_fns:
        function, weight = entry if isinstance(entry, tuple) else (entry, 1.0)
        for rows in [range(count)] if group else [[row] for row in range(count)]:
            given = payload.completions if group else payload.completions[rows[0]]
            value = function(
                given, payload.reference_answer, prompt=payload.prompt, data_packer=None, config=config, tokenizer=None
            )
            if isinstance(value, tuple):
                value, found = value
                assert isinstance(found, list if group else dict)
                for row, one in zip(rows, found if group else [found], strict=True):
                    metrics[row].update(one)
            assert not group or (isinstance(value, list) and len(value) == count)
            for row, one in zip(rows, value if group else [value], strict=True):
                totals[row] += weight * one
    rewards = np.array(totals).astype(np.float32)
    payload.rewards, payload.filter_rewards, payload.report_metrics = totals, totals, metrics
    payload.advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-5)).tolist()
    payload.valid = len(set(totals)) > 1  # others may be filtered out
    if payload.completion_trainable is None:
        payload.extra_info = None  # as it was rebuilt before there was such a mask
    return payload


class RemoteRewards:
    """The client of the reward service: the addresses and the token are in the environment of the trainer."""

    def __init__(
        self, config: SimpleNamespace, environment: Mapping[str, str], attempts: int = 60, pause: float = 0.01
    ) -> None:
        assert config.train.train_policy.use_remote_reward
        self.config, self.environment = config.train.train_policy.remote_reward, environment
        self.attempts, self.pause = attempts, pause  # the real pause is 1 to 120 seconds
        self.sent: queue.Queue[str] = queue.Queue()
        self.payloads: dict[str, list[Payload]] = {}

    def enqueue(self, payloads: Sequence[Payload]) -> None:
        images = torch.cat([payload.completions for payload in payloads])
        pixels = (images.permute(0, 2, 3, 1) * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        line = {
            "prompts": [payload.prompt["prompt"] for payload in payloads for _ in payload.completions],
            "reward_fn": {entry.name: entry.weight for entry in self.config.reward_fns},
            "media_type": "image",
        }
        answer = self._repeated("ENQUEUE", line_and_npy(line, pixels), "application/octet-stream")
        self.sent.put(answer["uuid"])
        self.payloads[answer["uuid"]] = list(payloads)

    def results(self) -> list[Payload]:
        """Payloads with rewards and advantages; an error in the first one ends the rollout."""
        done: list[tuple[Payload, Tensor]] = []
        while not self.sent.empty():
            name = self.sent.queue[0]
            try:
                rewards = self._fetch(name)
                self.sent.get()
                payloads = self.payloads.pop(name)
                sizes = [len(payload.completions) for payload in payloads]
                done += zip(payloads, rewards[: sum(sizes)].split(sizes), strict=True)
            except Exception as error:
                self.last_error = error  # logged; "will retry later"
                break
        assert done[0]  # it looks at the first one, whether there is one or not
        for payload, rewards in done:
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            if advantages.isnan().any():
                advantages = torch.zeros_like(advantages)
            payload.rewards, payload.advantages = rewards.tolist(), advantages.tolist()
        return [payload for payload, _ in done]

    def _fetch(self, name: str) -> Tensor:
        total = torch.tensor(0.0)
        for entry in self.config.reward_fns:
            form = urllib.parse.urlencode({"uuid": name, "type": entry.name}).encode()
            scores = self._repeated("FETCH", form, "application/x-www-form-urlencoded").get("scores")
            if not isinstance(scores, dict):
                raise KeyError("missing or non-dict 'scores'")
            keys = (entry.score_key or entry.name).split("+")
            score = sum(torch.tensor(scores[key.strip()]) for key in keys)
            total = total + score.clamp(entry.clip_min, entry.clip_max) * entry.weight
        return total.clamp(self.config.reward_clip_min, self.config.reward_clip_max) * self.config.scale

    def _repeated(self, step: str, body: bytes, kind: str) -> Any:
        """The JSON of an answer; every error status is sent again."""
        token = self.environment.get("REMOTE_REWARD_TOKEN", "")
        headers = {"Content-Type": kind, "Authorization": f"Bearer {token}"}
        for attempt in range(self.attempts):
            try:
                request = urllib.request.Request(self.environment[f"REMOTE_REWARD_{step}_URL"], body, headers)
                with urllib.request.urlopen(request, timeout=10) as response:
                    return json.loads(response.read())
            except OSError:
                if attempt + 1 == self.attempts:
                    raise
                time.sleep(self.pause)
        raise AssertionError


def line_and_npy(line: dict[str, Any], array: np.ndarray) -> bytes:
    """A body of `enqueue`."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return json.dumps(line).encode() + b"\n" + stream.getvalue()


def rollouts(payloads: Sequence[Payload]) -> list[SimpleNamespace]:
    """One object per completion, with its own part of `extra_info`."""
    made = []
    for payload in payloads:
        assert len(payload.completions) == len(payload.rewards) == len(payload.advantages)
        for row, (reward, advantage) in enumerate(zip(payload.rewards, payload.advantages)):
            extra = {
                key: value[row] if isinstance(value, Tensor) and len(value) == len(payload.rewards) else value
                for key, value in (payload.extra_info or {}).items()
            }
            made.append(
                SimpleNamespace(
                    prompt=payload.prompt,
                    prompt_idx=payload.prompt_idx,
                    completion=payload.completions[row],
                    reward=reward,
                    advantage=advantage,
                    extra_info=extra,
                )
            )
    return made


class DiffusionNFTDataPacker:
    """Makes the trainer's batch; users pass one of their own to the launcher."""

    def get_policy_input(self, sample: Sequence[SimpleNamespace], device: Any) -> dict[str, Any]:
        for one in sample:
            one.extra_info["advantages"] = torch.tensor(one.advantage, device=device)
        first = sample[0].extra_info
        return {
            key: torch.stack([one.extra_info[key] for one in sample])
            for key, value in first.items()
            if isinstance(value, Tensor)
        }


def train(config: SimpleNamespace, payloads: Sequence[Payload], packer: Any = None) -> Tensor:
    """The trainer's `r` of each sample, after one DiffusionNFT loss whose gradients follow it."""
    batch = (packer or DiffusionNFTDataPacker()).get_policy_input(sample=rollouts(payloads), device="cpu")
    x0, t = batch["latents_clean"], batch["timesteps"][:, :1, None, None] / 1000
    high, beta = config.train.train_policy.advantage_high, 0.1
    r = (batch["advantages"].clamp(-high, high) / high / 2 + 0.5).clamp(0, 1)
    prediction = torch.ones_like(x0, requires_grad=True)
    old = prediction.detach()
    predictions = beta * prediction + (1 - beta) * old, (1 + beta) * old - beta * prediction
    positive, negative = (((1 - t) * x0 - t * one - x0).square().mean((1, 2, 3)) for one in predictions)
    (r * positive / beta + (1 - r) * negative / beta).mul(high).mean().backward()
    pull = prediction.grad.mean((1, 2, 3))  # (2r - 1) times what every sample has alike
    assert torch.equal(pull.argsort(), r.argsort())
    return r
