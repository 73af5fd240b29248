"""Picture files as a form, for curl: `-F reward=ssim -F images=@a.png -F references=@b.png`."""

import asyncio
import math

from fastapi import Request
from starlette.datastructures import FormData, UploadFile

from iqareward.serving.errors import ServiceError
from iqareward.serving.pictures import decode_pairs
from iqareward.serving.settings import Settings
from iqareward.serving.wire import ScoreRequest

FIELDS = ("reward", "images", "references", "prompts", "deadline")
MAX_FIELD_BYTES = 64 * 1024  # of one text


async def read_form(request: Request, settings: Settings) -> ScoreRequest:
    """The request in a multipart form.

    Fields, which may be repeated: `reward` (a name), `images` (a PNG or lossless WebP file), `references` (one for each
    image), `prompts` (one for each image); and `deadline` (seconds) once.

    Raises:
        ServiceError: a field that is missing, unknown, or of the wrong kind; pictures that cannot be taken.
    """
    most = settings.limits.max_images
    async with request.form(max_files=2 * most, max_fields=2 * most, max_part_size=MAX_FIELD_BYTES) as form:
        unknown = set(form) - set(FIELDS)
        if unknown:
            raise _bad(f"expected the fields {', '.join(FIELDS)}, got also {sorted(unknown)!r:.200}.")
        rewards, prompts, deadlines = (_texts(form, name) for name in ("reward", "prompts", "deadline"))
        images, references = [await _files(form, name) for name in ("images", "references")]
    if not rewards or len(set(rewards)) < len(rewards):
        raise _bad("expected at least one field `reward`, each name once.")
    if prompts and len(prompts) != len(images):
        raise _bad(f"expected one of `prompts` per image ({len(images)}), got {len(prompts)}.")
    pictures, truths = await asyncio.to_thread(
        decode_pairs,
        images,
        references,
        settings.limits,
        request.scope["iqareward.memory"],
        allow_lossy=settings.jpeg == "always",
    )
    return ScoreRequest(tuple(rewards), pictures, truths, tuple(prompts) or None, _deadline(deadlines))


def _texts(form: FormData, name: str) -> list[str]:
    values = form.getlist(name)
    if not all(isinstance(value, str) for value in values):
        raise _bad(f"expected `{name}` as text, got a file.")
    return [str(value) for value in values]


async def _files(form: FormData, name: str) -> list[bytes]:
    values = form.getlist(name)
    if not all(isinstance(value, UploadFile) for value in values):
        raise _bad(f"expected `{name}` as files (curl: -F {name}=@picture.png), got text.")
    return [await value.read() for value in values if isinstance(value, UploadFile)]


def _deadline(values: list[str]) -> float | None:
    if not values:
        return None
    try:
        seconds = float(values[0])
    except ValueError:
        seconds = math.nan
    if len(values) > 1 or not 0 < seconds < math.inf:
        raise _bad("expected `deadline` once, as a positive number of seconds.")
    return seconds


def _bad(message: str) -> ServiceError:
    return ServiceError(422, "bad_form", message)
