"""What can go wrong, as a tree; the service's own errors by the `code` of their problem+json.

LatentdError
|- Unreachable                no connection, or it broke
|- UnexpectedAnswer           an answer, but not one of latentd
|- InvalidInput               the request's own fault
|  |- MalformedBody, UnsupportedMedia, TooLarge, NotAcceptable
|  |- InvalidParameter, InvalidImage, InvalidLatent
|- Unauthorized, Forbidden    the key
|- UnknownModel, UnknownStream, UnsupportedCheckpoint, FamilyMismatch, ModelBusy, ModelExists, ModelKept
|- Overloaded, SlowBody
|- Unavailable                starting, ending, or the device is lost
|  |- ModelChanged            its file, while it was read
|  |- TooManyBytes            of all requests that are being read
|- DeadlineExceeded           the service's word, or the clock here
|- OutOfMemory, DiskFull, NonFiniteOutput, InternalError
"""

import email.utils
import time

import httpx

PROBLEM = "application/problem+json"


class LatentdError(Exception):
    """Base of all. Its text is the reason; the rest is None where nothing is known."""

    code: str | None = None

    def __init__(
        self,
        detail: str,
        *,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        retryable: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code or self.code
        self.request_id = request_id  # the service's log has the same
        self.retryable = retryable  # the same request may succeed later
        self.retry_after = retry_after  # seconds


class Unreachable(LatentdError):
    """No connection, or one that broke."""


class UnexpectedAnswer(LatentdError):
    """An answer that is not latentd's: another service, a proxy."""


class InvalidInput(LatentdError):
    """The request cannot be served as it stands."""

    code = "invalid_input"


class MalformedBody(InvalidInput):
    """The bytes are not what they begin as."""

    code = "malformed_body"


class UnsupportedMedia(InvalidInput):
    """Neither a picture nor an array that the service reads."""

    code = "unsupported_media"


class TooLarge(InvalidInput):
    """More bytes or pixels than the limits."""

    code = "too_large"


class NotAcceptable(InvalidInput):
    """The answer does not fit the type that was asked for."""

    code = "not_acceptable"


class InvalidParameter(InvalidInput):
    """A parameter out of its range."""

    code = "invalid_parameter"


class InvalidImage(InvalidInput):
    """A readable picture that cannot be encoded."""

    code = "invalid_image"


class InvalidLatent(InvalidInput):
    """Shape, channels, dtype or values do not fit the model."""

    code = "invalid_latent"


class Unauthorized(LatentdError):
    """A key is needed."""

    code = "unauthorized"


class Forbidden(LatentdError):
    """The key does not open this."""

    code = "forbidden"


class UnknownModel(LatentdError):
    """No such model; the text lists those that there are."""

    code = "unknown_model"


class UnknownStream(LatentdError):
    """Nobody looks on at a stream of that name."""

    code = "unknown_stream"


class UnsupportedCheckpoint(LatentdError):
    """The model's file is there, and cannot be used."""

    code = "unsupported_checkpoint"


class FamilyMismatch(LatentdError):
    """Latents of another family than the model's."""

    code = "family_mismatch"


class ModelBusy(LatentdError):
    """The model is in use, or pinned."""

    code = "model_busy"


class ModelExists(LatentdError):
    """A new model of a name that is taken."""

    code = "model_exists"


class ModelKept(LatentdError):
    """The model's files hold more than it, and are not deleted."""

    code = "model_kept"


class DiskFull(LatentdError):
    """The service's disk has no room for the file."""

    code = "disk_full"


class Overloaded(LatentdError):
    """The queue is full, or longer than the deadline."""

    code = "overloaded"


class SlowBody(LatentdError):
    """The request did not arrive in time."""

    code = "slow_body"


class Unavailable(LatentdError):
    """Starting, ending, or without a device."""

    code = "unavailable"


class ModelChanged(Unavailable):
    """The model's file was replaced while it was read."""

    code = "model_changed"


class TooManyBytes(Unavailable):
    """The service is reading as many bytes as it has room for."""

    code = "too_many_bytes"


class DeadlineExceeded(LatentdError):
    """The timeout passed, there or here."""

    code = "deadline_exceeded"


class OutOfMemory(LatentdError):
    """Does not fit the device, not even in the smallest plan."""

    code = "out_of_memory"


class NonFiniteOutput(LatentdError):
    """NaN or Inf in every precision."""

    code = "non_finite_output"


class InternalError(LatentdError):
    """A bug of the service; its log has it under `request_id`."""

    code = "internal_error"


def _below(kind: type[LatentdError]) -> list[type[LatentdError]]:
    return [kind, *(each for sub in kind.__subclasses__() for each in _below(sub))]


BY_CODE = {kind.code: kind for kind in _below(LatentdError) if kind.code is not None}


def error_of(response: httpx.Response, media: frozenset[str]) -> LatentdError | None:
    """What is wrong with an answer; None for a good one of these types."""
    came = response.headers.get("content-type", "").partition(";")[0].strip()
    if response.status_code in (httpx.codes.OK, httpx.codes.ACCEPTED) and came in media:
        return None
    retry_after = seconds(response.headers.get("retry-after"))
    try:
        problem = response.json() if came == PROBLEM else None
    except (ValueError, RecursionError):
        problem = None
    if not isinstance(problem, dict) or not problem.keys() >= {"code", "detail"}:
        expected = " or ".join(sorted(media)) or "no content"
        to = response.headers.get("location")  # not followed: a key is for one address
        got = f"{came or 'of no type'}" if to is None else f"to {to}"
        return UnexpectedAnswer(
            f"expected {expected}, got HTTP {response.status_code} {got}",
            status=response.status_code,
            retryable=response.status_code in (429, 502, 503, 504),  # what a proxy says of a service that restarts
            retry_after=retry_after,
        )
    code = str(problem.get("code", ""))
    return BY_CODE.get(code, LatentdError)(
        str(problem.get("detail", "")),
        status=response.status_code,
        code=code,
        request_id=str(problem.get("request_id", "")),
        retryable=problem.get("retryable") is True,
        retry_after=retry_after,
    )


def seconds(retry_after: str | None) -> float | None:
    """The header as seconds from now, which may be a date; None for anything else."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
