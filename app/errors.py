"""The errors of the service, as a tree. No status codes here: `api/errors.py` has the one table.

ServiceError
|- InvalidInput               the request's own fault
|  |- MalformedBody           the bytes are not what they claim to be
|  |- UnsupportedMedia        neither a picture nor an array that we read
|  |- InvalidParameter        a query parameter, or a combination of them
|  |- InvalidImage            a readable picture that cannot be encoded
|  |- InvalidLatent           shape, channels, dtype or values do not fit the model
|  |- TooLarge                bytes or pixels over a limit
|  |- NotAcceptable           no type in Accept can carry the answer
|- UnknownModel               names the known ones
|- FamilyMismatch             a latent that names another family than the model's
|- ModelBusy                  pinned, or in use, where the call needs it idle
|- ModelExists                a new model of a name that is taken
|- ModelKept                  its files hold more than it, and are not deleted
|- DiskFull                   a new model that the disk has no room for
|- UnsupportedCheckpoint      the file is there, but it is not an autoencoder that we know
|- Overloaded                 the queue is full, or the deadline cannot be met; says when to come back
|- DeadlineExceeded           the deadline passed before the answer was there
|- Unavailable                starting, draining, or the device is lost
|  |- TooManyBytes            the requests in flight hold all the memory that there is for bodies
|- OutOfMemory                does not fit, not even in the smallest plan
|- NonFiniteOutput            NaN or Inf in every precision that was allowed
"""


class ServiceError(Exception):
    """Base of all: its text is written for the caller and names what was expected and what came."""


class InvalidInput(ServiceError):
    """The request cannot be served as it stands."""


class MalformedBody(InvalidInput):
    """The body's bytes do not parse as the format that they begin as."""


class UnsupportedMedia(InvalidInput):
    """The body begins like no format that is read here."""


class InvalidParameter(InvalidInput):
    """A parameter out of its range, or two that exclude each other."""


class InvalidImage(InvalidInput):
    """A picture of a size or kind that cannot be encoded."""


class InvalidLatent(InvalidInput):
    """An array whose shape, channels, dtype or values do not fit the model."""


class TooLarge(InvalidInput):
    """More bytes or pixels than the limits allow."""


class NotAcceptable(InvalidInput):
    """No type that the client accepts can carry this answer."""


class UnknownModel(ServiceError):
    """No model of that name or hash."""


class FamilyMismatch(ServiceError):
    """The latent says which family it is of, and it is not the model's."""


class ModelBusy(ServiceError):
    """The model is pinned or in use, and the call needs it to be neither."""


class ModelExists(ServiceError):
    """A model of that name is there already, or on its way."""


class ModelKept(ServiceError):
    """The model's files hold more than it: they are not deleted through the service."""


class DiskFull(ServiceError):
    """The models folder's disk has no room for the file."""


class UnsupportedCheckpoint(ServiceError):
    """A file that cannot be read as an autoencoder, with the reason."""


class Overloaded(ServiceError):
    """Refused at the door; `retry_after` seconds from now there should be room."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(ServiceError):
    """The caller's deadline passed while the job was queued or computed."""


class Unavailable(ServiceError):
    """Not now: starting, draining, or without a working device."""


class TooManyBytes(Unavailable):
    """The bodies, pictures and answers in flight leave no room for this one."""


class OutOfMemory(ServiceError):
    """Not even the smallest plan fits the device."""


class NonFiniteOutput(ServiceError):
    """The output has NaN or Inf in every precision that was allowed."""
