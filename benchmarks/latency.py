"""Latency, throughput and memory of every reward that can be built here, beside what a user would call instead.

    python -m benchmarks.latency                    # half an hour on two cores
    python -m benchmarks.latency --rewards ssim lpips
    python -m benchmarks.latency --device cuda
    python -m benchmarks.latency --quick            # smoke run

Rewards are timed as a trainer calls them, with the whole contract around the formula; peers are bare functions. In each
setting all calls are taken in turns. Networks have seeded random weights: speed does not depend on them. `ratio` is our
images per second over those of the fastest peer. The last line of standard output is one JSON document.
`bench_classical` compares the bare formulas; `bench_qalign` and `bench_vlm` the multimodal models at any size.
"""

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks._harness import CPU, document, elapsed, finish
from benchmarks.bench_classical import PEERS, Peer, function, peak_of, photographs, rgb
from iqareward import load
from iqareward.rewards.catalog import CATALOG
from iqareward.rewards.perceptual import BACKBONES, DISTSReward, LPIPSReward

Score = Callable[[Tensor, Tensor], object]


class Subject(NamedTuple):
    """A reward and its peers, all called as `score(images, references)`; `make` is called once, in a quiet moment.

    Attributes:
        name: name of the reward.
        make: builds the call.
        peers: builders of the calls of other libraries that compute the same.
        batches: batch sizes to measure.
        sizes: sides of the square images.
    """

    name: str
    make: Callable[[], Score]
    peers: dict[str, Callable[[], Score]]
    batches: tuple[int, ...] = (1, 8, 32)
    sizes: tuple[int, ...] = (256, 512)


def subjects(folder: Path) -> list[Subject]:
    """All of them; seeded backbones are written to `folder`, because speed does not depend on weights."""
    native = [name for name, entry in CATALOG.items() if not entry.weights and not entry.extra]
    classical = [Subject(name, _reward(name), _same(PEERS.get(name, []))) for name in native]
    piq = [
        Subject(name, _reward(name), {"piq": _any(function(f"piq.{raw}", rgb, reduction="none"))}, batches=(1, 8))
        for name, raw in _PIQ.items()
    ]
    return [*classical, *piq, *_feature_distances(folder), *_clip(), *_multimodal()]


_PIQ = {
    "fsim": "fsim",
    "vsi": "vsi",
    "mdsi": "mdsi",
    "srsim": "srsim",
    "dss": "dss",
    "iwssim": "information_weighted_ssim",
}


def _reward(name: str) -> Callable[[], Score]:
    def make() -> Score:
        reward = load(name)
        return lambda images, references: reward(images, references=references)

    return make


def _same(peers: list[Peer]) -> dict[str, Callable[[], Score]]:
    return {peer.library: _any(peer.make) for peer in peers if peer.same}


def _any(make: Callable[[], Callable[..., Any]]) -> Callable[[], Score]:
    """A peer's call, whether it takes references or not."""

    def build() -> Score:
        metric = make()

        def score(images: Tensor, references: Tensor) -> object:
            try:
                return metric(images, references)
            except TypeError:
                return metric(images)

        return score

    return build


def seeded_backbone(net: str, folder: Path) -> Path:
    import torchvision

    file = folder / f"{net}.pth"
    if not file.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            weights = getattr(torchvision.models, BACKBONES[net].function)(weights=None).features.state_dict()
        torch.save({f"features.{name}": value for name, value in weights.items()}, file)
    return file


def _feature_distances(folder: Path) -> list[Subject]:
    def ours(reward: Any) -> Score:
        return lambda images, references: reward(images, references=references)

    def package(net: str) -> Score:
        import lpips

        with warnings.catch_warnings():  # lpips names torchvision's weights as in 2021
            warnings.simplefilter("ignore")
            network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
        return lambda images, references: network(images, references, normalize=True)

    found = []
    for net in ("alex", "vgg"):
        name = "lpips" if net == "alex" else f"lpips_{net}"
        weights = seeded_backbone(net, folder)
        make = lambda net=net, weights=weights: ours(LPIPSReward(net, weights=weights))  # noqa: E731
        found.append(Subject(name, make, {"lpips": lambda net=net: package(net)}, batches=(1, 8), sizes=(256,)))
    found += [Subject(name, _reward(name), {}, batches=(1, 8), sizes=(256,)) for name in ("stlpips", "stlpips_vgg")]
    found.append(Subject("cvvdp", _reward("cvvdp"), {"cvvdp": _cvvdp}, batches=(1, 8), sizes=(256,)))
    found.append(Subject("quick", _reward("quick"), {}, batches=(1, 8), sizes=(256,)))
    vgg = seeded_backbone("vgg", folder)
    # DISTS_pytorch downloads its backbone when it is built, so there is nothing to compare with offline.
    found.append(Subject("dists", lambda: ours(DISTSReward(weights=vgg)), {}, batches=(1, 8), sizes=(256,)))
    return found


def _cvvdp() -> Score:
    import pycvvdp

    metric = pycvvdp.cvvdp(device=torch.get_default_device(), quiet=True)
    return lambda images, references: metric.predict(images, references, dim_order="BCHW")[0]


def _clip() -> list[Subject]:
    """CLIP at its published sizes with random weights, but for ViT-H/14, which takes 4 GB."""
    from benchmarks.meter import CLIP, clip_reward

    def ours(name: str) -> Score:
        reward = clip_reward(name, str(torch.get_default_device()))
        return lambda images, references: reward(images, prompts=["a cat"] * len(images))

    def theirs() -> Score:
        import transformers

        model = clip_reward("clipscore", str(torch.get_default_device())).model
        processor = transformers.CLIPImageProcessor()
        text = torch.randint(2, 60, (1, 8))

        def score(images: Tensor, references: Tensor) -> object:
            pixels = processor(images, do_rescale=False, return_tensors="pt").pixel_values
            return model(input_ids=text.to(pixels.device), pixel_values=pixels).logits_per_image

        return score

    names = [name for name, sizes in CLIP.items() if sizes[1] < 1280]
    peers: dict[str, dict[str, Callable[[], Score]]] = {"clipscore": {"transformers": theirs}}
    return [Subject(name, partial(ours, name), peers.get(name, {}), batches=(1, 8), sizes=(512,)) for name in names]


def _multimodal() -> list[Subject]:
    """Q-Align at a quarter of its width and depth, beside the authors' protocol on the same network."""
    from benchmarks.bench_qalign import MEDIUM, random_model, reference_scores
    from iqareward import QAlignReward

    def ours() -> Score:
        reward = QAlignReward(random_model(MEDIUM, torch.get_default_device(), torch.float32))
        return lambda images, references: reward(images)

    def reference() -> Score:
        model = random_model(MEDIUM, torch.get_default_device(), torch.float32)

        def score(images: Tensor, references: Tensor) -> object:
            levels = (images.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
            return reference_scores(model, [Image.fromarray(picture) for picture in levels])

        return score

    return [Subject("qalign (1/4)", ours, {"authors' protocol": reference}, batches=(1, 8), sizes=(512,))]


PACKAGES = [
    "pyiqa",
    "piq",
    "lpips",
    "cvvdp",
    "torchmetrics",
    "kornia",
    "scikit-image",
    "pytorch-msssim",
    "piqa",
    "pillow",
]
MAX_SECONDS = 8.0  # a call that takes longer is timed once, and its library is left out of larger settings
OURS = "iqareward"


def build(subject: Subject, device: torch.device = CPU) -> tuple[dict[str, Score], dict[str, str]]:
    """Calls by library, and why the others are missing; networks are made on the device."""
    with device:
        calls, missing = {OURS: subject.make()}, {}
    for library, make in subject.peers.items():
        if library == "scikit-image" and device.type != "cpu":
            missing[library] = "it computes on the CPU only"
            continue
        try:
            with device:
                calls[library] = make()
        except (ImportError, OSError) as error:
            missing[library] = str(error).splitlines()[0][:120]
    return calls, missing


def seconds_of(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Seconds of every call, taken in turns after one to warm up; a slow call is timed once."""
    times: dict[str, list[float]] = {}
    slow = set()
    for turn in range(rounds + 1):
        for name, call in calls.items():
            if name in slow:
                continue
            taken = elapsed(call, device)
            if turn or taken > MAX_SECONDS:
                times.setdefault(name, []).append(taken)
            slow |= {name} if taken > MAX_SECONDS else set()
    return times


def measure(
    subject: Subject, settings: list[tuple[int, int]], rounds: int, device: torch.device = CPU
) -> list[dict[str, Any]]:
    """A row per size and batch."""
    calls, missing = build(subject, device)
    rows = []
    for size, batch in settings:
        pixels = photographs(batch, size, device)
        bound = {name: partial(call, *pixels) for name, call in calls.items()}
        with torch.no_grad():
            times = seconds_of(bound, rounds, device)
            peak = peak_of(bound[OURS], device)
        speed = {name: batch / statistics.median(values) for name, values in times.items()}
        peers = {name: value for name, value in speed.items() if name != OURS}
        fastest = max(peers, key=lambda name: peers[name], default=None)
        row = {"reward": subject.name, "size": size, "batch": batch, "images_per_second": speed[OURS]}
        row |= {"p50_ms": 1e3 * statistics.median(times[OURS]), "p95_ms": 1e3 * float(np.quantile(times[OURS], 0.95))}
        row |= {"peak_mb": peak, "peers": peers, "missing": missing, "fastest_peer": fastest}
        rows.append(row | {"ratio": None if fastest is None else speed[OURS] / peers[fastest]})
        calls = {name: call for name, call in calls.items() if name == OURS or times[name][0] <= MAX_SECONDS}
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One line per reward and setting."""
    table = Table(title="Rewards as a trainer calls them", title_justify="left")
    for column in ("reward", "size", "batch", "images/s", "p50 ms", "p95 ms", "MB", "fastest peer", "ratio"):
        table.add_column(column, justify="left" if column in ("reward", "fastest peer") else "right")
    for row in rows:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        numbers = (f"{row[name]:.1f}" for name in ("images_per_second", "p50_ms", "p95_ms", "peak_mb"))
        table.add_row(row["reward"], str(row["size"]), str(row["batch"]), *numbers, row["fastest_peer"] or "-", ratio)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="three rewards, 64 pixels, two rounds")
    parser.add_argument("--device", type=torch.device, default=CPU, help="what to measure")
    parser.add_argument("--json", type=Path, help="also write the document here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = options.rewards or (["ssim", "piqe", "fsim"] if options.quick else None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = [subject for subject in subjects(Path(folder)) if wanted is None or subject.name in wanted]
        for subject in track(chosen, "timing", console=Console(stderr=True), transient=True):
            settings = [(64, 2)] if options.quick else [(size, b) for size in subject.sizes for b in subject.batches]
            rows += measure(subject, settings, 2 if options.quick else options.rounds, options.device)
    show(rows, Console(width=120))
    # no targets: a reward does more than a bare function, and bench_classical compares functions with functions
    finish(document("latency", rows, [], PACKAGES, options.device), options.json)


if __name__ == "__main__":
    main()
