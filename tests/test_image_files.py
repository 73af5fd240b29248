"""Image files: which are found and paired, and that each is read as Pillow reads it or refused with a reason."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

import iqareward
from iqareward.cli.scoring import samples_of
from iqareward.datasets.samples import read_ahead
from iqareward.image_files import FORMATS, SUFFIXES, References, UnreadableImageError, find_images, read_image
from tests.tolerances import EXACT, FORMULA_FP32

RNG = np.random.default_rng(0)
SMOOTH = np.kron(RNG.integers(0, 256, (5, 6, 3)), np.ones((8, 8, 1))).astype(np.uint8)
DEEP = RNG.integers(0, 65536, (9, 7, 4), dtype=np.uint16)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "F")
TRANSPOSED = {  # EXIF orientation -> the upright image
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: np.rot90(image),
}


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def in_mode(mode: str) -> Image.Image:
    """The smooth image in a mode that Pillow can save."""
    image = Image.fromarray(SMOOTH)
    grey = np.asarray(image.convert("L"))
    if mode in ("I", "I;16", "I;16B"):
        return Image.fromarray(grey.astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]) * 257)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    if mode in ("LA", "RGBA", "PA"):
        image.putalpha(image.getchannel("G"))
    if mode == "LAB":
        from PIL import ImageCms

        lab = ImageCms.profileToProfile(image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), 0, "LAB")
        assert lab is not None
        return lab
    return image.convert(mode)


def as_pillow_reads(path: Path) -> np.ndarray:
    """`[H, W, 3]` in [0, 1], on white, by nothing but Pillow's own conversions."""
    with Image.open(path) as image:
        if image.mode == "F":
            return np.asarray(image)[..., None].repeat(3, 2)
        if image.mode.startswith("I"):
            return np.asarray(image).astype(np.float32)[..., None].repeat(3, 2) / 65535
        if not image.has_transparency_data:
            return np.asarray(image.convert("RGB")) / np.float32(255)
        rgba = np.asarray(image.convert("RGBA")) / np.float32(255)
        return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


# Pillow before 13 cannot read all of what it writes
BROKEN = {("YCbCr", "TIFF")} if int(PIL.__version__.split(".")[0]) < 13 else set[tuple[str, str]]()


@pytest.mark.filterwarnings("ignore:IM image format is deprecated")
def test_every_file_that_pillow_writes(tmp_path: Path) -> None:
    """Every suffix, and every mode of a format: equal to Pillow's reading, or refused with the file and a reason."""
    Image.init()
    pictures = {mode: in_mode(mode) for mode in MODES}
    kinds: set[str] = set()
    read: dict[str, set[str]] = {}
    for suffix, kind in Image.registered_extensions().items():
        modes = () if kind not in Image.SAVE else ("L", "RGB", "1") if kind in kinds else MODES
        kinds.add(kind)
        for mode in modes:
            path = tmp_path / f"{mode.replace(';', '')}{suffix}"
            try:
                pictures[mode].save(path)
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not written in this mode
            try:
                image = iqareward.to_images(path, value_range=(0, 1))
            except UnreadableImageError as error:
                assert error.file == str(path)
                assert len(error.reason) > 20
                assert kind not in FORMATS or (mode, kind) in {("I", "TIFF"), *BROKEN}, error
                continue
            assert suffix in SUFFIXES
            read.setdefault(suffix, set()).add(mode)
            torch.testing.assert_close(
                image[0].movedim(0, -1),
                torch.from_numpy(as_pillow_reads(path)),
                msg=lambda said, path=path: f"{path}: {said}",
                **FORMULA_FP32,
            )
    assert {".png", ".jpg", ".jfif", ".jp2", ".tga", ".webp", ".tif", ".ppm", ".pfm", ".sgi", ".qoi"} <= set(read)
    assert {"L", "LA", "P", "RGB", "RGBA", "I;16", "1"} <= read[".png"]


def png(pixels: np.ndarray, *chunks: tuple[bytes, bytes], size: tuple[int, int] | None = None) -> bytes:
    """A 16-bit PNG file, which may claim another size."""
    height, width = size or pixels.shape[:2]
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_sixteen_bits_are_kept() -> None:
    """16-bit PNG and PPM files give their own samples back, with their transparency."""
    for channels in (3, 4):
        np.testing.assert_array_equal(read_image(png(DEEP[..., :channels])), DEEP[..., :channels])
    np.testing.assert_array_equal(read_image(png(DEEP[..., :1])), DEEP[..., 0])
    np.testing.assert_array_equal(read_image(png(DEEP[..., :2])), DEEP[..., [0, 0, 0, 1]])
    ppm = b"P6 7 9 65535\n" + DEEP[..., :3].astype(">u2").tobytes()
    np.testing.assert_array_equal(read_image(ppm), DEEP[..., :3])
    pgm = b"P5 7 9 65535\n" + DEEP[..., 0].astype(">u2").tobytes()
    np.testing.assert_array_equal(read_image(pgm), DEEP[..., 0])
    for channels in (1, 3):
        key = struct.pack(f">{channels}H", *DEEP[3, 4, :channels])
        read = read_image(png(DEEP[..., :channels], (b"tRNS", key)))
        np.testing.assert_array_equal(read[..., :channels], DEEP[..., :channels])
        assert np.argwhere(read[..., 3] == 0).tolist() == [[3, 4]]


def test_a_deep_file_equals_its_own_array(tmp_path: Path) -> None:
    """PSNR between a 16-bit PNG and the array that was written has no error in it."""
    (tmp_path / "deep.png").write_bytes(png(DEEP[..., :3]))
    written = torch.from_numpy(DEEP[..., :3].astype(np.float32) / 65535).movedim(-1, 0)[None]
    torch.testing.assert_close(iqareward.to_images(tmp_path / "deep.png"), written, **FORMULA_FP32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"compression": "zlib"},
        {"compression": "zlib", "byteorder": ">"},
        {"tile": (16, 16)},
        {"rowsperstrip": 2},
    ],
    ids=str,
)
def test_sixteen_bits_of_tiff_are_kept(tmp_path: Path, options: dict[str, object]) -> None:
    """Either byte order, strips, tiles and compression."""
    tifffile = pytest.importorskip("tifffile")
    for channels in (3, 4):
        tifffile.imwrite(tmp_path / "deep.tif", DEEP[..., :channels], photometric="rgb", **options)
        np.testing.assert_array_equal(read_image(tmp_path / "deep.tif"), DEEP[..., :channels])
    tifffile.imwrite(tmp_path / "deep.tif", DEEP[..., 0], **options)
    np.testing.assert_array_equal(read_image(tmp_path / "deep.tif"), DEEP[..., 0])


def test_what_would_be_cut_or_guessed_is_refused(tmp_path: Path) -> None:
    """Deep files that Pillow only gives in 8 bits, and integers without a known white, say what to do."""
    tifffile = pytest.importorskip("tifffile")
    path = tmp_path / "deep.tif"
    refused = {
        "cut its 16 bits": (
            (DEEP[..., :3].transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}),
            (DEEP, {"photometric": "separated"}),
            (DEEP, {"photometric": "rgb", "extrasamples": [1]}),
        ),
        "white is unknown": ((DEEP[..., 0].astype(np.int16), {}), (DEEP[..., 0].astype(np.uint32), {})),
        "white is not at the maximum": ((DEEP[..., 0], {"photometric": "miniswhite"}),),
    }
    for reason, files in refused.items():
        for pixels, options in files:
            tifffile.imwrite(path, pixels, **options)
            with pytest.raises(UnreadableImageError, match=rf"deep\.tif: .*{reason}"):
                read_image(path)
    with pytest.raises(UnreadableImageError, match="cut its 16 bits"):
        read_image(encoded(Image.fromarray(SMOOTH), "SGI", bpc=2))
    with pytest.raises(UnreadableImageError, match="cut its 10 bits"):
        read_image(b"P6 7 9 1023\n" + DEEP[..., :3].astype(">u2").tobytes())


@pytest.mark.parametrize("orientation", TRANSPOSED)
def test_every_exif_orientation(orientation: int) -> None:
    """Photographs come upright, with 8 and with 16 bits."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = TRANSPOSED[orientation]
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(Image.fromarray(SMOOTH), kind, exif=exif, **options)
        np.testing.assert_array_equal(read_image(content), upright(SMOOTH))
    deep = png(DEEP, (b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
    np.testing.assert_array_equal(read_image(deep), upright(DEEP))


def test_animations_are_refused_and_camera_previews_are_not() -> None:
    """Several frames or pages are named; an MPO, a JPEG with previews as cameras write it, is its first picture."""
    first, second = Image.fromarray(SMOOTH), Image.fromarray(255 - SMOOTH)
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        content = encoded(first, kind, save_all=True, append_images=[second])
        with pytest.raises(UnreadableImageError, match="it holds 2 frames or pages"):
            read_image(content)
    photo = encoded(first, "MPO", save_all=True, append_images=[second], quality=95)
    for formats in (FORMATS, ("JPEG",)):
        np.testing.assert_array_equal(
            read_image(photo, formats=formats), read_image(encoded(first, "JPEG", quality=95))
        )


def test_formats_can_be_restricted() -> None:
    """A format that was not asked for is refused, and so is one that is never read."""
    image = Image.fromarray(SMOOTH)
    with pytest.raises(UnreadableImageError, match="of a kind that is not read"):
        read_image(encoded(image, "BMP"), formats=("PNG",))
    for kind in ("PDF", "EPS", "ICO"):
        with pytest.raises(UnreadableImageError, match="of a kind that is not read"):
            read_image(encoded(image, kind))


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("dav1d"),
        SyntaxError("broken"),
        struct.error("short"),
        MemoryError(),
        Image.DecompressionBombError("big"),
    ],
    ids=repr,
)
def test_whatever_a_decoder_raises_is_one_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: Exception
) -> None:
    """Foreign decoders raise anything: it comes as one type that names the file, from an opened image too."""

    def fail(*_: object, **__: object) -> None:
        raise raised

    Image.fromarray(SMOOTH).save(tmp_path / "a.png")
    opened = Image.open(tmp_path / "a.png")
    monkeypatch.setattr(type(opened), "load", fail)
    for source in (opened, tmp_path / "a.png"):
        with pytest.raises(UnreadableImageError, match=r"a\.png: \w+"):
            iqareward.to_images(source)


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """With bits flipped, cut short, or a part repeated elsewhere."""
    data = bytearray(content)
    kind = rng.integers(3)
    if kind == 0:
        for place in rng.integers(0, len(data), rng.integers(1, 20)):
            data[place] ^= 1 << int(rng.integers(8))
        return bytes(data)
    if kind == 1:
        return bytes(data[: rng.integers(len(data))])
    start, end, to = sorted(rng.integers(0, len(data), 2)), 0, int(rng.integers(len(data)))
    return bytes(data[:to] + data[start[0] : start[1]] + data[to + end :])


def seeds() -> dict[str, bytes]:
    """One small file of each format and depth."""
    Image.init()
    image = Image.fromarray(SMOOTH)
    files = {kind: encoded(image, kind) for kind in FORMATS if kind in Image.SAVE and kind not in ("MSP", "XBM", "MPO")}
    files |= {f"{kind} of 1 bit": encoded(image.convert("1"), kind) for kind in ("MSP", "XBM", "TIFF", "PPM")}
    files |= {f"{kind} palette": encoded(image.convert("P"), kind) for kind in ("PNG", "TIFF", "BMP", "PCX", "TGA")}
    files["compressed TIFF"] = encoded(image, "TIFF", compression="tiff_lzw")
    files["lossless WEBP"] = encoded(image, "WEBP", lossless=True)
    files["MPO"] = encoded(image, "MPO", save_all=True, append_images=[image])
    files["deep PNG"] = png(DEEP)
    files["JPEG with EXIF"] = encoded(image, "JPEG", exif=Image.Exif())
    return files


def test_damaged_files_are_read_or_refused() -> None:
    """Any damage leaves an image or the one error, whose reason is not empty."""
    rng = np.random.default_rng(1)
    for content in seeds().values():
        read_image(content)
        for _ in range(10):
            try:
                assert read_image(damaged(content, rng)).ndim in (2, 3)
            except UnreadableImageError as error:
                assert error.reason


def test_missing_empty_and_huge_files_say_so(tmp_path: Path) -> None:
    """The reason is the file system's, or Pillow's limit of pixels."""
    (tmp_path / "empty.png").touch()
    (tmp_path / "huge.png").write_bytes(png(DEEP, size=(20000, 20000)))
    reasons = {"none.png": "No such file", "empty.png": "it is empty", "huge.png": "400000000 pixels"}
    for name, reason in reasons.items():
        with pytest.raises(UnreadableImageError, match=rf"{name}: .*{reason}"):
            read_image(tmp_path / name)


def names(found: dict[Path, Path]) -> list[str]:
    return [relative.as_posix() for relative in found.values()]


def touch(folder: Path, *relative: str) -> Path:
    for name in relative:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_suffixes_are_known_in_any_case(tmp_path: Path) -> None:
    """Pictures are found whatever their suffix's case, those that cannot be read too; other files are left out."""
    pictures = ["A.PNG", "b.Jfif", "c.jp2", "d.TGA", "e.heic", "f.dds"]
    touch(tmp_path, *pictures, "notes.txt", "g.pdf", "README", "h.mp4")
    assert find_images([tmp_path]).files == {tmp_path / name: Path(name) for name in pictures}


def test_links_are_followed_once(tmp_path: Path) -> None:
    """A loop gives each picture once, under its own path, in a folder and in a glob; linked folders are searched."""
    touch(tmp_path / "all", "b/c.png", "d.png")
    touch(tmp_path / "other", "e.png")
    (tmp_path / "all/a loop").symlink_to(tmp_path / "all")
    (tmp_path / "all/b/loop").symlink_to("..")
    (tmp_path / "all/linked").symlink_to(tmp_path / "other")
    expected = ["b/c.png", "d.png", "linked/e.png"]
    for argument in (tmp_path / "all", f"{tmp_path}/all/**/*.png", f"{tmp_path}/a*/**/*.png"):
        found = find_images([argument])
        assert names(found.files) == expected
        assert not found.problems
    assert names(find_images([tmp_path / "all", tmp_path / "all/b/loop/d.png"]).files) == expected


def test_globs(tmp_path: Path) -> None:
    """Wildcards work as in a shell: hidden files need a dot, `**` is any number of folders."""
    touch(tmp_path, "a.png", "b/a.png", "b/c/a.jpg", "b/c/d.png", ".hidden/e.png", "b/.f.png", "notes.txt")
    cases = {
        "*.png": ["a.png"],
        "*/*.png": ["a.png"],
        "**/*.png": ["a.png", "b/a.png", "b/c/d.png"],
        "b/**/a.*": ["a.png", "c/a.jpg"],
        "**/c/*": ["b/c/a.jpg", "b/c/d.png"],
        "**": ["a.png", "b/a.png", "b/c/a.jpg", "b/c/d.png"],
        ".*/*.png": ["e.png"],
        "b/[.]*": [],
    }
    for pattern, expected in cases.items():
        if expected:
            assert names(find_images([f"{tmp_path}/{pattern}"]).files) == expected
        else:
            with pytest.raises(ValueError, match="matches no images"):
                find_images([f"{tmp_path}/{pattern}"])


def test_what_cannot_be_searched_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders without permission, links that lead nowhere and things that are no file are problems, not silence."""
    touch(tmp_path, "a.png", "locked/b.png")
    (tmp_path / "c.png").symlink_to("nowhere.png")
    (tmp_path / "folder").symlink_to("nowhere")
    (tmp_path / "notes.txt").symlink_to("nowhere.txt")
    os.mkfifo(tmp_path / "pipe.png")
    iterate = Path.iterdir

    def refuse(path: Path):
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return iterate(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    for argument in (tmp_path, f"{tmp_path}/**/*"):
        found = find_images([argument])
        assert names(found.files) == ["a.png"]
        assert {path.name: reason for path, reason in found.problems.items()} == {
            "locked": "the folder cannot be searched (Permission denied)",
            "c.png": "a link that leads nowhere",
            "folder": "a link that leads nowhere",
            "pipe.png": "not a regular file",
        }
    with pytest.raises(ValueError, match=r"locked' matches no images.*Permission denied"):
        find_images([tmp_path / "locked"])


def test_resource_forks_are_no_images(tmp_path: Path) -> None:
    """The `._name` that macOS puts beside an image on a foreign disk is left out, unless it is named itself."""
    touch(tmp_path, "a.png", "._a.png", ".b.png")
    assert names(find_images([tmp_path]).files) == [".b.png", "a.png"]
    assert names(find_images([tmp_path / "._a.png"]).files) == ["._a.png"]


def test_references_have_the_same_path_and_any_suffix(tmp_path: Path) -> None:
    """The same name comes first, then the only one with another suffix; several are named, not guessed."""
    touch(tmp_path, "DSC1.JPG", "deep/a.png", "deep/a.jpg", "a.txt")
    references = References(tmp_path)
    assert references.find(Path("DSC1.png")) == tmp_path / "DSC1.JPG"
    assert references.find(Path("deep/a.jpg")) == tmp_path / "deep/a.jpg"
    with pytest.raises(ValueError, match=r"several references in .*deep: a\.jpg, a\.png"):
        references.find(Path("deep/a.webp"))
    for absent in ("a.png", "dsc1.png", "nowhere/a.png"):
        with pytest.raises(FileNotFoundError, match="no reference"):
            references.find(Path(absent))
    assert References(tmp_path / "DSC1.JPG").find(Path("whatever.png")) == tmp_path / "DSC1.JPG"
    with pytest.raises(ValueError, match="no such folder"):
        References(tmp_path / "nowhere")


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    """A file whose name is no valid text is found, paired and read."""
    name = os.fsdecode(b"latin\xe9.png")
    for folder in ("images", "references"):
        (tmp_path / folder).mkdir()
        Image.fromarray(SMOOTH).save(tmp_path / folder / name)
    files = find_images([tmp_path / "images"]).files
    samples = list(samples_of(files, References(tmp_path / "references")))
    (batch,) = read_ahead(samples, device="cpu", batch_size=8)
    assert [sample.image.name for sample in samples] == [name]
    assert batch[0].image is not None
    torch.testing.assert_close(batch[0].image, batch[0].reference, **EXACT)


def test_batches_are_cut_by_their_decoded_size(tmp_path: Path) -> None:
    """A batch holds at most so many bytes, references included; what is larger is a batch of its own."""
    sides = [16, 16, 16, 16, 40, 16, 16]
    for index, side in enumerate(sides):
        Image.new("RGB", (side, side)).save(tmp_path / f"{index}.png")
    (tmp_path / "7.png").write_bytes(b"broken")
    files = find_images([tmp_path]).files
    size = 12 * 16 * 16
    (tmp_path / "empty").mkdir()
    nowhere = References(tmp_path / "empty")
    for references, limit in ((None, 2 * size), (References(tmp_path), 4 * size), (nowhere, 2 * size)):
        samples = samples_of(files, references)
        batches = list(read_ahead(samples, device="cpu", batch_size=3, batch_bytes=limit))
        assert [len(batch) for batch in batches] == [2, 2, 1, 3]
        assert [loaded.image is None for batch in batches for loaded in batch] == [False] * 7 + [True]
