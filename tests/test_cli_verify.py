"""`iqareward verify` runs for real from the download on: tiny seeded weights in the place of published ones."""

import hashlib
import json
from http.client import IncompleteRead
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from iqareward import to_images
from iqareward.cli import app
from iqareward.cli.verify import GOLDENS, SHA256, known, page_table
from iqareward.rewards.catalog import CATALOG, load, published
from tests.owl2.owl2_tiny import TINY, seeded_model
from tests.owl2.test_loading import hub_config

STLPIPS = Path(__file__).resolve().parents[2] / "shared" / "data" / "weights" / "stlpips"
FLYER = GOLDENS["qalign"].image
DISTORTED, REFERENCE = GOLDENS["stlpips"].image, GOLDENS["stlpips"].reference


class Site:
    """Serves files in the place of the network, and counts what is asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, list[str]()

    def download(self, url: str, dst: str, hash_prefix: str | None = None, progress: bool = True) -> None:
        """As torch.hub has it: the file is there when all of it has come and is right."""
        self.asked.append(url)
        if url not in self.files:
            raise URLError("no route to host")
        if not hashlib.sha256(self.files[url]).hexdigest().startswith(hash_prefix or ""):
            raise RuntimeError("invalid hash value")
        Path(dst).write_bytes(self.files[url])


def noise(seed: int, tmp_path: Path) -> bytes:
    """A PNG of 64 x 64 pixels."""
    pixels = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / f"{seed}.png")
    return (tmp_path / f"{seed}.png").read_bytes()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Pictures of noise at the addresses of published ones, and an empty cache."""
    found = Site({FLYER: noise(0, tmp_path), DISTORTED: noise(1, tmp_path), REFERENCE: noise(2, tmp_path)})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.download_url_to_file", found.download)
    for address, content in found.files.items():
        monkeypatch.setitem(SHA256, address, hashlib.sha256(content).hexdigest())
    return found


def verify(*arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, the JSON lines, and the messages without line breaks."""
    result = CliRunner(env={"COLUMNS": "500"}).invoke(app, ["verify", *arguments, "--json"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()], result.stderr


@pytest.fixture
def one_align(tmp_path: Path) -> Path:
    """A tiny seeded checkpoint in the layout of q-future/one-align."""
    folder = tmp_path / "one-align"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hub_config(TINY)))
    save_file(seeded_model(TINY).state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_judge_is_compared_with_its_published_figure(
    site: Site, one_align: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Download, preprocessing, weights, scale and verdict of Q-Align; the second run needs no network."""
    spec = f"qalign(weights={one_align})"
    code, (found,), _ = verify(spec)
    expected = float(load(spec, device="cpu")(to_images(Image.open(tmp_path / "0.png"))))
    scale, offset = published("qalign") or (0.0, 0.0)
    assert found["score"] == pytest.approx(scale * expected + offset, abs=1e-6)
    assert (code, found["verdict"], found["published"]) == (1, "differs", 1.911)
    assert (found["reward"], found["image"], site.asked) == (spec, FLYER, [FLYER])

    site.files.clear()
    right = GOLDENS["qalign"]._replace(figure=found["score"], tolerance=1e-6)
    monkeypatch.setitem(GOLDENS, "qalign", right)
    code, (again,), _ = verify(spec)
    assert (code, again["verdict"], site.asked) == (0, "agrees", [FLYER])


def test_a_preset_without_a_published_figure(site: Site, tmp_path: Path) -> None:
    """Q-ReAlign answers on the picture; without a published figure there is no verdict, and no failure."""
    tiny = pytest.importorskip("tests.vlm.tiny")
    model, processor = tiny.pair("qwen3_5")
    model.save_pretrained(tmp_path / "mini")
    processor.save_pretrained(tmp_path / "mini")
    code, (found,), _ = verify(f"qrealign(weights={tmp_path / 'mini'})")
    assert (code, found["verdict"], found["published"]) == (0, "no published figure", None)
    assert 0 <= found["score"] <= 1


def test_a_reward_with_a_prompt(site: Site, tmp_path: Path) -> None:
    """HPSv3 is asked about the example of its README on its published scale; on its own scale nothing is printed."""
    tiny = pytest.importorskip("tests.vlm.tiny")
    files = tiny.hpsv3_files(tmp_path)
    picture = GOLDENS["hpsv3"].image
    site.files[picture] = site.files[FLYER]
    options = f"weights={files.weights}, base={files.base}"
    code, (found,), _ = verify(f"hpsv3(scale=raw, {options})")
    assert (code, found["verdict"], site.asked) == (0, "no published figure", [picture])
    assert abs(found["score"]) > 1e-3
    code, _, error = verify(f"hpsv3({options})")
    assert code == 2
    assert "hpsv3(scale=raw)" in error


def test_distances_have_their_published_sign(site: Site) -> None:
    """A full-reference reward gets both pictures, and shows a distance as papers print it."""
    pytest.importorskip("stlpips_pytorch")
    code, (found,), _ = verify("stlpips")
    assert (code, found["verdict"]) == (1, "differs")  # the pictures are noise
    assert found["score"] > 0
    assert site.asked == [DISTORTED, REFERENCE]


@pytest.mark.skipif(not STLPIPS.is_dir(), reason="the authors' pictures are not in the repository (no ../shared/data)")
def test_published_figures_are_reproduced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ST-LPIPS and cvvdp agree with their figures on the published pictures, which have their hashes."""
    pytest.importorskip("stlpips_pytorch")
    site = Site({address: (STLPIPS / address.rsplit("/", 1)[-1]).read_bytes() for address in (DISTORTED, REFERENCE)})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", site.download)
    result = CliRunner().invoke(app, ["verify", "stlpips", "stlpips_vgg", "cvvdp"])
    assert result.exit_code == 0
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:3]] == [
        ["stlpips", "0.7777556"],
        ["stlpips_vgg", "0.651697"],
    ]
    assert result.stdout.count("agrees") == 3


def test_failures_are_named(site: Site, one_align: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that does not come, a wrong one, weights that are not there: exit code 2; the others are still run."""
    wrong = site.files.pop(DISTORTED)
    code, found, messages = verify("dists", f"qalign(weights={one_align})", "ssim")
    assert (code, [row["published"] for row in found]) == (2, [1.911])
    assert "dists: " in messages
    assert DISTORTED in messages
    assert "no route to host" in messages
    assert "reward with weights (qalign, deqa" in messages

    site.files[DISTORTED] = wrong + b"changed on the way"
    code, found, messages = verify("dists")
    assert (code, found) == (2, [])
    assert "invalid hash value" in messages
    site.files[DISTORTED] = wrong

    monkeypatch.setattr("huggingface_hub.snapshot_download", _offline)
    code, found, messages = verify("deqa")
    assert (code, found) == (2, [])
    assert "zhiyuanyou/DeQA-Score-Mix3" in messages


def _offline(*arguments: object, **options: object) -> None:
    raise OSError("no network")


def test_a_picture_that_was_changed_in_the_cache(site: Site, one_align: Path, tmp_path: Path) -> None:
    """The contents of the cache are checked too."""
    spec = f"qalign(weights={one_align})"
    assert verify(spec)[0] == 1
    (file,) = (tmp_path / "torch").rglob("*singapore_flyer.jpg")
    file.write_bytes(noise(7, tmp_path))
    code, found, messages = verify(spec)
    assert (code, found) == (2, [])
    assert f"{file} expected the picture at {FLYER}" in messages


def test_what_is_known_is_listed() -> None:
    """Without names every reward with weights has a line, and nothing is downloaded or loaded."""
    code, rows, _ = verify()
    assert code == 0
    assert [row["reward"] for row in rows] == [name for name, entry in CATALOG.items() if entry.weights]
    states = {row["reward"]: row["state"] for row in rows}
    assert (states["stlpips"], states["qalign"]) == ("published weights", "seeded weights")
    table = CliRunner().invoke(app, ["verify"]).stdout
    assert [line.split()[0] for line in table.splitlines()[1:]] == [row["reward"] for row in rows]
    assert set(GOLDENS) <= {name for name, *_ in known()}


def test_the_page_is_up_to_date() -> None:
    """The page of verified weights shows the table of this code: `python -m benchmarks.verified` writes it."""
    page = Path(__file__).resolve().parents[1] / "docs/reference/verified-weights.md"
    assert page_table() in page.read_text(encoding="utf-8")


def test_prompts_reach_the_reward(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that rates agreement with a prompt gets the prompt of its published figure."""
    from iqareward.rewards import ImageReward

    class Words(ImageReward):
        name = "words"
        needs_references = False
        needs_prompts = True
        bounds = (0.0, None)

        def __init__(self, device: str | None = None) -> None:
            self.device_asked = device

        def score_batch(self, images: Tensor, prompts: list[str]) -> Tensor:
            return torch.tensor([float(len(prompt)) for prompt in prompts])

    entry = CATALOG["qalign"]._replace(build=Words, published_range=(0.0, 1.0), differentiable=False)
    monkeypatch.setitem(CATALOG, "words", entry)
    monkeypatch.setitem(GOLDENS, "words", GOLDENS["qalign"]._replace(prompt="a wheel", figure=7.0))
    code, (found,), _ = verify("words")
    assert (code, found["verdict"], found["score"]) == (0, "agrees", 7.0)


def test_a_broken_download_is_not_kept(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half a picture whose hash is not known, and any error of the connection, end with 2; nothing stays behind."""
    picture = GOLDENS["hpsv2"].image
    site.files[picture] = site.files[FLYER][:-2000]
    code, found, messages = verify("hpsv2")
    assert (code, found) == (2, [])
    assert "demo_image.jpg" in messages
    assert not list((tmp_path / "torch").rglob("*demo_image.jpg"))

    def interrupted(*arguments: object, **options: object) -> None:
        raise IncompleteRead(b"", 10)

    monkeypatch.setattr("torch.hub.download_url_to_file", interrupted)
    code, found, messages = verify("hpsv2")
    assert (code, found) == (2, [])
    assert "IncompleteRead" in messages
