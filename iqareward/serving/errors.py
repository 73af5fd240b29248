"""The one error of the server, and how it looks on the wire."""

from fastapi import Response

from iqareward.serving.wire import WireError, encode_error


class ServiceError(Exception):
    """A request that is answered with an error; the message goes to the client.

    Args:
        status: of the HTTP response.
        code: machine-readable reason, e.g. `"unknown_reward"`.
        message: what was expected, what came, what to do.
        index: position of the image at fault, where one is.
        retry_after: seconds after which the same request may succeed; None = it will not.
    """

    def __init__(
        self, status: int, code: str, message: str, *, index: int | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.index, self.retry_after = index, retry_after

    def headers(self) -> dict[str, str]:
        """Response headers that belong to the error."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def error_response(error: ServiceError | WireError) -> Response:
    """`{"error": {"code", "message", "index"?}}` with the error's status."""
    body = encode_error(error.code, error.message, error.index)
    headers = error.headers() if isinstance(error, ServiceError) else {}
    return Response(body, error.status, headers, media_type="application/json")
