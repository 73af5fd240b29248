"""`iqareward compare`: pairs, differences, intervals, tables, and a page that a browser shows."""

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
from PIL import Image, ImageFilter
from rich.console import Console
from typer.testing import CliRunner

from iqareward.cli import app
from iqareward.cli.compare import compare, difference
from iqareward.cli.compare_page import choose, render
from iqareward.cli.scoring import Scorer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Truth, a blurred and a noisy version of five pictures; the noisy ones have another suffix."""
    rng = np.random.default_rng(0)
    for name in ("truth", "blurred", "noisy"):
        (tmp_path / name / "deep").mkdir(parents=True)
    for index in range(5):
        path = f"deep/{index}" if index else "0"
        picture = np.kron(rng.integers(40, 215, (6, 6, 3)), np.ones((8, 8, 1)))
        clean = Image.fromarray(picture.astype(np.uint8))
        clean.save(tmp_path / "truth" / f"{path}.png")
        clean.filter(ImageFilter.GaussianBlur(3)).save(tmp_path / "blurred" / f"{path}.png")
        noisy = np.clip(picture + rng.normal(0, 1 + index, picture.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / "noisy" / f"{path}.webp", lossless=True)
    return tmp_path


def run(folder: Path, *options: str, methods: tuple[str, ...] = ("noisy",), code: int = 0) -> str:
    """Standard output of a comparison with `blurred`, or standard error if it cannot start."""
    folders = [str(folder / name) for name in ("blurred", *methods)]
    result = CliRunner().invoke(app, ["compare", *folders, *options, "--output", str(folder / "page.html")])
    assert result.exit_code == code, result.output
    return result.stdout if code != 2 else result.stderr


class Page(HTMLParser):
    """What a browser makes of a page: its elements with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def crops(self) -> list[np.ndarray]:
        """The pixels of the `<img>` elements."""
        sources = [str(attributes["src"]).partition("base64,")[2] for attributes in self.all("img")]
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB")) for source in sources]


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_pairs_by_path_and_tells_the_better_folder(folders: Path) -> None:
    """Five pairs across suffixes; a little noise beats much blur by PSNR, with an interval above zero."""
    options = ("--reward", "psnr", "--reward", "ssim", "--reference", str(folders / "truth"))
    found = json.loads(run(folders, *options, "--format", "json"))
    psnr = found["differences"][0]
    assert (found["images"], psnr["images"], psnr["unscored"], found["left_out"]) == (5, 5, 0, [])
    assert psnr["verdict"] == "better"
    assert psnr["wins"] == 1.0
    assert 0 < psnr["low"] < psnr["difference"] < psnr["high"]
    assert psnr["difference"] == pytest.approx(psnr["mean"] - psnr["baseline"])
    assert "noisy" in run(folders, *options)


def test_several_folders_share_one_baseline_and_one_set_of_images(folders: Path) -> None:
    """Every folder is compared with the first, over the images that all of them hold."""
    (folders / "truth" / "deep" / "4.png").unlink()
    options = ("--reward", "psnr", "--reference", str(folders / "truth"), "--format", "json")
    noisy, truth = json.loads(run(folders, *options, methods=("noisy", "truth"), code=1))["differences"]
    assert [Path(row["folder"]).name for row in (noisy, truth)] == ["noisy", "truth"]
    assert noisy["images"] == truth["images"] == 4
    assert noisy["baseline"] == truth["baseline"]
    assert truth["mean"] == 100.0


def test_left_out_images_are_counted_with_their_reasons(folders: Path) -> None:
    """Unpaired, damaged and unscored images are named in every output, and the exit code is 1."""
    (folders / "noisy" / "0.webp").unlink()
    (folders / "noisy" / "deep" / "1.webp").write_bytes(b"no image")
    for folder in ("blurred", "noisy"):
        save(folders / folder / "small.png", np.zeros((3, 3, 3), np.uint8))
    table = folders / "scores.csv"
    options = ("--reward", "piqe", "--per-image", str(table))
    found = json.loads(run(folders, *options, "--format", "json", code=1))
    assert (found["images"], found["differences"][0]["images"], found["differences"][0]["unscored"]) == (5, 3, 2)
    reasons = {Path(row["file"]).relative_to(folders).as_posix(): row["reason"] for row in found["left_out"]}
    assert set(reasons) == {"blurred/0.png", "noisy/deep/1.webp", "blurred/small.png", "noisy/small.png"}
    assert reasons["blurred/0.png"] == "not in noisy"
    assert "16 pixels" in reasons["noisy/small.png"]
    assert "3 of 5" in run(folders, *options, "--format", "markdown", code=1)
    page = Page((folders / "page.html").read_text())
    assert "3 of 5" in page.text
    assert all(reason in page.text for reason in reasons.values())
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    assert len(rows) == 5 * 2 + 1
    by_file = {Path(row["file"]).relative_to(folders).as_posix(): row for row in rows}
    assert {name: row["problem"] for name, row in by_file.items() if row["problem"]} == reasons
    assert by_file["noisy/small.png"]["piqe"] == ""
    assert float(by_file["noisy/deep/2.webp"]["piqe"]) < 0


def test_what_cannot_be_compared_is_an_error(folders: Path) -> None:
    """One folder, missing references, one reward twice, and folders without a common image."""
    assert "two folders" in run(folders, "--reward", "piqe", methods=(), code=2)
    assert "--reference" in run(folders, "--reward", "ssim", code=2)
    assert "piqe is given twice" in run(folders, "--reward", "piqe", "--reward", " piqe", code=2)
    for file in (folders / "noisy" / "deep").iterdir():
        file.rename(file.with_stem(f"other{file.stem}"))
    (folders / "noisy" / "0.webp").unlink()
    assert "no image in common" in run(folders, "--reward", "piqe", code=2)


def test_repeated_stems_pair_only_where_that_is_clear(folders: Path) -> None:
    """Equal names pair; `0.png` and `0.jpg` against a single `0.webp` is an error that names all three."""
    shutil.copy(folders / "blurred" / "0.png", folders / "blurred" / "deep" / "0.png")
    shutil.copy(folders / "noisy" / "0.webp", folders / "noisy" / "deep" / "0.webp")
    found = json.loads(run(folders, "--reward", "piqe", "--format", "json"))
    assert (found["images"], found["left_out"]) == (6, [])
    Image.open(folders / "blurred" / "0.png").save(folders / "blurred" / "0.jpg")
    error = run(folders, "--reward", "piqe", code=2)
    assert all(name in error for name in ("0.png", "0.jpg", "0.webp"))
    shutil.copy(folders / "blurred" / "0.jpg", folders / "noisy" / "0.jpg")
    (folders / "noisy" / "0.webp").unlink()
    shutil.copy(folders / "blurred" / "0.png", folders / "noisy" / "0.png")
    found = json.loads(run(folders, "--reward", "piqe", "--format", "json"))
    assert (found["images"], found["left_out"]) == (7, [])


HOSTILE = (
    *('"><img src=x onerror=alert(1)>', "<script>alert(1)", "</title><b>", "[bold]", "[/red]", "$day", "{x}", "a&lt;b"),
    *(
        "a#b?c%20d",
        "two\nlines",
        "=1+1",
        "-x",
        "a|b",
        "\\input{x}",
        "x_y^z~",
        "latin\udce9\u00e0",
        "javascript:alert(1)",
        "turned\u202egnp",
        "a;=1+1",
    ),
)


def test_names_cannot_inject_anything(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of files and folders are text on the page and in tables, and the links of the page lead to the files."""
    method = "[b]<i>$&"
    for name in HOSTILE:
        for folder, source in (("blurred", "truth"), (method, "blurred")):
            file = folders / "x" / folder / f"{name}.png"
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folders / source / "0.png", file)
            except OSError:
                pytest.skip("this file system does not take such names")
    monkeypatch.chdir(folders / "x")
    options = ["--reward", "piqe", "--pairs", "40", "--per-image", "scores.csv", "--output", "page.html"]
    outputs: dict[str, str] = {}
    for form in ("table", "markdown", "latex", "json"):
        result = CliRunner().invoke(app, ["compare", "blurred", method, *options, "--format", form])
        assert result.exit_code == 0, result.output
        outputs[form] = result.stdout
    assert "[b]<" in outputs["table"]
    assert r"\[b\]\<i\>\$\&" in outputs["markdown"]
    assert r"{[}b]\textless{}i\textgreater{}\$\&" in outputs["latex"]

    text = Path("page.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert len(page.all("article")) == len(HOSTILE)
    assert len(page.all("script")) == len(page.all("title")) == 1
    assert tags.isdisjoint({"i", "iframe", "object", "base", "form"})
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert str(attributes.get("src", "data:")).startswith("data:")
    assert "two\\nlines.png" in page.text
    assert "latin\\udce9\u00e0.png" in page.text
    assert "\u202e" not in text
    links = {Path(os.fsdecode(unquote_to_bytes(str(link["href"])))) for link in page.all("a")}
    assert links == {Path(folder, f"{name}.png") for name in HOSTILE for folder in ("blurred", method)}
    table = Path("scores.csv").read_text(encoding="utf-8")
    rows = list(csv.reader(io.StringIO(table)))
    assert len(rows) == 1 + 2 * len(HOSTILE)
    assert not set(re.sub('"[^"]*"', "", table)) & set(";\t")  # quoted is what other programs take for separators
    assert not [cell for row in rows for cell in row[:3] if cell[0] in "=+-@" or "\n" in cell]


def test_table_fits_80_columns(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of 80 columns no word of the table is broken."""
    monkeypatch.setenv("COLUMNS", "80")
    options = ("--reward", "psnr", "--reward", "ssim", "--reference", str(folders / "truth"))
    lines = run(folders, *options, methods=("noisy", "truth")).splitlines()
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert {"reward", "psnr", "ssim", "blurred", "noisy", "truth", "baseline", "verdict", "better"} <= set(words)


def test_narrow_terminals_lose_no_figure(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 30 columns the table has the figures that it has on 120, and the names."""
    words: list[set[str]] = []
    for columns in ("30", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        words.append(set(run(folders, "--reward", "piqe").split()) - {"\u2500" * width for width in range(200)})
    assert words[0] == words[1]
    assert {"piqe", "blurred", "noisy", "verdict"} <= words[0]


def test_results_that_cannot_be_written_are_an_error_at_once(folders: Path) -> None:
    """A folder, a file in a file, and one file for two kinds of results are refused before anything is scored."""
    (folders / "file").touch()
    refused = {str(folders): "is a folder", str(folders / "file" / "x.csv"): "file", str(folders / "page.html"): "two"}
    for path, reason in refused.items():
        assert reason in run(folders, "--reward", "piqe", "--per-image", path, code=2)
    assert not (folders / "page.html").exists()


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """Pairs of 700x900 pixels: one differs by 20 steps in a patch at (300, 500), one is equal, one differs in size."""
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(40, 200, (70, 90, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    other = image.copy()
    other[300:400, 500:600] += 20
    for name, method in {"patch": other, "equal": image, "size": image[:350, :450]}.items():
        save(tmp_path / "old" / f"{name}.png", image)
        save(tmp_path / "new" / f"{name}.png", method)
    return tmp_path


def compared(folder: Path, **options: int) -> str:
    found = compare([folder / "old", folder / "new"], Scorer(["piqe"], None, "cpu", 8), Console(quiet=True))
    return render(found, folder=folder, num_pairs=9, **options)


def article(page: str, name: str) -> str:
    return next(part for part in page.split("<article>") if f"<h3>{name}</h3>" in part)


def test_crops_are_the_pixels_where_two_images_differ_most(changed: Path) -> None:
    """The crops equal the files' pixels in a window of 256x256 that holds the changed patch."""
    part = Page(article(compared(changed), "patch.png"))
    old, new, difference_map = part.crops()
    left, top = (int(re.search(f"{axis} (\\d+) to", part.text)[1]) for axis in ("Columns", "rows"))
    assert top <= 300 <= 400 <= top + 256
    assert left <= 500 <= 600 <= left + 256
    for crop, folder in ((old, "old"), (new, "new")):
        image = np.asarray(Image.open(changed / folder / "patch.png"))
        np.testing.assert_array_equal(crop, image[top : top + 256, left : left + 256])
    differs = np.abs(old.astype(int) - new).max(2) == 20
    assert len(np.unique(difference_map[differs], axis=0)) == len(np.unique(difference_map[~differs], axis=0)) == 1
    assert difference_map[differs].sum(1).min() > difference_map[~differs].sum(1).max()
    assert "\u2265 32" in part.text  # the end of the scale: the smallest power of two above 20


def test_equal_images_show_their_centre_and_other_sizes_no_slider(changed: Path) -> None:
    """Where nothing differs the crop is the centre; images of two sizes are shown beside each other."""
    page = compared(changed)
    image = np.asarray(Image.open(changed / "old" / "equal.png"))
    old, new = Page(article(page, "equal.png")).crops()
    np.testing.assert_array_equal(old, image[222:478, 322:578])
    np.testing.assert_array_equal(old, new)
    part = Page(article(page, "size.png"))
    assert "900 \u00d7 700 and 450 \u00d7 350" in part.text
    assert len(part.crops()) == 2
    assert not part.all("input")


def test_page_keeps_its_size_limit(changed: Path) -> None:
    """A page takes no more pairs than fit, and says how many did not."""
    whole = compared(changed)
    limit = len(whole.encode()) - 1
    page = compared(changed, max_bytes=limit)
    assert len(page.encode()) <= limit
    assert page.count("<article>") == 2
    assert "1 more did not fit" in page
    assert "more did not fit" not in whole


def test_interval_covers_the_truth() -> None:
    """In 200 draws of 40 pairs the 95 % interval holds the true difference in 88 % to 99 %."""
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        base = rng.normal(0, 5, 40)
        found = difference(base, base + rng.normal(0.3, 1, 40), seed=seed)
        hits += found.low <= 0.3 <= found.high
    assert 176 <= hits <= 198


def test_missing_scores_cost_their_pair() -> None:
    """NaN is left out of means, wins and interval; a single pair has no interval, none has no mean."""
    found = difference(np.array([0.0, np.nan, 1.0, 2.0]), np.array([1.0, 5.0, np.nan, 2.0]))
    assert (found.images, found.baseline, found.mean, found.difference, found.wins) == (2, 1.0, 1.5, 0.5, 0.75)
    assert difference(np.zeros(1), np.ones(1)).verdict == "unclear"
    assert difference(np.array([np.nan]), np.ones(1)).images == 0


def test_chosen_pairs_are_contradictions_extremes_and_typical_ones() -> None:
    """Each list in turn gives its next image; every pair comes once; images without scores never do."""
    change = np.array([[1.0, 100.0], [1.0, -100.0], [3.0, 50.0], [-2.0, -500.0], [0.9, 90.0], [np.nan, np.nan]])
    scores = np.stack([np.zeros_like(change), change])
    chosen = choose(scores, ["a", "b"], 5)
    assert [(choice.image, choice.reason) for choice in chosen] == [
        (1, "strongest contradiction between the rewards"),
        (2, "largest gain by a"),
        (3, "largest loss by a"),
        (0, "typical by a"),
        (4, "largest gain by b, rank 2"),
    ]
    assert len(choose(scores, ["a", "b"], 50)) == 5
    assert {choice.method for choice in choose(np.stack([*scores, change]), ["a", "b"], 4)} == {1, 2}


@pytest.mark.skipif(BROWSER is None, reason="no headless Chromium on this machine")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_page_in_a_browser(folders: Path, width: int) -> None:
    """Chromium runs the page's script in spite of its security policy, and draws text and the images in colour."""
    run(folders, "--reward", "psnr", "--reward", "piqe", "--reference", str(folders / "truth"))
    shot = folders / "shot.png"
    browser = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    browser += [f"--user-data-dir={folders / 'profile'}", f"--window-size={width},4000"]
    browser += ["--virtual-time-budget=10000"]  # a busy machine must not take the picture before the images are there
    url = (folders / "page.html").as_uri()
    subprocess.run([*browser, f"--screenshot={shot}", url], check=True, capture_output=True, timeout=600)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    assert (pixels.max(2) - pixels.min(2) > 60).sum() > 5 * 48 * 48  # five articles, each three images of this size
    assert (pixels.max(2) < 80).sum() > 5000  # the text
    document = subprocess.run([*browser, "--dump-dom", url], check=True, capture_output=True, timeout=600, text=True)
    assert document.stdout.count('style="--at: 50%;"') == 5  # the script has placed every slider
