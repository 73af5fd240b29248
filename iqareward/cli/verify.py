"""The command `iqareward verify`: run rewards with their published weights, and compare with published scores."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from iqareward.images import to_images
from iqareward.rewards.catalog import CATALOG, load, published
from iqareward.types import Images

_GITHUB = "https://raw.githubusercontent.com"
_FLYER = f"{_GITHUB}/zhiyuanyou/DeQA-Score/main/fig/singapore_flyer.jpg"
_STLPIPS = f"{_GITHUB}/abhijay9/ShiftTolerant-LPIPS/main/imgs"
_HPSV2 = f"{_GITHUB}/tgxs002/HPSv2/master/hpsv2/assets/demo_image.jpg"
_EXAMPLE = (f"{_STLPIPS}/ex_p0.png", f"{_STLPIPS}/ex_ref.png")
# The first digits of their SHA-256, as many as are known.
SHA256 = {
    _FLYER: "09f86ecd",
    f"{_STLPIPS}/ex_p0.png": "f44901a99c82755cfe78cdbde66579ae06cd0ebbba4a2539aa35ef96bbe703db",
    f"{_STLPIPS}/ex_ref.png": "57aff3a0aeb6ebea151411f35b4487ea130aedcac6addd91c8c015969f9df097",
}


class Golden(NamedTuple):
    """What is known of a reward's scores with its published weights.

    Attributes:
        image: Address of the scored picture.
        reference: Address of its reference; "" = the reward needs none.
        prompt: Its prompt; "" = the reward needs none.
        figure: The published score, on the scale and in the direction in which it was printed; None = none was found.
        tolerance: How far ours may be from it.
        source: Where it was printed.
        run: Our figure with the published weights, where and when; "" = they have not been run.
        parity: What was compared on seeded weights instead, and the tolerance; "" = nothing.
    """

    image: str = _FLYER
    reference: str = ""
    prompt: str = ""
    figure: float | None = None
    tolerance: float = 0.0
    source: str = ""
    run: str = ""
    parity: str = ""


_OWL2 = "the authors' code on transformers 4.36.1, 2e-5 of a level"
_VLM = "transformers' forward pass of the same network, 1e-4"
_CLIP = "transformers' CLIPModel on Pillow's pixels, 1e-4"
_STLPIPS_SOURCE = "lpips_2imgs.py of ST-LPIPS"
# A row for every reward of the catalogue with weights that were compared with something; others are "unverified".
GOLDENS: dict[str, Golden] = {
    "qalign": Golden(figure=1.911, tolerance=0.02, source="model card of q-future/one-align", parity=_OWL2),
    "deqa": Golden(parity=_OWL2),
    "qrealign": Golden(parity=_VLM),
    "qrealign_lite": Golden(parity=_VLM),
    "qrealign_pro": Golden(parity=_VLM),
    "visualquality_r1": Golden(parity=_VLM),
    "qinsight": Golden(parity=_VLM),
    "hpsv3": Golden(  # of the README's example, whose scores it does not print
        f"{_GITHUB}/MizzenAI/HPSv3/main/assets/example1.png",
        prompt="cute chibi anime cartoon fox, smiling wagging tail with a small cartoon heart above sticker",
        parity="transformers' Qwen2-VL and the published head, 1e-4",
    ),
    "clipscore": Golden(prompt="a Ferris wheel", parity=_CLIP),
    "pickscore": Golden(prompt="a Ferris wheel", parity=_CLIP),
    # a maintainer printed 0.2876 for this picture in issue 27, by version 2.0 it seems
    "hpsv2": Golden(_HPSV2, prompt="A cat with two horns on its head", parity="open_clip 3.3.0, 1e-4"),
    "laion_aesthetic": Golden(parity="the published layers on transformers' CLIPModel, 1e-4"),
    "clipiqa": Golden(parity=_CLIP),
    "rali": Golden(parity="the authors' formula on transformers' CLIPModel, 1e-4"),
    "lpips": Golden(*_EXAMPLE, figure=0.722, tolerance=5e-4, source=_STLPIPS_SOURCE, parity="lpips 0.1.4, 1e-5"),
    "lpips_vgg": Golden(*_EXAMPLE, parity="lpips 0.1.4, 1e-5"),
    "stlpips": Golden(
        *_EXAMPLE,
        figure=0.7777555,
        tolerance=1e-6,
        source="page of stlpips_pytorch 0.0.2",
        run="0.7777556 on a CPU, 2026-11-27",
    ),
    "stlpips_vgg": Golden(
        *_EXAMPLE, figure=0.652, tolerance=5e-4, source=_STLPIPS_SOURCE, run="0.6516970 on a CPU, 2026-11-27"
    ),
    "cvvdp": Golden(
        *_EXAMPLE,
        figure=6.5271,
        tolerance=1e-3,
        source="cvvdp 0.5.7 on the same pictures",
        run="5.401, 8.734 and 8.320 JOD on three other pairs, as cvvdp 0.5.7 has them, on a CPU, 2026-11-27",
    ),
    "quick": Golden(run="our own network, measured on Kodak pictures (experiments/quick-judge)"),
    "dists": Golden(*_EXAMPLE, parity="DISTS-pytorch 0.1, 1e-5"),
}


class Verdict(NamedTuple):
    """A reward that was run with its published weights.

    Attributes:
        reward: Its name, with options.
        score: Our figure, on the scale of `published`.
        published: The published figure; None = none was found.
        tolerance: How far ours may be from it.
        verdict: "agrees", "differs", or "no published figure".
        image: Address of the picture.
        source: Where the figure was printed.
    """

    reward: str
    score: float
    published: float | None
    tolerance: float
    verdict: str
    image: str
    source: str


def run(spec: str, device: str) -> Verdict:
    """Score the published picture with the published weights, which are downloaded if need be.

    Args:
        spec: A name of the catalogue with weights, which may have options.
        device: Where to run.

    Raises:
        ValueError: an unknown name, a reward without weights, or a picture other than the published one.
        ImportError: the reward needs an extra that is not installed.
        OSError: weights or a picture cannot be downloaded.
    """
    golden, to_figure = GOLDENS.get(_name(spec), Golden()), published(spec)
    if to_figure is None:
        raise ValueError(
            f"verify expected a reward on a scale that papers print, as 'qalign' or 'hpsv3(scale=raw)', got {spec!r}."
        )
    reward = load(spec, device=device)
    image = _picture(golden.image)
    options: dict[str, Any] = {"prompts": [golden.prompt]} if golden.prompt else {}
    if golden.reference:
        options["references"] = _picture(golden.reference)
    figure = to_figure[0] * float(reward(image, **options)) + to_figure[1]
    if golden.figure is None:
        verdict = "no published figure"
    else:  # a score of NaN differs
        verdict = "agrees" if abs(figure - golden.figure) <= golden.tolerance else "differs"
    return Verdict(spec, figure, golden.figure, golden.tolerance, verdict, golden.image, golden.source)


def lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """A header and a line per reward, in columns."""
    rows: list[tuple[str, ...]] = [("reward", "here", "published", "tolerance", "verdict", "source")]
    for found in verdicts:
        wanted = ("-", "-") if found.published is None else (str(found.published), f"{found.tolerance:g}")
        rows.append((found.reward, f"{found.score:.7g}", *wanted, found.verdict, found.source))
    yield from _columns(rows)


def known() -> Iterator[tuple[str, str, str, str]]:
    """Name, state, evidence and published figure of every reward with weights."""
    for name, entry in CATALOG.items():
        if not entry.weights:
            continue
        golden = GOLDENS.get(name, Golden())
        state = "published weights" if golden.run else "seeded weights" if golden.parity else "unverified"
        figure = "" if golden.figure is None else f"{golden.figure} ± {golden.tolerance:g}, {golden.source}"
        yield name, state, golden.run or golden.parity, figure


def known_lines() -> Iterator[str]:
    """A header and a line per reward with weights, in columns."""
    return _columns([("reward", "verified on", "evidence", "published figure"), *known()])


def page_table() -> str:
    """The same as a table in Markdown."""
    rows = [f"| `{name}` | {' | '.join(cells)} |" for name, *cells in known()]
    return "\n".join(["| reward | verified on | evidence | published figure |", "|---|---|---|---|", *rows])


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for texts in rows:
        yield "  ".join(f"{text:{width}}" for text, width in zip(texts, widths, strict=True)).rstrip()


def _name(spec: str) -> str:
    """The name in the catalogue before the options."""
    name = spec.partition("(")[0].strip()
    if name not in CATALOG or not CATALOG[name].weights:
        known = ", ".join(name for name, entry in CATALOG.items() if entry.weights)
        raise ValueError(f"verify expected the name of a reward with weights ({known}), got {name!r}.")
    return name


def _picture(address: str) -> Images:
    """A picture in a file of torch's cache, downloaded if need be; it has the published contents."""
    start, place = SHA256.get(address, ""), hashlib.sha256(address.encode()).hexdigest()[:12]
    file = Path(torch.hub.get_dir()) / "iqareward" / f"{place}-{address.rsplit('/', 1)[-1]}"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:  # to a file beside it, which is renamed when all of it is there
            torch.hub.download_url_to_file(address, str(file), hash_prefix=start or None, progress=False)
        except (OSError, RuntimeError) as error:  # the latter where the contents are not the published ones
            raise OSError(f"{address} could not be downloaded. Put it at {file}. The reason: {error}") from error
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if not found.startswith(start):
        raise ValueError(f"{file} expected the picture at {address}, of SHA-256 {start}..., got {found}. Delete it.")
    try:
        return to_images(file)
    except (OSError, ValueError):  # half a file, or the page of a proxy, where no hash is known
        file.unlink()
        raise
