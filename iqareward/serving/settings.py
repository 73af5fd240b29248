"""What a server accepts and how long it tries; the same for every reward that it serves."""

from dataclasses import dataclass, field
from typing import Literal

from iqareward.serving.http_client import checked_token
from iqareward.serving.wire import Limits


@dataclass(frozen=True)
class Settings:
    """What the front of the server enforces.

    Args:
        limits: of one request.
        max_inflight_bytes: of all requests that one front process is reading or scoring; the bytes of encoded pictures
            and of their pixels both count.
        max_inflight_requests: that one front process is reading or scoring; it mostly waits. As many
            requests without a body may be under way beside these.
        deadline: seconds from arrival to answer; a request may ask for less, not for more.
        jpeg: where JPEG and lossy WebP are taken. `"legacy"` = by the dialects of other code bases only, whose clients
            send nothing else; `"never"` = nowhere, which makes those clients fail until they send PNG; `"always"`.
        token: what clients must send; None = anyone who can reach the port may use it.
    """

    limits: Limits = field(default_factory=Limits)
    max_inflight_bytes: int = 2 * 2**30
    max_inflight_requests: int = 1024
    deadline: float = 120.0
    jpeg: Literal["never", "legacy", "always"] = "legacy"
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.deadline > 0:
            raise ValueError(f"Settings expected `deadline` > 0 seconds, got {self.deadline}.")
        if self.jpeg not in ("never", "legacy", "always"):
            raise ValueError(f'Settings expected `jpeg` "never", "legacy" or "always", got {self.jpeg!r}.')
        if self.max_inflight_bytes < 2 * self.limits.max_bytes:
            raise ValueError(
                f"Settings expected `max_inflight_bytes` >= {2 * self.limits.max_bytes}, twice `limits.max_bytes` "
                f"because a request may hold files and their pixels, got {self.max_inflight_bytes}."
            )
        if self.token is not None:
            object.__setattr__(self, "token", checked_token(self.token, "Settings"))
