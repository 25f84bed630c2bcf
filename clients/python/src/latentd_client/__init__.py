"""The client of latentd: pictures to VAE latents and back, on another machine."""

from typing import TYPE_CHECKING, Any

from latentd_client.aio import AsyncClient
from latentd_client.client import Client
from latentd_client.errors import (
    DeadlineExceeded,
    DiskFull,
    FamilyMismatch,
    Forbidden,
    InternalError,
    InvalidImage,
    InvalidInput,
    InvalidLatent,
    InvalidParameter,
    LatentdError,
    MalformedBody,
    ModelBusy,
    ModelChanged,
    ModelExists,
    ModelKept,
    NonFiniteOutput,
    NotAcceptable,
    OutOfMemory,
    Overloaded,
    SlowBody,
    TooLarge,
    TooManyBytes,
    Unauthorized,
    Unavailable,
    UnexpectedAnswer,
    UnknownModel,
    UnknownStream,
    Unreachable,
    UnsupportedCheckpoint,
    UnsupportedMedia,
)
from latentd_client.results import Compared, Comparison, Decoded, Encoded, Model, Statistics

if TYPE_CHECKING:
    from latentd_client.remote_vae import RemoteVAE as RemoteVAE

__all__ = [
    "AsyncClient",
    "Client",
    "Compared",
    "Comparison",
    "DeadlineExceeded",
    "Decoded",
    "DiskFull",
    "Encoded",
    "FamilyMismatch",
    "Forbidden",
    "InternalError",
    "InvalidImage",
    "InvalidInput",
    "InvalidLatent",
    "InvalidParameter",
    "LatentdError",
    "MalformedBody",
    "Model",
    "ModelBusy",
    "ModelChanged",
    "ModelExists",
    "ModelKept",
    "NonFiniteOutput",
    "NotAcceptable",
    "OutOfMemory",
    "Overloaded",
    "SlowBody",
    "Statistics",
    "TooLarge",
    "TooManyBytes",
    "Unauthorized",
    "Unavailable",
    "UnexpectedAnswer",
    "UnknownModel",
    "UnknownStream",
    "Unreachable",
    "UnsupportedCheckpoint",
    "UnsupportedMedia",
]


def __getattr__(name: str) -> Any:
    """RemoteVAE, which alone needs torch and diffusers, and brings them when it is asked for."""
    if name == "RemoteVAE":
        from latentd_client.remote_vae import RemoteVAE

        return RemoteVAE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
