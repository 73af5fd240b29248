"""Find image files and the references that belong to them."""

from collections.abc import Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".avif"})


def find_images(paths: Sequence[str]) -> dict[Path, Path]:
    """Image files under files, folders and globs, each with its path relative to the argument that brought it.

    Args:
        paths: files (any suffix), folders (searched recursively for known suffixes), or globs (`**` is recursive).

    Returns:
        file -> relative path, in sorted order within each argument, without repetitions.

    Raises:
        ValueError: an argument brings no image.
    """
    found: dict[Path, Path] = {}
    for argument in paths:
        files = list(_expand(argument))
        for file, relative in files:
            found.setdefault(file, relative)
        if not files:
            raise ValueError(
                f"{argument!r} brings no image: no such file, or a folder or glob without any of "
                f"{', '.join(sorted(SUFFIXES))}."
            )
    return found


def _expand(argument: str) -> Iterator[tuple[Path, Path]]:
    path = Path(argument)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in SUFFIXES and file.is_file():
                yield file, file.relative_to(path)
    elif path.is_file():
        yield path, Path(path.name)
    elif has_magic(argument):
        for match in sorted(glob(argument, recursive=True)):
            if Path(match).suffix.lower() in SUFFIXES and Path(match).is_file():
                yield Path(match), Path(Path(match).name)


def find_reference(folder: Path, relative: Path) -> Path:
    """The reference of an image: the same relative path, or the same with another image suffix.

    Raises:
        FileNotFoundError: there is none.
    """
    exact = folder / relative
    if exact.is_file():
        return exact
    for suffix in sorted(SUFFIXES):
        if (candidate := exact.with_suffix(suffix)).is_file():
            return candidate
    raise FileNotFoundError(f"no reference {exact} (with any image suffix)")
