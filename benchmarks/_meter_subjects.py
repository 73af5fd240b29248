"""What the meter measures for its table: formulas, rewards, their peers, and networks at full size."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks._classical_peers import PEERS, Peer
from benchmarks.bench_classical import NO_REFERENCE, OURS
from iqareward.rewards.catalog import CATALOG, load

SIDE, BATCH = 512, 32
LIBRARIES = ("piq", "pytorch-msssim", "torchmetrics", "piqa", "kornia")


class Subject(NamedTuple):
    """One row: `begin()` makes, within a meter, the call that is metered warm.

    Attributes:
        name: of the metric or network.
        mode: whose, and how it is called.
        batch: images.
        begin: gives the call.
        selected: what a boolean mask selects, if not everything.
    """

    name: str
    mode: str
    batch: int
    begin: Callable[[], Callable[[], Any]]
    selected: int | None = None


def subjects() -> Iterator[Subject]:
    """All of them, the quick ones first."""
    for name, function in OURS.items():
        yield Subject(name, "formula", BATCH, partial(_function, lambda f=function: f, name))
        if name in CATALOG:
            yield Subject(name, "reward", BATCH, partial(_reward, lambda n=name, **o: load(n, **o), False))
            if CATALOG[name].differentiable:
                yield Subject(name, "reward, gradient", BATCH, partial(_reward, lambda n=name, **o: load(n, **o), True))
        for peer in PEERS[name]:
            if peer.library in LIBRARIES:
                yield Subject(name, peer.library, BATCH, partial(_function, partial(_made, peer), name))
    for name, net in (("lpips", "alex"), ("lpips_vgg", "vgg"), ("dists", "vgg")):
        for grad in (False, True):
            mode = "reward, gradient" if grad else "reward"
            yield Subject(name, mode, BATCH, partial(_reward, partial(_perceptual, name, net), grad))
    for batch in (1, 32):
        yield Subject("Q-Align, bfloat16", "reward", batch, partial(_network, _qalign, batch))
    tokens = (round(SIDE / 28) ** 2, (SIDE // 32) ** 2)
    yield Subject("Qwen2.5-VL-7B, bfloat16", "levels", 8, partial(_network, _qwen2_5, 8), 8 * tokens[0])
    yield Subject("Qwen3-VL-2B, bfloat16", "levels", 8, partial(_network, _qwen3, 8), 8 * tokens[1])


def _pictures(batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, SIDE, SIDE, device="cuda")


def _made(peer: Peer) -> Callable[..., Any]:
    made = peer.make()
    for cell in getattr(made, "__closure__", None) or ():
        if isinstance(cell.cell_contents, torch.nn.Module):
            cell.cell_contents.to("cuda")
    return made


def _function(make: Callable[[], Callable[..., Any]], name: str) -> Callable[[], Any]:
    function = make()
    arguments = [_pictures(BATCH) for _ in range(1 if name in NO_REFERENCE else 2)]
    return torch.no_grad()(lambda: function(*arguments))


def _reward(make: Callable[..., Any], grad: bool) -> Callable[[], Any]:
    reward = make(**({"differentiable": True} if grad else {}))
    images, references = _pictures(BATCH).requires_grad_(grad), _pictures(BATCH)

    def call() -> None:
        scores = reward(images, references=references)
        if grad:
            torch.autograd.grad(scores.sum(), images)

    return call


def _perceptual(name: str, net: str, **options: Any) -> Any:
    import torchvision.models

    from iqareward import DISTSReward, LPIPSReward

    function = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[net]
    with torch.device("meta"):
        whole = function(weights=None).state_dict()
    # not in the folder's own lifetime: the reward reads it at its first call
    file = Path(tempfile.mkdtemp()) / net
    torch.save({key: torch.rand(value.shape) for key, value in whole.items() if key.startswith("features.")}, file)
    if name == "dists":
        return DISTSReward(weights=file, device="cuda", **options)
    return LPIPSReward(net, weights=file, device="cuda", **options)


def _network(make: Callable[[int], Any], batch: int) -> Callable[[], Any]:
    reward, images = make(batch), _pictures(batch)
    return lambda: reward(images)


def _qalign(batch: int) -> Any:
    from benchmarks.bench_qalign import random_model
    from iqareward import QAlignReward
    from iqareward.rewards.owl2.network import Owl2Config

    model = random_model(Owl2Config(), torch.device("cuda", 0), torch.bfloat16)
    return QAlignReward(model, scale="mos", batch_size=batch)


def _qwen2_5(batch: int) -> Any:
    from benchmarks._vlm_models import qwen_config, random_pair
    from iqareward import LevelReward

    pair = random_pair(qwen_config(), torch.device("cuda", 0), torch.bfloat16)
    return LevelReward(pair, device="cuda", dtype=torch.bfloat16, batch_size=batch)


def _qwen3(batch: int) -> Any:
    import transformers

    from iqareward import LevelReward
    from tests.vlm import tiny

    processor = tiny.processor("qwen3_vl")
    processor.image_processor.size = {"shortest_edge": 64**2, "longest_edge": 16384 * 32**2}
    config = tiny.config("qwen3_vl", processor.tokenizer)
    text = {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16, "out_hidden_size": 2048,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config=config.text_config.to_dict() | text, vision_config=config.vision_config.to_dict() | vision,
        **{key: getattr(config, key) for key in ("image_token_id", "video_token_id", "vision_start_token_id",
                                                 "vision_end_token_id")},
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda", 0):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    pair = model.requires_grad_(False).eval(), processor
    return LevelReward(pair, device="cuda", dtype=torch.bfloat16, batch_size=batch)
