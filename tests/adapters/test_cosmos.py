"""Local and remote rewards in mocks of cosmos-rl and Sana, up to the trainer's loss; remote ones over a real socket."""

import asyncio
import contextlib
import json
import pickle
import re
import threading
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
import torch
import uvicorn
from torch import Tensor

import iqareward
from examples import dialect_server
from examples.adapters import cosmos_rl
from examples.dialect_server import translator
from iqareward import FullReference, NoReference
from iqareward.serving.backend import Served
from iqareward.serving.listener import Address, BoundedConnection
from iqareward.serving.replica import Scored
from iqareward.serving.requests import ServiceError, Settings
from iqareward.serving.wire import as_floats
from tests.adapters.doubles import cosmos, sana
from tests.adapters.doubles.cosmos import RewardFn, configuration
from tests.adapters.doubles.pages import blocks, execute, package
from tests.adapters.restoration_agent import photographs
from tests.adapters.test_examples import LooksLike
from tests.serving.in_process import answering, application, served
from tests.tolerances import NETWORK_BATCH

COSMOS = ("cosmos-rl", "4903300")
remote = pytest.mark.trainer(*COSMOS, "caller", "reader", "configuration", "gradients", "http")
local = pytest.mark.trainer(*COSMOS, "caller", "reader", "configuration", "gradients", "threads")
with_sana = pytest.mark.trainer("Sana (NFT)", "fd8338f", "caller", "reader", "http")

IMAGES = (255 * photographs(4, side=32)).round() / 255
LATENTS = torch.rand(4, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def contrast(images: Tensor) -> Tensor:
    return images.std(dim=(1, 2, 3))


BRIGHT, CONTRAST = (NoReference(formula, higher_is_better=True) for formula in (brightness, contrast))
WIDE = NoReference(lambda images: 20 + 20 * brightness(images), higher_is_better=True, name="wide")


def normal(scores: Tensor, eps: float, correction: int) -> Tensor:
    """NFT's `r` of the advantages within groups of four."""
    groups = scores.view(-1, 4)
    spread = groups.std(1, correction=correction, keepdim=True) + eps
    return 0.5 + ((groups - groups.mean(1, keepdim=True)) / spread).flatten() / 10


@contextlib.contextmanager
def running(rewards: dict[str, Served], settings: Settings | None = None) -> Iterator[str]:
    """The address of the example in front of a server in this process."""
    server = httpx2.AsyncClient(
        transport=httpx2.ASGITransport(application(rewards, settings)), base_url="http://server"
    )
    config = uvicorn.Config(
        translator(server), http=BoundedConnection, ws="none", lifespan="off", log_config=None, access_log=False
    )
    listener, listening = uvicorn.Server(config), Address("127.0.0.1", 0).bind()
    thread = threading.Thread(target=listener.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listener.should_exit = True
        thread.join()
        listening.close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """One server for the tests that change nothing of it."""
    rewards = {reward.name: served(reward) for reward in (BRIGHT, CONTRAST, WIDE, iqareward.load("piqe"))}
    with running(rewards) as address:
        yield address


def exported(url: str, name: str = "", token: str = "") -> dict[str, str]:
    """What the page says to export for the trainer whose variable has this name."""
    (block,) = (block for block in blocks("how-to/serve-rewards.md", "bash") if f"export {name}=" in block)
    found = dict(re.findall(r"^export (\w+)=(\S+)", block, re.M))
    return {key: value.replace("http://127.0.0.1:8001", url) for key, value in found.items()} | {
        "REMOTE_REWARD_TOKEN": token
    }


def cosmos_client(url: str, config: Any, token: str = "", attempts: int = 1000) -> cosmos.RemoteRewards:
    environment = exported(url, "REMOTE_REWARD_ENQUEUE_URL", token)
    return cosmos.RemoteRewards(config, environment, attempts=attempts)


def sana_environment(url: str, reward: str = "") -> dict[str, str]:
    environment = exported(url, "REMOTE_REWARD_HOST")
    host = environment["REMOTE_REWARD_HOST"]
    assert host.endswith("/cosmos/qalign")
    return environment | {"REMOTE_REWARD_HOST": host.replace("/qalign", reward)}


def rewarded(url: str, *entries: RewardFn, groups: int = 1, **options: Any) -> tuple[Any, list[cosmos.Payload]]:
    """The configuration, and groups of the same four images in reverse order each second time, with rewards."""
    config = configuration(entries, **options)
    client = cosmos_client(url, config)
    orders = [torch.arange(4) if group % 2 == 0 else torch.arange(3, -1, -1) for group in range(groups)]
    client.enqueue([cosmos.rollout(IMAGES[order], LATENTS[order]) for order in orders])
    return config, client.results()


def failing(url: str, entry: RewardFn, images: Tensor = IMAGES) -> cosmos.RemoteRewards:
    """A client whose rollout ends without rewards, after one answer."""
    client = cosmos_client(url, configuration([entry]), attempts=1)
    payload = cosmos.rollout(images, LATENTS)
    client.enqueue([payload])
    with pytest.raises(IndexError):
        client.results()
    assert isinstance(client.last_error, KeyError)  # and no status that it would repeat
    assert payload.rewards is None
    return client


@local
@pytest.mark.parametrize("form", [lambda images: images, list], ids=["tensor", "list"])
@pytest.mark.parametrize("group", [True, False], ids=["group", "one by one"])
def test_local_scores_reach_the_loss(
    monkeypatch: pytest.MonkeyPatch, group: bool, form: Callable[[Tensor], Any]
) -> None:
    """One tensor of a diffusion rollout, or a list, gives the advantages of its scores, and metrics under its name."""
    monkeypatch.setattr(cosmos_rl, "REWARD", iqareward.load("ssim"))
    monkeypatch.setattr(cosmos_rl, "USE_REFERENCE", True)
    config = configuration(group_reward_calculation=group)
    payload = cosmos.rollout(form(IMAGES), LATENTS, reference=IMAGES[3])
    cosmos_rl.keep_latents([payload])
    (payload,) = cosmos.locally(config, [(cosmos_rl.quality, 2.0)], [payload])
    expected = iqareward.load("ssim")(IMAGES, references=IMAGES[3].expand_as(IMAGES))
    torch.testing.assert_close(torch.tensor(payload.rewards), 2 * expected, **NETWORK_BATCH)
    assert payload.report_metrics == [{"ssim": reward / 2} for reward in payload.rewards]
    r = cosmos.train(config, [payload])
    torch.testing.assert_close(r, normal(expected, 1e-5, 0), **NETWORK_BATCH)


@local
def test_local_rewards_lose_the_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why `keep_latents`: without it the diffusion trainer gets advantages and nothing else."""
    monkeypatch.setattr(cosmos_rl, "REWARD", BRIGHT)
    config = configuration(group_reward_calculation=True)
    payloads = cosmos.locally(config, [cosmos_rl.quality], [cosmos.rollout(IMAGES, LATENTS)])
    with pytest.raises(KeyError, match="latents_clean"):
        cosmos.train(config, payloads)


@local
def test_local_calls_come_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads call the function; the model is never entered twice."""
    inside = threading.Lock()

    def exclusive(images: Tensor) -> Tensor:
        assert inside.acquire(blocking=False)
        try:
            return sum(brightness(images) for _ in range(50)) / 50
        finally:
            inside.release()

    monkeypatch.setattr(cosmos_rl, "REWARD", NoReference(exclusive, higher_is_better=True))
    config = configuration(group_reward_calculation=True)
    payloads = cosmos.locally(config, [cosmos_rl.quality], [cosmos.rollout(IMAGES, LATENTS) for _ in range(16)])
    assert len({tuple(payload.rewards) for payload in payloads}) == 1


@pytest.mark.trainer(*COSMOS, "processes")
def test_local_function_in_other_processes() -> None:
    """Worker processes find the function by its name, and load their own model."""
    assert pickle.loads(pickle.dumps(cosmos_rl.quality)) is cosmos_rl.quality


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@local
def test_local_failures_and_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image without a score ends the rollout; a video is refused; the prompt is the text in the prompt."""
    monkeypatch.setattr(cosmos_rl, "REWARD", LooksLike())
    grouped, single = configuration(group_reward_calculation=True), configuration()
    payload = cosmos.rollout(IMAGES, LATENTS)
    payload.prompt["prompt"] = "a bright photo"
    (payload,) = cosmos.locally(grouped, [cosmos_rl.quality], [payload])
    torch.testing.assert_close(torch.tensor(payload.rewards), brightness(IMAGES), **NETWORK_BATCH)
    with pytest.raises(ValueError, match="could not score every image"):
        cosmos.locally(grouped, [cosmos_rl.quality], [cosmos.rollout(IMAGES * torch.nan, LATENTS)])
    for config in (grouped, single):
        with pytest.raises(ValueError, match="to_images expected"):
            cosmos.locally(config, [cosmos_rl.quality], [cosmos.rollout(IMAGES[None], LATENTS)])


@remote
def test_remote_scores_reach_the_loss(url: str) -> None:
    """Several rewards with weights, two prompts in one request; the trainer's `r` follows the scores."""
    config, payloads = rewarded(url, RewardFn("brightness", 0.5), RewardFn("contrast", -2.0), groups=2)
    expected = 0.5 * brightness(IMAGES) - 2 * contrast(IMAGES)
    both = torch.cat([expected, expected.flip(0)])
    torch.testing.assert_close(torch.tensor([p.rewards for p in payloads]).flatten(), both, **NETWORK_BATCH)
    r = cosmos.train(config, payloads)
    torch.testing.assert_close(r, normal(both, 1e-4, 1), **NETWORK_BATCH)


@remote
def test_remote_scores_are_clipped_by_the_client(url: str) -> None:
    """Scores above its default limit all become 5, and nothing is learned; both limits must be raised."""
    _, (clipped,) = rewarded(url, RewardFn("wide"))
    assert clipped.rewards == [5.0] * 4
    assert clipped.advantages == [0.0] * 4
    config, (kept,) = rewarded(url, RewardFn("wide", clip_max=100.0), clip=100.0)
    torch.testing.assert_close(torch.tensor(kept.rewards), 20 + 20 * brightness(IMAGES), **NETWORK_BATCH)
    torch.testing.assert_close(cosmos.train(config, [kept]), normal(20 * brightness(IMAGES), 1e-4, 1), **NETWORK_BATCH)


@remote
@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_remote_images_without_a_score_end_the_rollout(url: str) -> None:
    """They are never a number, which the client would average, nor a status that it repeats for an hour."""
    failing(url, RewardFn("piqe"), IMAGES[..., :8, :8])
    failing(url, RewardFn("nothing"))
    failing(url, RewardFn("brightness", score_key="overall_reward"))


@remote
def test_remote_scores_that_are_not_here(url: str) -> None:
    """After a restart, and with another token, the rollout ends; a slow reward is asked for until it is scored."""
    client = cosmos_client(url, configuration([RewardFn("brightness")]), attempts=1)
    client.enqueue([cosmos.rollout(IMAGES, LATENTS)])
    client.environment = exported(url, "REMOTE_REWARD_ENQUEUE_URL", "another")
    with pytest.raises(IndexError):
        client.results()
    client.environment = exported(url, "REMOTE_REWARD_ENQUEUE_URL")
    assert client.results()[0].rewards is not None


@remote
def test_remote_scores_of_a_slow_or_restarting_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pull` says "not yet" until the scores are there, and a server that is busy is asked again."""
    monkeypatch.setattr(dialect_server, "PULL_SECONDS", 0.01)
    monkeypatch.setattr(dialect_server, "BUSY_SECONDS", 0.01)
    asked: list[Any] = []

    async def score(call: Any) -> Scored:
        asked.append(call)
        await asyncio.sleep(0.05)
        if len(asked) < 3:
            raise ServiceError(503, "unavailable", "restarting")
        return Scored(brightness(as_floats(call.images)))

    with running({"told": answering(score)}) as url:
        client = cosmos_client(url, configuration([RewardFn("told")]), attempts=1000)
        client.enqueue([cosmos.rollout(IMAGES, LATENTS)])
        (payload,) = client.results()
    assert len(asked) == 3
    torch.testing.assert_close(torch.tensor(payload.rewards), brightness(IMAGES), **NETWORK_BATCH)


@pytest.mark.trainer(*COSMOS, "threads")
@remote
def test_remote_scores_of_many_ranks(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Eight ranks at once, of which the server holds few bodies at a time, each get their own scores."""
    monkeypatch.setattr(dialect_server, "MAX_QUEUED_BYTES", 3 * (IMAGES[:2].numel() + 1000))

    def rank(number: int) -> Tensor:
        client = cosmos_client(url, configuration([RewardFn("brightness")]), attempts=1000)
        client.enqueue([cosmos.rollout(IMAGES[[number % 4, 3 - number % 4]], LATENTS[:2])])
        return torch.tensor(client.results()[0].rewards)

    with ThreadPoolExecutor(8) as ranks:
        found = torch.stack(list(ranks.map(rank, range(16))))
    scores = brightness(IMAGES)
    torch.testing.assert_close(found, torch.stack([scores, scores.flip(0)], dim=1).repeat(4, 1), **NETWORK_BATCH)


@remote
def test_remote_token() -> None:
    """The token of the server is the client's `REMOTE_REWARD_TOKEN`; without it nothing is read."""
    with running({"brightness": served(BRIGHT)}, Settings(token="secret")) as url:
        config, payload = configuration([RewardFn("brightness")]), cosmos.rollout(IMAGES, LATENTS)
        client = cosmos_client(url, config, "secret")
        client.enqueue([payload])
        assert client.results()[0].rewards is not None
        for token in ("wrong", ""):
            with pytest.raises(urllib.error.HTTPError, match="401") as refused:
                cosmos_client(url, config, token, 1).enqueue([payload])
            refused.value.close()


@with_sana
@pytest.mark.parametrize("path", ["", "/brightness"], ids=["its own name", "the name in the path"])
def test_sana(url: str, path: str) -> None:
    """A reward in its table, or ours in the place of one of its own, gives the advantages of the scores."""
    name = "hpsv3" if path else "brightness"
    slots = {f"remote_{name}": sana.remote_score(name, sana_environment(url, path))}
    r = sana.advantages(slots, {f"remote_{name}": 1.0}, IMAGES, ["a"] * 4)
    torch.testing.assert_close(r, normal(brightness(IMAGES), 1e-4, 0), **NETWORK_BATCH)


@with_sana
@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_sana_never_takes_an_error_for_zeros(url: str) -> None:
    """An image without a score is an error with its reason, also in the reader that makes zeros of error statuses."""
    tiny = IMAGES[..., :8, :8]
    with pytest.raises(RuntimeError, match=r"not_scored: no score for images \[0, 1, 2, 3\]"):
        sana.remote_score("piqe", sana_environment(url))(tiny, [""] * 4, None)
    client = sana.RewardClient("piqe", sana_environment(url))
    uuid = client.submit([""] * 4, (tiny * 255).byte().permute(0, 2, 3, 1).numpy())
    with pytest.raises(KeyError, match="scores"):
        client.until_get(uuid, 4)


def test_what_the_dialect_cannot_serve() -> None:
    """A reward that needs references gets none from this client, and says so."""
    reward = FullReference(lambda images, references: brightness(images), higher_is_better=True, name="close")
    with running({"close": served(reward)}) as url, pytest.raises(RuntimeError, match="close needs references"):
        sana.remote_score("close", sana_environment(url))(IMAGES, [""] * 4, None)


@local
def test_what_the_page_says_of_local_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the TOML of the page the example is called for whole groups."""
    (text,) = (block for block in blocks("reference/adapters.md", "toml") if "use_remote_reward" in block)
    settings = tomllib.loads(text)["train"]
    assert settings["non_text"]  # threads, and completions of any type
    seen: list[int] = []

    def counting(images: Tensor) -> Tensor:
        seen.append(len(images))
        return brightness(images)

    monkeypatch.setattr(cosmos_rl, "REWARD", NoReference(counting, higher_is_better=True))
    cosmos.locally(configuration(**settings["train_policy"]), [cosmos_rl.quality], [cosmos.rollout(IMAGES, LATENTS)])
    assert seen == [4]


@remote
def test_what_the_page_says_to_configure() -> None:
    """Its TOML names a reward of the server, whose scores reach the loss unclipped; its check lists that reward."""
    (text,) = blocks("how-to/serve-rewards.md", "toml")
    policy = tomllib.loads(text)["train"]["train_policy"]
    entries = [RewardFn(**entry) for entry in policy["remote_reward"].pop("reward_fns")]
    config = configuration(entries, use_remote_reward=policy.pop("use_remote_reward"))
    vars(config.train.train_policy.remote_reward).update(policy.pop("remote_reward"))
    assert not policy
    high = NoReference(lambda images: 50 * brightness(images), higher_is_better=True, name="qalign")
    with running({"qalign": served(high)}) as url:
        client = cosmos_client(url, config)
        client.enqueue([cosmos.rollout(IMAGES, LATENTS)])
        r = cosmos.train(config, client.results())
        (check,) = (block for block in blocks("how-to/serve-rewards.md", "bash") if "/ping" in block)
        address = check.split()[-1].replace("http://127.0.0.1:8001", url)
        with urllib.request.urlopen(address, b"info_data=") as response:
            assert json.loads(response.read())["rewards"] == ["qalign"]
    torch.testing.assert_close(r, normal(50 * brightness(IMAGES), 1e-4, 1), **NETWORK_BATCH)


@pytest.mark.trainer(*COSMOS, "weights")
@remote
def test_weights_by_difficulty(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The page's data packer weights the advantages of each prompt by how far its images are from the ground truth."""
    package(monkeypatch, cosmos_rl__tools__dataset__diffusion_nft=cosmos)
    (code,) = [block for block in blocks("how-to/adaptive-in-your-trainer.md") if "cosmos_rl" in block]
    scope: dict[str, Any] = {}
    execute(code, scope)
    config = configuration([RewardFn("brightness")])
    client = cosmos_client(url, config)
    payloads = [cosmos.rollout(IMAGES, LATENTS) for _ in range(2)]
    truths = (255 * IMAGES[:1]).byte(), (255 * (1 - IMAGES[:1])).byte()
    for number, (payload, truth) in enumerate(zip(payloads, truths)):
        payload.prompt_idx, payload.prompt = number, {"prompt": "restore", "metadata": {"gt_path": truth[0]}}
    client.enqueue(payloads)
    payloads = client.results()
    plain = cosmos.train(config, payloads)
    weighted = cosmos.train(config, payloads, packer=scope["WeightedDataPacker"]())
    share = ((weighted - 0.5) / (plain - 0.5)).view(2, 4)
    torch.testing.assert_close(share, share[:, :1].expand(2, 4), rtol=1e-3, atol=1e-4)
    assert 0 < share[0, 0] < share[1, 0] <= 1
