"""Find image files, pair them with their references, and read them without loss."""

import io
import os
import re
import stat
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

# Still images of pixels. Left out on purpose: documents and vector graphics (EPS would run Ghostscript), video, icons
# and textures (several images in one file), layered files, and formats that Pillow recognises and cannot decode.
FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "QOI", "SGI", "SUN", "PCX",
    "MSP", "XBM", "TGA",
)  # fmt: skip
# Of these formats and, from ".heic" on, of images that are not read: they are found all the same, so that reading says
# why they have no score.
SUFFIXES = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".avif", ".avifs", ".tif", ".tiff", ".bmp",
    ".dib", ".gif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".qoi",
    ".sgi", ".bw", ".rgb", ".rgba", ".ras", ".pcx", ".msp", ".xbm", ".tga", ".icb", ".vda", ".vst", ".heic", ".heif",
    ".hif", ".jxl", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".pcd", ".psd",
    ".xpm", ".dds", ".blp", ".ftc", ".ftu", ".ico", ".icns", ".cur", ".im",
))  # fmt: skip
_UNKNOWN_WHITE = "its integers are signed or of 32 bits, and their white is unknown. Scale them to 8 or 16 bits"
_PHOTOMETRIC, _BITS_PER_SAMPLE, _PLANAR, _ORIENTATION = 262, 258, 284, 274  # TIFF and EXIF tags
_DEEP = re.compile("(LA|RGB|RGBX|RGBA);16[BLN]")
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


class UnreadableImageError(ValueError):
    """A file that cannot be read as one still image.

    Attributes:
        file: Its path, or "image" for the content of a file.
        reason: Why, without the path.
    """

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class ImageFiles(NamedTuple):
    """What a search found.

    Attributes:
        files: File -> its path relative to the folder that was searched.
        problems: Folder that could not be searched, dangling link or special file -> the reason.
    """

    files: dict[Path, Path]
    problems: dict[Path, str]


def find_images(paths: Sequence[str | Path]) -> ImageFiles:
    """Image files under files, folders and globs.

    Folders are searched with all folders inside; links to folders are followed, each folder once. Other files are left
    out by their suffix, whatever its case, and so is what macOS adds to an image as `._name`.

    Args:
        paths: Files (any suffix), folders, or globs (`**` = any number of folders).

    Returns:
        The files, sorted within each argument, without repetitions; and what could not be searched: folders without
        permission, links that lead nowhere, and things named like an image that are not files. Relative paths start at
        the folder, for a glob at the `**`, else they are the name alone.

    Raises:
        ValueError: An argument matches no images.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (4, 4)).save(f"{folder}/DSC1.JPG")
        ...     [str(relative) for relative in find_images([folder]).files.values()]
        ['DSC1.JPG']
    """
    found: dict[tuple[str, str], tuple[Path, Path]] = {}
    problems: dict[Path, str] = {}
    for argument in paths:
        own: dict[Path, str] = {}
        files = sorted(_expand(argument, own), key=lambda item: item[0].parts)
        for file, relative in files:  # one file in one folder, by whatever links it was reached
            found.setdefault((os.path.realpath(file.parent), file.name), (file, relative))
        if not files:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in own.items())
            raise ValueError(
                f"'{argument}' matches no images: "
                f"{reasons or 'no file there has the suffix of an image, such as .png, .jpg or .tif'}."
            )
        problems |= own
    return ImageFiles(dict(found.values()), problems)


def _expand(argument: str | Path, problems: dict[Path, str]) -> Iterator[tuple[Path, Path]]:
    path, parts = Path(argument), Path(argument).parts
    if path.is_file():
        yield path, Path(path.name)
    elif path.is_dir() or not has_magic(str(argument)):
        yield from _walk(path, ("**", "*"), problems)
    else:
        start = next(place for place, part in enumerate(parts) if has_magic(part))
        top, patterns = Path(*parts[:start]), parts[start:]
        for file, relative in _walk(top, patterns, problems, hidden=False):
            fixed = patterns.index("**") if "**" in patterns else -1
            yield file, Path(*relative.parts[fixed:])


def _walk(
    top: Path, patterns: Sequence[str], problems: dict[Path, str], *, hidden: bool = True
) -> Iterator[tuple[Path, Path]]:
    """Image files under a folder that match a glob. Links to folders come last: a file is found under its own path."""
    seen: set[str] = set()
    folders, links = [top], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(folder.iterdir())
        except FileNotFoundError:
            problems[folder] = "there is no such file or folder"
            continue
        except OSError as error:
            problems[folder] = f"the folder cannot be searched ({error.strerror})"
            continue
        for entry in entries:
            relative = entry.relative_to(top)
            if not _matches(relative.parts, patterns, hidden):
                continue
            known = entry.suffix.lower() in SUFFIXES and not entry.name.startswith("._")
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                if known or not entry.suffix:  # an image, or a folder
                    problems[entry] = "a link that leads nowhere" if os.path.islink(entry) else str(error.strerror)
                continue
            if stat.S_ISDIR(mode):
                (links if entry.is_symlink() else folders).append(entry)
            elif known and not stat.S_ISREG(mode):
                problems[entry] = "not a regular file"
            elif known and _matches(relative.parts, patterns, hidden, whole=True):
                yield entry, relative


def _matches(names: Sequence[str], patterns: Sequence[str], hidden: bool, *, whole: bool = False) -> bool:
    """Whether the parts of a path match a glob or, if not `whole`, may be the first parts of one that does."""
    if not names:
        return not whole or set(patterns) <= {"**"}
    if not patterns:
        return False
    if patterns[0] == "**" and _matches(names, patterns[1:], hidden, whole=whole):
        return True
    if names[0].startswith(".") and not (hidden or patterns[0].startswith(".")):
        return False  # as in a shell and in `glob`
    if patterns[0] == "**":
        return _matches(names[1:], patterns, hidden, whole=whole)
    return fnmatchcase(names[0], patterns[0]) and _matches(names[1:], patterns[1:], hidden, whole=whole)


class References:
    """The references of images: a folder with the same relative paths and any image suffix, or one file for all.

    Args:
        path: Folder or file.

    Raises:
        ValueError: There is neither.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._listed: dict[Path, dict[str, list[Path]]] = {}
        if not self._path.exists():
            raise ValueError(f"{path}: no such folder or file of references.")

    def find(self, relative: Path) -> Path:
        """The reference of an image.

        Args:
            relative: Path of the image, as `find_images` gives it.

        Raises:
            FileNotFoundError: There is none.
            ValueError: There are several that differ only in their suffix.
        """
        if self._path.is_file():
            return self._path
        exact = self._path / relative
        if exact.is_file():
            return exact
        folder = exact.parent
        if folder not in self._listed:
            by_stem: dict[str, list[Path]] = {}
            for file in sorted(folder.iterdir()) if folder.is_dir() else ():
                if file.suffix.lower() in SUFFIXES and file.is_file():
                    by_stem.setdefault(file.stem, []).append(file)
            self._listed[folder] = by_stem
        candidates = self._listed[folder].get(exact.stem, [])
        if not candidates:
            raise FileNotFoundError(f"no reference {exact} (with any image suffix)")
        if len(candidates) > 1:
            names = ", ".join(file.name for file in candidates)
            raise ValueError(f"several references in {folder}: {names}. Keep one.")
        return candidates[0]


@contextmanager
def open_image(source: str | Path | bytes, *, formats: Sequence[str] = FORMATS) -> Generator[ImageFile.ImageFile]:
    """A file with its header read and no pixel decoded, for its size and format.

    Args:
        source: Path, or the content of a file.
        formats: Pillow's names of the formats to take.

    Raises:
        UnreadableImageError: Whatever Pillow raises, also within the `with` block; an animation; or pixels that cannot
            be read without loss.

    Example:
        >>> content = io.BytesIO()
        >>> Image.new("RGB", (6, 4), "red").save(content, "PNG")
        >>> with open_image(content.getvalue()) as image:
        ...     image.format, image.size
        ('PNG', (6, 4))
    """
    file = "image" if isinstance(source, bytes) else str(source)
    try:
        with _open(source, formats) as image:
            if problem := _problem(image, source):
                raise UnreadableImageError(file, problem)
            yield image
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders raise anything: RuntimeError, SyntaxError, struct.error, MemoryError, ...
        raise _unreadable(error, file) from error


def _open(source: str | Path | bytes, formats: Sequence[str]) -> ImageFile.ImageFile:
    Image.init()
    known = [name for name in formats if name in Image.OPEN]  # AVIF is an option of Pillow's build
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=known)


def _unreadable(error: Exception, file: str) -> UnreadableImageError:
    if isinstance(error, UnidentifiedImageError):
        return UnreadableImageError(file, "it is empty, damaged, or of a kind that is not read")
    reason = error.strerror if isinstance(error, OSError) else None
    return UnreadableImageError(file, reason or str(error) or type(error).__name__)


def _problem(image: ImageFile.ImageFile, source: str | Path | bytes) -> str:
    """Why the file, judged by its header, is not one still image that can be read without loss; empty if it is."""
    frames = getattr(image, "n_frames", 1)
    if frames != 1 and image.format != "MPO":  # an MPO's first frame is what any JPEG reader shows; others are previews
        return f"it holds {frames} frames or pages. Save the one you mean as a file of its own"
    bits, tags = _bits(image, source), getattr(image, "tag_v2", {})
    if image.mode in (*_SIXTEEN_BIT_MODES, "F"):
        if tags.get(_PHOTOMETRIC) == 0 or (image.format in ("TIFF", "JPEG2000") and 8 < bits < 16):
            return f"its white is not at the maximum of {bits} bits as Pillow reads it. Convert it to PNG"
    elif bits > 8 and image.mode != "I" and not _deep_rawmode(image):
        return f"Pillow would cut its {bits} bits to 8. Convert it to PNG, which is read with 16 bits"
    return "" if image.mode != "I" or image.format == "PPM" else _UNKNOWN_WHITE


def _bits(image: ImageFile.ImageFile, source: str | Path | bytes) -> int:
    """Bits of a sample as stored."""
    tile, tags = image.tile[0] if image.tile else None, getattr(image, "tag_v2", {})
    args = (tile.args if tile else "") or ""
    if image.format == "TIFF":
        return max(tags.get(_BITS_PER_SAMPLE, (1,)))
    if image.format == "PPM" and tile and tile.codec_name in ("ppm", "ppm_plain"):
        return int(args[-1]).bit_length()  # the largest value
    if image.format == "SGI" and tile:
        return 16 if tile.codec_name == "SGI16" or (tile.codec_name == "sgi_rle" and args[-1] == 2) else 8
    if image.format in ("JPEG2000", "AVIF"):  # Pillow does not tell
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        if image.format == "AVIF":
            flags = (content.partition(b"av1C")[2] + bytes(3))[2]
            return 8 if not flags & 0x40 else 12 if flags & 0x20 else 10
        header = content.partition(b"\xff\x4f\xff\x51")[2]  # the first marker: sizes, and 3 bytes for each component
        depths = header[38 : 38 + 3 * int.from_bytes(header[36:38]) : 3]
        return max(((depth & 0x7F) + 1 for depth in depths), default=8)
    return 16 if _rawmode(args).endswith("16B") else 8


def read_image(source: str | Path | bytes, *, formats: Sequence[str] = FORMATS) -> np.ndarray:
    """The pixels of a file as stored, upright: EXIF rotation is applied, ICC profiles are not.

    Args:
        source: Path, or the content of a file.
        formats: Pillow's names of the formats to take.

    Returns:
        `[H, W]` (grey), `[H, W, 3]` (RGB) or `[H, W, 4]` (RGB and opacity), uint8 or uint16, or float32 as stored in
        TIFF and PFM. CMYK, YCbCr, LAB and palettes are converted by Pillow.

    Raises:
        UnreadableImageError: A file that is missing, damaged, of another format or too large for Pillow; an animation;
            integers without a known white, or more bits than can be read without loss.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
        ...     Image.new("RGB", (6, 4), "red").save(file.name)
        ...     read_image(file.name).shape
        (4, 6, 3)
    """
    with open_image(source, formats=formats) as image:
        rawmode = _deep_rawmode(image) if _bits(image, source) > 8 else ""
        if not rawmode:
            return to_array(image)
        if rawmode.startswith("LA"):  # four bytes a pixel: two for grey, two for opacity
            return _samples(source, formats, "RGBA").view(">u2").astype(np.uint16)[..., [0, 0, 0, 1]]
        high = _samples(source, formats, rawmode).astype(np.uint16)
        low = _samples(source, formats, rawmode[:-1] + _OTHER_ORDER[rawmode[-1]])
        return _with_key(high << 8 | low, image.info.get("transparency"))


def _rawmode(args: object) -> str:
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _deep_rawmode(image: ImageFile.ImageFile) -> str:
    """How Pillow unpacks a file of 16-bit colours, where `_samples` can get at both of their bytes; else empty."""
    tile = image.tile[0] if image.tile else None
    if tile is None or getattr(image, "tag_v2", {}).get(_PLANAR) == 2:
        return ""
    if image.mode == "RGB" and tile.codec_name == "ppm" and tile.args == ("RGB", 65535):
        return "RGB;16B"
    rawmode = _rawmode(tile.args)
    return rawmode if image.format in ("PNG", "TIFF") and _DEEP.fullmatch(rawmode) else ""


def _samples(source: str | Path | bytes, formats: Sequence[str], rawmode: str) -> np.ndarray:
    """One byte of each sample.

    Pillow keeps the first byte of big-endian samples and the second of little-endian ones. Told the other order than
    the file's, it keeps the lower bytes.
    """
    with _open(source, formats) as image:
        image.info.pop("transparency", None)
        for place, tile in enumerate(image.tile):
            if tile.codec_name == "ppm":
                image.tile[place] = tile._replace(codec_name="raw", args=(rawmode, 0, 1))
            else:
                image.tile[place] = tile._replace(
                    args=rawmode if isinstance(tile.args, str) else (rawmode, *(tile.args or ())[1:])
                )
        return to_array(image)


def to_array(image: Image.Image) -> np.ndarray:
    """The pixels of a PIL image, upright.

    Returns:
        As `read_image`; of a file that Pillow opened, what Pillow makes of it: 16-bit colours are cut to 8 bits.

    Raises:
        UnreadableImageError: The image is opened from a file that cannot be decoded.
        TypeError: 32-bit integers, which have no known white.
    """
    deep = image.mode in _SIXTEEN_BIT_MODES or (image.mode == "I" and image.format == "PPM")
    try:
        image.load()
        if image.getexif().get(_ORIENTATION, 1) != 1:  # else this would be a copy
            image = ImageOps.exif_transpose(image)
    except Exception as error:
        raise _unreadable(error, str(getattr(image, "filename", "")) or "image") from error
    if deep:
        return _with_key(np.asarray(image).astype(np.uint16), image.info.get("transparency"))
    if image.mode == "I":
        raise TypeError(f"a PIL image of mode 'I' cannot be read: {_UNKNOWN_WHITE}.")
    if image.mode in ("F", "L", "RGB", "RGBA") and "transparency" not in image.info:
        return np.asarray(image)
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if transparent else "RGB"))


def _with_key(samples: np.ndarray, key: int | tuple[int, ...] | None) -> np.ndarray:
    """16-bit samples with the opacity that a PNG's transparent colour gives them."""
    if key is None:
        return samples
    colors = samples if samples.ndim == 3 else samples[..., None].repeat(3, 2)
    opacity = np.where((colors == key).all(2, keepdims=True), 0, 65535).astype(np.uint16)
    return np.concatenate([colors, opacity], 2)
