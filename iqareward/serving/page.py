"""The page of the server on which people drop images and see their scores."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import Response

_HTML = files("iqareward.serving").joinpath("page.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """What a content security policy calls the blocks of the page: only they apply, whatever else gets into it."""
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", _HTML, re.S)
    digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}; img-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page() -> Response:
    """The page, the same for everyone: what it shows it asks the server for, with the token that is typed into it."""
    return Response(_HTML, headers=_HEADERS, media_type="text/html")
