"""From what goes wrong to what a client is told: a status and OpenAI's error object."""

from __future__ import annotations

import re

import msgspec

from ..errors import DeadlineError, PeltonError, RequestError, TokenizerError
from .replicas import BusyError, UnavailableError
from .schemas import ErrorBody, ErrorResponse, encode

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class HttpError(Exception):
    """An answer that is an error.

    param: the field that is wrong. code: a word for programs. retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message, _TYPES.get(status, "server_error"), param, code)
        self.retry_after = retry_after

    def to_json(self) -> bytes:
        return encode(ErrorResponse(self.body))


_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.*?)`(?: - at `(.*)`)?$")
_MISSING_FIELD = re.compile(r"Object missing required field `(.*?)`(?: - at `(.*)`)?$")
_SHORT_NAMES = ("n", "seed", "stop", "temperature", "prompt", "logprobs")
_INVALID_VALUE = re.compile(r"Invalid (?:enum )?value (.*)")
_NO_VALUE = re.compile(r"Expected `null`, got .*")  # of a field that is listed because it is not supported
_PLACE = re.compile(r" - at `(.*)`$")


def http_error(error: BaseException) -> HttpError:
    """What a client is told of an exception."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, msgspec.ValidationError):
        return _validation(str(error))
    if isinstance(error, msgspec.DecodeError):
        return HttpError(400, f"the body is no valid JSON: {error}", code="invalid_json")
    if isinstance(error, RecursionError):
        return HttpError(400, "the body is nested too deeply", code="invalid_json")
    if isinstance(error, UnicodeDecodeError):
        return HttpError(400, "the body is no valid UTF-8", code="invalid_json")
    if isinstance(error, BusyError):
        return HttpError(429, str(error), code="queue_full", retry_after=1.0)
    if isinstance(error, UnavailableError):
        return HttpError(503, str(error), code="engine_unavailable", retry_after=2.0)
    if isinstance(error, DeadlineError):
        return HttpError(504, str(error), code="deadline")
    if isinstance(error, (RequestError, TokenizerError)):
        return HttpError(400, str(error), param=_param(str(error)), code="invalid_value")
    if isinstance(error, PeltonError):
        return HttpError(500, str(error), code="engine_error")
    return HttpError(500, f"a bug of the server ({type(error).__name__}); its log has more", code="internal_error")


def _validation(text: str) -> HttpError:
    """msgspec says ``Expected `int`, got `str` - at `$.max_tokens` ``."""
    for pattern, sentence, code in (
        (_UNKNOWN_FIELD, "the field {!r} is not supported", "unsupported_parameter"),
        (_MISSING_FIELD, "the field {!r} is missing", "missing_required_parameter"),
    ):
        found = pattern.match(text)
        if found:
            name = f"{_path(found[2])}.{found[1]}".lstrip(".")
            return HttpError(400, sentence.format(name), param=name, code=code)
    place = _PLACE.search(text)
    if place is None:
        return HttpError(400, text[:1].lower() + text[1:], code="invalid_type")
    name = _path(place[1])
    what = _INVALID_VALUE.sub(r"\1 is not supported", text[: place.start()])
    what = _NO_VALUE.sub("not supported; leave it out", what)
    return HttpError(400, f"{name or 'the body'}: {what}", param=name or None, code="invalid_type")


def _path(place: str | None) -> str:
    return (place or "").removeprefix("$").lstrip(".")


def _param(text: str) -> str | None:
    """Pelton's lines about a field start with its name."""
    found = re.match(r"([a-z_]+) (?:is|of|holds|names|has)\b", text)
    return found[1] if found and ("_" in found[1] or found[1] in _SHORT_NAMES) else None
