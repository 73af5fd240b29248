"""What the OpenAPI document says of bodies and answers that no signature shows."""

from typing import Any, TypeAlias

DESCRIPTION = (
    "Image-quality rewards over HTTP. Scores are higher for better images; null means not scored. Every error is "
    "`{error: {code, message, index?}}`, `index` being the image at fault; 429 and 503 may be sent again after "
    "`Retry-After` seconds."
)
_NUMBERS: dict[str, Any] = {"type": "array", "items": {"type": ["number", "null"]}}
_BINARY = {"type": "string", "format": "binary"}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": required | (optional or {})}


_ERROR = _object(
    {"error": _object({"code": {"type": "string"}, "message": {"type": "string"}}, {"index": {"type": "integer"}})}
)
_REASONS = {
    400: "Not a request in this format",
    401: "Token missing or wrong",
    404: "No such reward",
    409: "The reward is asleep",
    411: "No Content-Length",
    413: "Too large",
    415: "A kind of body or picture that is not taken",
    422: "Well formed, but cannot be scored",
    429: "Too busy; retry after `Retry-After` seconds",
    500: "The reward failed",
    503: "No process of the reward is running; retry after `Retry-After` seconds",
    504: "Not within the deadline",
}
Responses: TypeAlias = dict[int | str, dict[str, Any]]


def _errors(content: dict[str, Any], *without: int) -> Responses:
    """All errors in one form, but for those that cannot happen."""
    reasons = {status: reason for status, reason in _REASONS.items() if status not in without}
    return {status: {"description": reason, "content": content} for status, reason in reasons.items()}


_ERRORS = _errors(_json(_ERROR))

SCORE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/x-safetensors": {"schema": _BINARY},
            "multipart/form-data": {
                "schema": _object(
                    {"reward": {"type": "string"}, "images": {"type": "array", "items": _BINARY, "minItems": 1}},
                    {
                        "references": {"type": "array", "items": _BINARY},
                        "prompts": {"type": "array", "items": {"type": "string"}},
                        "deadline": {"type": "number", "exclusiveMinimum": 0},
                    },
                )
            },
        },
    }
}
SCORE_RESPONSES: Responses = _ERRORS | {
    200: {
        "description": "Scores of every image, by reward",
        "content": _json(
            _object(
                {
                    "scores": {"type": "object", "additionalProperties": _NUMBERS},
                    "components": {
                        "type": "object",
                        "additionalProperties": {"type": "object", "additionalProperties": _NUMBERS},
                    },
                    "timings": {"type": "object", "additionalProperties": {"type": "number"}},
                }
            )
        ),
    }
}
REWARDS_RESPONSES: Responses = {
    200: {
        "description": "Facts of the rewards by name, and the limits",
        "content": _json(_object({"rewards": {"type": "object"}, "limits": {"type": "object"}})),
    },
    401: _ERRORS[401],
}
SLEEP_RESPONSES: Responses = {
    200: {
        "description": "Every process of the reward has done so, after the calls that came before",
        "content": _json(_object({"asleep": {"type": "boolean"}})),
    },
    **{status: _ERRORS[status] for status in (401, 404, 411, 413, 415, 429, 503, 504)},
}
_HEALTH = _json(_object({"status": {"enum": ["ok", "degraded"]}, "rewards": {"type": "object"}}))
HEALTH_RESPONSES: Responses = {
    200: {"description": "Every reward can be scored, or sleeps", "content": _HEALTH},
    503: {"description": "Some cannot", "content": _HEALTH},
}
METRICS_RESPONSES: Responses = {
    200: {"description": "Prometheus's text format", "content": {"text/plain": {"schema": {"type": "string"}}}},
    401: _ERRORS[401],
    503: _ERRORS[503],
}

PICKLE_BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/octet-stream": {"schema": _BINARY}}}
}
_PICKLE = {"application/octet-stream": {"schema": _BINARY}}
PICKLE_RESPONSES: Responses = _errors(_PICKLE | _json(_ERROR), 500) | {
    200: {"description": "Scores", "content": _PICKLE}
}

_BASE64 = {"type": "array", "items": {"type": "string"}, "minItems": 1}
FLOW_FACTORY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": _json(
            _object(
                {"image": _BASE64},
                {
                    "prompt": {"type": ["array", "null"], "items": {"type": "string"}},
                    "condition_images": {"type": ["array", "null"], "items": _BASE64},
                },
            )
        ),
    }
}
_LEGACY_ERROR = {"oneOf": [_object({"error": {"type": "string"}}), _ERROR]}
FLOW_FACTORY_RESPONSES: Responses = _errors(_json(_LEGACY_ERROR), 500) | {
    200: {
        "description": "Scores",
        "content": _json(_object({"rewards": {"type": "array", "items": {"type": "number"}}})),
    }
}
_STATE = _json(_object({"status": {"type": "string"}}))
FLOW_FACTORY_HEALTH: Responses = {
    200: {"description": "The reward can be scored", "content": _STATE},
    401: _ERRORS[401],
    404: _ERRORS[404],
    503: {"description": "It cannot", "content": _STATE},
}
