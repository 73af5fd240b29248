"""The page of the server: who may see it, and what a person who drops images on it reads."""

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from PIL import Image

import iqareward
from iqareward.serving.requests import Settings
from iqareward.serving.wire import Limits
from tests.serving.in_process import application, error_of, free_port, get, post, served

SUM = "0.7*ssim + 0.3*haarpsi"
TOKEN = "a token of the test"


def app(token: str | None = None, **limits: int):
    rewards = {name: served(iqareward.load(name)) for name in ("niqe", "ssim", SUM)}
    return application(rewards, Settings(limits=Limits(**limits), token=token))


def test_everyone_gets_the_page_and_only_the_page() -> None:
    """It has no secrets, loads nothing from elsewhere, and what it asks for still needs the token."""
    guarded = app(TOKEN)
    response = get(guarded, "/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert response.text == get(app(), "/").text
    assert not any(word in response.text for word in ("http:", "https:", "innerHTML", "localStorage", TOKEN))
    for path in ("/v1/rewards", "/metrics", "/openapi.json", "/index.html"):
        assert error_of(get(guarded, path)) == (401, "unauthorized")
    assert error_of(post(guarded, "/", content=b"")) == (405, "method_not_allowed")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ground truth, three restorations of it and a JPEG, a file that is no image, and one too small for NIQE."""
    skimage = pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("files")
    with Image.open(Path(skimage.__file__).parent / "data" / "coffee.png") as photograph:
        clean = iqareward.to_images(photograph.convert("RGB").crop((150, 80, 406, 336)))
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(clean.shape, generator=rng)
    blurred = torch.nn.functional.avg_pool2d(clean, 5, 1, 2, count_include_pad=False)
    images = {
        "truth.png": clean, "noisy.png": clean + 0.1 * noise, "blurred.png": blurred,
        "<img src=x onerror=alert(1)>.png": clean + 0.03 * noise, "small.png": clean[..., :40, :40],
    }  # fmt: skip
    for name, image in images.items():
        save(image, folder / name)
    save(clean, folder / "photo.jpg")
    (folder / "text.png").write_text("no image")
    return folder


def save(image: torch.Tensor, path: Path) -> None:
    array = (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(array).save(path)


@contextmanager
def running(served_app: Any) -> Generator[str]:
    """The application behind a port of this machine."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(served_app, "127.0.0.1", port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < end
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("websockets", reason="the browser is driven over a websocket")
    from tests.serving.browser import browser, chromium

    if (program := chromium()) is None:
        pytest.skip("there is no Chromium here")
    with browser(program, tmp_path_factory.mktemp("browser")) as opened:
        yield opened


CARDS = """[...document.querySelectorAll(".card")].map((card) => ({
  name: card.querySelector("h2").lastChild.data,
  scores: Object.fromEntries([...card.querySelectorAll("dt")].map((each) =>
    [each.textContent, each.nextSibling.textContent])),
  best: [...card.querySelectorAll("dd.best")].map((each) => each.previousSibling.textContent),
  problems: [...card.querySelectorAll(".wrong")].map((each) => each.textContent),
}))"""
DONE = 'document.querySelectorAll(".card").length === {} && document.getElementById("state").textContent === ""'


def cards(tab: Any, number: int) -> dict[str, Any]:
    """What is written on the cards, in their order, once all is scored."""
    tab.wait(DONE.format(number))
    return {card["name"]: card for card in tab.evaluate(CARDS)}


def expected(reward: str, files: Path, name: str) -> str:
    images, references = (iqareward.to_images(files / each) for each in (name, "truth.png"))
    return f"{iqareward.load(reward)(images, references=references).item():#.5g}"


def sort_by(tab: Any, name: str) -> None:
    tab.evaluate(f"""{{ const sort = document.getElementById("sort"); sort.value = {name!r};
        sort.dispatchEvent(new Event("change")); }}""")


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.slow
def test_scores_side_by_side(tab: Any, files: Path) -> None:
    """Scores are those of the rewards, sorted by the chosen one; errors are the server's words; names are text."""
    hostile = "<img src=x onerror=alert(1)>.png"
    names = ["noisy.png", "blurred.png", hostile]
    with running(app()) as address:
        tab.open(address)
        tab.wait('document.querySelectorAll("#sort option").length === 3')
        tab.give_files("#images", *(files / name for name in names))
        before = cards(tab, 3)
        for name, card in before.items():
            assert card["scores"]["niqe"] == expected("niqe", files, name)
            assert card["scores"]["ssim"] == card["scores"][SUM] == "needs ground truth"
        tab.give_files("#references", files / "truth.png")
        after = cards(tab, 3)
        assert set(after) == set(names)
        for name, card in after.items():
            assert card["scores"] == {reward: expected(reward, files, name) for reward in ("niqe", "ssim", SUM)}
            assert card["problems"] == []
        for reward in ("ssim", "niqe"):
            sort_by(tab, reward)
            found = cards(tab, 3)
            assert list(found) == sorted(names, key=lambda name: -float(after[name]["scores"][reward]))
            assert [name for name, card in found.items() if reward in card["best"]] == list(found)[:1]
        tab.give_files("#images", *(files / name for name in ("photo.jpg", "text.png", "small.png")))
        found = cards(tab, 6)
        assert (
            "lossy_image: expected a PNG or a lossless WebP file, got a lossy JPEG" in found["photo.jpg"]["problems"][0]
        )
        assert found["text.png"]["problems"][0].startswith("unsupported_image: expected a still PNG")
        assert found["small.png"]["scores"] == {"niqe": "not scored", "ssim": "error", SUM: "error"}
        assert "bad_references: expected a reference of the image's size" in found["small.png"]["problems"][0]
        assert set(list(found)[:3]) == set(names)  # what has no score stands last
        assert tab.evaluate('document.querySelectorAll("h2 img, .zone .note img").length') == 0
        tab.evaluate('document.getElementById("clear").click()')
        assert cards(tab, 0) == {}
    assert tab.complaints == []


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.slow
def test_token_and_limits(tab: Any, files: Path) -> None:
    """The token is asked for, a wrong one is an error, and a file beyond the server's limit is not sent."""
    with running(app(TOKEN, max_bytes=160_000, max_pixels=10_000)) as address:
        tab.open(address)
        tab.wait('!document.getElementById("access").hidden')
        assert "unauthorized" in tab.evaluate('document.getElementById("problem").textContent')
        for token, works in (("wrong", False), (TOKEN, True)):
            tab.evaluate(f"""{{ document.getElementById("token").value = {token!r};
                document.querySelector("#access button").click(); }}""")
            tab.wait(f'(document.getElementById("problem").textContent === "") === {str(works).lower()}')
        tab.wait('document.querySelectorAll("#sort option").length === 3')
        tab.give_files("#images", files / "small.png", files / "noisy.png", files / "blurred.png")
        found = cards(tab, 3)
        assert found["small.png"]["scores"]["niqe"] == "not scored"
        assert "too_many_pixels: expected at most 10000 pixels, got 256 x 256" in found["blurred.png"]["problems"][0]
        size = (files / "noisy.png").stat().st_size
        assert found["noisy.png"]["problems"] == [
            f"the files have {size} bytes, and the server takes 160000 in a request"
        ]
        stored = "localStorage.length + sessionStorage.length + document.cookie.length + location.search.length"
        assert tab.evaluate(stored) == 0
    assert tab.complaints == []
