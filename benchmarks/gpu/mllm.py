"""Rewards by large models at their full sizes with seeded random weights, against the published ways of asking them."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.bench_qalign import random_model, reference_scores, tflop_per_image
from benchmarks.gpu.device import (
    CUDA,
    DEVICE,
    HALF,
    Call,
    Row,
    equal,
    gap,
    kernels,
    noise,
    patched,
    seconds,
    speed,
    sync,
    waits,
    wall_ms,
)
from benchmarks.gpu.run import Clock, gib_allocated, read, release
from iqareward import LevelReward, MicroBatched, QAlignReward, RatingReward
from iqareward.rewards.owl2.checkpoints import quantize_decoder
from iqareward.rewards.owl2.network import Owl2, Owl2Config
from iqareward.rewards.vlm.checkpoints import fuse_norms
from tests.owl2.owl2_tiny import SMALL

Measure = Callable[[Call, int], Row]

PREDICTED = {"compiled b32": {"images_per_s": 272, "first_call_s": 10}, "7b level b8": {"wall_ms": 162}}


def qalign_network(tiny: bool) -> Owl2:
    model = random_model(SMALL if tiny else Owl2Config(), DEVICE, HALF)
    sync()
    return model


def qalign_setting(clock: Clock) -> tuple[Any, Tensor, tuple[int, ...], Measure]:
    """The network or None, noise for the largest batch, the batches, and what measures a call."""
    side, batches = (96, (2, 1)) if clock.tiny else (512, (32, 1, 8, 64))
    ceiling = read(clock.out).get("canary", {}).get("tflops_bf16")
    work = tflop_per_image(SMALL if clock.tiny else Owl2Config())
    measure = partial(speed, tflop=work, ceiling=ceiling if isinstance(ceiling, float) else 0.0)
    model = clock.prepare("model", partial(qalign_network, clock.tiny), most=60)
    return model, noise(max(batches), 3, side, side), batches, measure


def qalign(clock: Clock) -> None:
    model, images, batches, measure = qalign_setting(clock)
    if model is None:
        return
    made = partial(QAlignReward, model, scale="mos")
    for batch in batches:
        reward, x = made(batch_size=batch), images[:batch]
        clock.step(f"eager b{batch}", partial(measure, partial(reward, x), batch), need=4)
    x = images[: batches[0]]
    reward = made(batch_size=len(x))
    exact = clock.prepare("exact scores", partial(reward, x))
    if exact is None:
        return
    clock.step("finite", lambda: {"finite": bool(exact.isfinite().all()), "spread": float(exact.std())})
    clock.step("waits", lambda: waits(partial(reward, x)))
    if CUDA:
        graph = made(batch_size=len(x), compiled="graph")
        for batch in batches[:3]:
            work = partial(first_and_warm, graph, x[:batch], exact[:batch], measure)
            clock.step(f"graph b{batch}", work, need=5)
        del graph, work
        release()
    mixed, shown = [x[i][:, : x.shape[-1] - 8 * (i % 4)] for i in range(len(x))], photographs(images[:4])
    both = made(task=("quality", "aesthetics"), batch_size=len(x))
    clock.step("mixed sizes", partial(measure, lambda: reward(mixed), len(x)), need=3)
    clock.step("both tasks", partial(measure, lambda: both(x), len(x)), need=3)
    clock.step("reference protocol", partial(measure, lambda: reference_scores(model, shown), len(shown)), need=6)
    clock.step("host images", partial(measure, partial(reward, x.cpu()), len(x)), need=2)
    clock.step("from 32 threads", partial(from_threads, reward, x), need=3)
    clock.step("kernels", partial(kernels, partial(reward, x)), need=6, most=60)
    clock.step("kernels b1", partial(kernels, partial(reward, x[:1]), 6), need=4, most=60)
    clock.step("offload and onload", partial(moved, reward, x, exact), need=12, most=60)
    clock.step("int8", partial(in_int8, model, reward, x, exact, measure), need=6)


def compiled(clock: Clock) -> None:
    """The stage of `compiled=True`, last because a compilation may hang."""
    # what a CPU's compiler makes of the layers takes a minute, and says nothing of a GPU's
    backend = partial(torch.compile, backend="eager") if clock.tiny else torch.compile
    model, images, batches, measure = qalign_setting(clock)
    if model is None:
        return
    exact = clock.prepare("exact scores", lambda: QAlignReward(model, scale="mos")(images[: batches[0]]))
    reward = QAlignReward(model, scale="mos", batch_size=batches[0], compiled=True)
    for batch in () if exact is None else batches[:1] if clock.tiny else batches[:2]:
        work, key = partial(first_and_warm, reward, images[:batch], exact[:batch], measure), f"compiled b{batch}"
        with patched(torch, "compile", backend):
            clock.step(key, work, need=15, most=max(clock.left(), 30), predicted=PREDICTED.get(key))


def first_and_warm(reward: QAlignReward, x: Tensor, exact: Tensor, measure: Measure) -> Row:
    """The first call of a batch size, which captures or compiles, and warm ones."""
    before, began = gib_allocated(), time.monotonic()
    found = reward(x)
    sync()
    row: Row = {"first_call_s": round(time.monotonic() - began, 2), "drift": gap(found, exact)}
    row |= {**measure(partial(reward, x), len(x)), "waits": waits(partial(reward, x))}
    return row | ({"kept_gib": round(gib_allocated() - before, 2)} if CUDA else {})


def from_threads(reward: QAlignReward, x: Tensor) -> Row:
    """As many trainers call: one image from each thread, merged by `MicroBatched`."""
    with MicroBatched(reward, max_batch=len(x)) as merged, ThreadPoolExecutor(len(x)) as pool:
        list(pool.map(merged, x.split(1)))
        spent = seconds(lambda: list(pool.map(merged, 3 * x.split(1))))
    return {"images_per_s": round(3 * len(x) / spent, 1)}


def moved(reward: QAlignReward, x: Tensor, exact: Tensor) -> Row:
    """Twice: the first time makes the copy on the host that later ones use."""
    times = [round(seconds(move), 2) for move in 2 * (reward.offload, reward.onload)]
    row = dict(zip(("first_offload_s", "first_onload_s", "offload_s", "onload_s"), times, strict=True))
    return row | {"same_after": equal(reward(x), exact)}


def in_int8(model: Owl2, reward: QAlignReward, x: Tensor, exact: Tensor, measure: Measure) -> Row:
    """The decoder in int8, for good: nothing of this model is used after it."""
    before = gib_allocated()
    quantize_decoder(model)
    release()
    one, found = QAlignReward(model, scale="mos", batch_size=1), measure(partial(reward, x), len(x))
    sizes = [before, gib_allocated()]
    return {**found, "drift": gap(reward(x), exact), "gib": sizes, "b1_wall_ms": wall_ms(partial(one, x[:1]))}


def photographs(x: Tensor) -> list[Image.Image]:
    return [Image.fromarray((row.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)) for row in x]


def vlm(clock: Clock) -> None:
    """Qwen2.5-VL-7B against generation, and Qwen3-VL-2B."""
    from iqareward.rewards.vlm.presets import VISUALQUALITY_R1 as PRESET

    side, batches = (56, (2, 1)) if clock.tiny else (512, (8, 1, 32))
    images = noise(max(batches), 3, side, side)
    pair = clock.prepare("qwen2.5-vl-7b", partial(seven_billion, clock.tiny), most=60)
    if pair is not None:
        rewarded(clock, "7b level", partial(LevelReward, pair), images, batches)
        rewarded(clock, "7b rating", partial(RatingReward, pair, PRESET), images, batches)
        answers = {"published, 11 tokens": (PRESET.question, 11), "published, 11 tokens, warm": (PRESET.question, 11),
                   "published, 150 tokens": (PRESET.thinking_question, 20 if clock.tiny else 150)}  # fmt: skip
        for key, (question, tokens) in answers.items():
            written = partial(published, pair, images[: batches[0]], question, tokens)
            clock.step(key, written, need=4 if tokens == 11 else 12, most=60)
        del written
    del pair
    release()
    pair = clock.prepare("qwen3-vl-2b", partial(two_billion, clock.tiny), most=60)
    if pair is not None:
        rewarded(clock, "qwen3-vl-2b level", partial(LevelReward, pair), images, batches[:2])


def rewarded(clock: Clock, name: str, make: Callable[..., Any], images: Tensor, batches: tuple[int, ...]) -> None:
    """The speed of a reward at each batch size, and the waits and kernels of the first."""
    for batch in batches:
        key, call = f"{name} b{batch}", partial(make(batch_size=batch), images[:batch])
        clock.step(key, partial(speed, call, batch), need=4, predicted=PREDICTED.get(key))
    call = partial(make(batch_size=batches[0]), images[: batches[0]])
    clock.step(f"{name} waits", partial(waits, call))
    clock.step(f"{name} kernels", partial(kernels, call, 6), need=5, most=60)


def published(pair: Any, x: Tensor, question: str, tokens: int) -> Row:
    from benchmarks.bench_vlm import published_texts

    spent = seconds(lambda: published_texts(*pair, photographs(x), question, tokens))
    return {"seconds": round(spent, 2), "images": len(x)}


def seven_billion(tiny: bool) -> Any:
    """A Qwen2.5-VL of the 7B's sizes."""
    from benchmarks.bench_vlm import qwen_config, random_pair

    config = qwen_config(share=4, layers=2, depth=4, vocabulary=4864) if tiny else qwen_config()
    return as_loaded(random_pair(config, DEVICE, HALF))


def two_billion(tiny: bool) -> Any:
    """A Qwen3-VL of the 2B's sizes, and the processor of the tests."""
    import transformers

    from tests.vlm import tiny as small

    processor = small.processor("qwen3_vl")
    made = small.config("qwen3_vl", processor.tokenizer)
    if not tiny:
        text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
                "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}  # fmt: skip
        tower = {"hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16, "out_hidden_size": 2048,
                 "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]}  # fmt: skip
        made.text_config.update(text)
        made.text_config.rope_parameters.update({"mrope_section": [24, 20, 20], "rope_theta": 5e6})
        made.vision_config.update(tower)
        # as the real one: 512 stays 512
        processor.image_processor.size = {"shortest_edge": 65536, "longest_edge": 16777216}
    torch.manual_seed(0)
    with DEVICE:
        model = transformers.AutoModelForImageTextToText.from_config(made, dtype=HALF)
    return as_loaded((model.requires_grad_(False).eval(), processor))


def as_loaded(pair: Any) -> Any:
    """With the norms that a checkpoint gets when it is loaded; a model that is passed is left as it is."""
    fuse_norms(pair[0])
    return pair
