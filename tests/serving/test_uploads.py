"""Picture files: lossless ones are scored as they are, others are refused with a reason."""

import asyncio
import io
import struct
import zlib

import pytest
import torch
from PIL import Image
from torch import Tensor

import iqareward
from iqareward.rewards.calls import Call
from iqareward.serving.replica import Scored
from iqareward.serving.requests import MemoryBudget, Reservation, ServiceError, Settings, decode_files
from iqareward.serving.wire import Limits, as_floats, decode_answer
from tests.serving.in_process import answering, application, error_of, post, send, served
from tests.serving.picture_files import encoded, picture


@pytest.fixture(scope="module")
def app():
    return application({name: served(iqareward.load(name)) for name in ("ssim", "piqe")})


def room(nbytes: int = 2**30) -> Reservation:
    return Reservation(MemoryBudget(nbytes))


def decode(files: list[bytes], limits: Limits | None = None, *, allow_lossy: bool = False) -> list[Tensor]:
    """The images in files, alone."""
    return decode_files({"images": files}, limits or Limits(), room(), allow_lossy=allow_lossy)["images"]


def form(name: str, *contents: bytes) -> list:
    return [(name, (f"{index}.png", content)) for index, content in enumerate(contents)]


def test_files_score_like_local_files(app):
    """PNG and lossless WebP of mixed sizes get the bits of the score of the same pixels here."""
    pictures = [picture(0), picture(1, (32, 50)), picture(2)]
    truths = [picture(3), picture(4, (32, 50)), picture(5)]
    files = form("images", encoded(pictures[0]), encoded(pictures[1], "WEBP", lossless=True), encoded(pictures[2]))
    files += form("references", *(encoded(truth) for truth in truths))
    answer = decode_answer(post(app, files=files, data={"reward": ["ssim", "piqe"], "deadline": "5"}).content)
    local = [iqareward.to_images(image)[0] for image in pictures]
    references = [iqareward.to_images(image)[0] for image in truths]
    assert torch.equal(answer.scores["ssim"], iqareward.load("ssim")(local, references=references))
    assert torch.equal(answer.scores["piqe"], iqareward.load("piqe")(local))


def test_a_picture_of_one_pixel():
    """Its pixels are a copy that may be written to, as those of any picture, so that torch has nothing to warn of."""
    torch.set_warn_always(True)
    try:
        (pixels,) = decode([encoded(picture(size=(1, 1)))])
    finally:
        torch.set_warn_always(False)
    assert pixels.shape == (3, 1, 1)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16"])
def test_other_modes_of_png(mode):
    """Grey, transparent, indexed and 16-bit pictures become what `to_images` makes of them, and no larger."""
    image = Image.new("I;16", (8, 8), 3000) if mode == "I;16" else picture().convert(mode)
    if mode == "RGBA":
        image.putpixel((1, 1), (10, 20, 30, 40))
    (pixels,) = decode([encoded(image)])
    assert torch.equal(as_floats(pixels), iqareward.to_images(image)[0])
    assert pixels.dtype == (torch.float32 if mode in ("RGBA", "I;16") else torch.uint8)


def test_opaque_pictures_with_an_opacity_channel():
    """They are no larger than without."""
    image = picture()
    (pixels,) = decode([encoded(image.convert("RGBA"))])
    assert pixels.dtype == torch.uint8
    assert torch.equal(as_floats(pixels), iqareward.to_images(image)[0])


def test_turned_pictures():
    """The rotation that a camera notes is applied, to images and references alike."""
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(picture(), exif=exif)
    (pixels,) = decode([content])
    assert pixels.shape == (3, 40, 32)
    assert torch.equal(as_floats(pixels), iqareward.to_images(picture().transpose(Image.Transpose.ROTATE_270))[0])


@pytest.mark.parametrize(("jpeg", "status"), [("always", 200), ("never", 415)])
def test_camera_jpeg_with_a_preview(jpeg, status):
    """The first picture of an MPO is the photograph, and such a file is a JPEG like any other."""
    content = encoded(picture(), "MPO", save_all=True, append_images=[picture(1, (8, 8))])
    assert Image.open(io.BytesIO(content)).n_frames == 2
    app = application({"piqe": served(iqareward.load("piqe"))}, Settings(jpeg=jpeg))
    response = post(app, files=form("images", content), data={"reward": "piqe"})
    assert response.status_code == status
    if status == 200:
        local = iqareward.load("piqe")(iqareward.to_images([Image.open(io.BytesIO(content))]))
        assert torch.equal(decode_answer(response.content).scores["piqe"], local)
    else:
        assert error_of(response) == (415, "lossy_image")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"quality": 100}), ("WEBP", {}), ("WEBP", {"quality": 100, "icc_profile": b"x" * 99})],
)
def test_lossy_files_are_refused_unless_asked_for(app, kind, options):
    """A JPEG or a lossy WebP names itself and the switch; with the switch it is scored."""
    content = encoded(None, kind, **options)
    response = post(app, files=form("images", encoded(), content), data={"reward": "piqe"})
    assert error_of(response) == (415, "lossy_image")
    assert response.json()["error"]["index"] == 1
    assert "--jpeg always" in response.json()["error"]["message"]
    allowed = application({"piqe": served(iqareward.load("piqe"))}, Settings(jpeg="always"))
    assert post(allowed, files=form("images", content), data={"reward": "piqe"}).status_code == 200


def test_extended_lossless_webp_is_lossless():
    """The chunk with the pixels decides, also behind a colour profile."""
    content = encoded(None, "WEBP", lossless=True, icc_profile=b"x" * 99)
    assert content[12:16] == b"VP8X"
    assert len(decode([content])) == 1


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with hardly a pixel behind it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"x")) + chunk(b"IEND", b"")


TWO, LARGER = [encoded()] * 2, encoded(picture(1, (50, 50)))
ANIMATION = encoded(picture(), "WEBP", save_all=True, append_images=[picture(1)], lossless=True)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([b""], (415, "unsupported_image")),
        ([b"GIF89a" + b"\x00" * 50], (415, "unsupported_image")),
        ([encoded(None, "BMP")], (415, "unsupported_image")),
        ([ANIMATION], (415, "unsupported_image")),
        ([encoded()[:200]], (422, "broken_image")),
        ([bomb(30_000, 30_000)], (413, "too_many_pixels")),
        ([bomb(2**31 - 1, 2**31 - 1)], (413, "too_many_pixels")),
        ([bomb(64, 64)], (422, "broken_image")),
        ([bomb(9000, 9000)], (413, "too_many_pixels")),
    ],
)  # fmt: skip
def test_what_is_no_picture(files, expected):
    """Other formats, animations, cut files and files that would become huge are refused by what their headers say."""
    with pytest.raises(ServiceError) as caught:
        decode(files, allow_lossy=True)
    assert (caught.value.status, caught.value.code) == expected


def test_pictures_count_uncompressed():
    """Many small files cannot become more bytes than one body may hold, references included."""
    black = encoded(Image.new("RGB", (1000, 1000)))
    clear = encoded(Image.new("RGBA", (1000, 1000), (0, 0, 0, 9)))  # float32
    limits = Limits(max_bytes=12_500_000)
    for files in ([black] * 4, [clear]):
        assert len(decode(files, limits)) == len(files)
    for files, at in (([black] * 5, 4), ([clear, black], 0)):
        with pytest.raises(ServiceError, match="decoded") as caught:
            decode(files, limits)
        assert (caught.value.status, caught.value.index) == (413, at)
    with pytest.raises(ServiceError, match="decoded") as caught:
        decode_files({"images": [black] * 3, "references": [black] * 3}, limits, room(), allow_lossy=False)
    assert (caught.value.status, caught.value.index) == (413, 1)
    with pytest.raises(ServiceError, match="at most 2 images"):
        decode([encoded()] * 3, Limits(max_images=2))


def test_pixels_count_for_the_memory_of_the_server():
    """While the pixels of one request fill it, another is told to come back; afterwards there is room again."""
    black = encoded(Image.new("RGB", (512, 512)))  # 0.75 MiB of pixels in a few hundred bytes

    async def scenario() -> None:
        entered, release = asyncio.Event(), asyncio.Event()

        async def wait(call: Call) -> Scored:
            entered.set()
            await release.wait()
            return Scored(torch.zeros(len(call)))

        settings = Settings(limits=Limits(max_bytes=2**20), max_inflight_bytes=2**21)
        app = application({"r": answering(wait)}, settings)
        options = {"files": form("images", black), "data": {"reward": "r"}}
        held = [asyncio.create_task(send(app, "POST", "/v1/score", **options)) for _ in range(2)]
        await entered.wait()
        refused = await send(app, "POST", "/v1/score", **options)
        assert error_of(refused) == (429, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        release.set()
        assert [(await task).status_code for task in held] == [200] * 2
        assert (await send(app, "POST", "/v1/score", **options)).status_code == 200

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("files", "fields", "expected"),
    [
        ([], {"reward": "piqe"}, (415, "unsupported_content_type")),  # httpx2 sends no form without files
        (form("images", encoded()), {}, (422, "bad_form")),
        (form("references", encoded()), {"reward": "piqe"}, (422, "bad_form")),
        (form("images", encoded()), {"reward": ["piqe", "piqe"]}, (422, "bad_form")),
        (form("images", encoded()), {"reward": "piqe", "image": "x"}, (422, "bad_form")),
        (form("images", encoded()), {"reward": "piqe", "images": "text"}, (422, "bad_form")),
        (form("images", encoded()) + form("reward", b"piqe"), {}, (422, "bad_form")),
        (form("images", encoded()), {"reward": "piqe", "prompts": ["a", "b"]}, (422, "bad_prompts")),
        (form("images", encoded()), {"reward": "piqe", "deadline": "soon"}, (422, "bad_form")),
        (form("images", encoded()), {"reward": "piqe", "deadline": "-1"}, (422, "bad_form")),
        (form("images", encoded()), {"reward": "piqe", "deadline": ["1", "2"]}, (422, "bad_form")),
        (form("images", encoded()), {"reward": "nope"}, (404, "unknown_reward")),
        (form("images", encoded()), {"reward": "ssim"}, (422, "missing_references")),
        (form("images", encoded()) + form("references", *TWO), {"reward": "ssim"}, (422, "bad_references")),
        (form("images", encoded()) + form("references", LARGER), {"reward": "ssim"}, (422, "bad_references")),
    ],
)  # fmt: skip
def test_bad_forms(app, files, fields, expected):
    """Every field is checked, and what is wrong is named."""
    assert error_of(post(app, files=files, data=fields)) == expected


def test_malformed_form(app):
    """A body that is no form is a bad request."""
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert error_of(post(app, content=b"--x\r\nnonsense", headers=headers))[0] in (400, 422)
    assert error_of(post(app, content=b"--x", headers={"content-type": "multipart/form-data"}))[0] == 400
