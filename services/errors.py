"""Named exceptions of the whole project, by meaning, so that a caller can catch what it can handle.

``configs.ConfigError`` and ``models.ModelError`` are defined where they are raised (those packages import
nothing of ours) and are listed here with the rest, so that one tuple says what the command line turns into a
message without a traceback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from configs import ConfigError

if TYPE_CHECKING:
    from models.errors import ModelError, WeightsError

__all__ = [
    "USER_ERRORS",
    "BridgeError",
    "CacheError",
    "ConfigError",
    "DataError",
    "DeadlineError",
    "LoomError",
    "ModelError",
    "NonFiniteError",
    "PeerLostError",
    "PlacementError",
    "QuarantineLimitError",
    "ResumeError",
    "ServiceError",
    "WeightsError",
]


class LoomError(Exception):
    """Base of the errors of services and actors. The message says the value seen, what is allowed, what to do."""


class DataError(LoomError):
    """A file of a data set is missing, unreadable, or says something impossible. Names the file."""


class PackedError(DataError):
    """One of several conversations of a sample is broken, and the sample with it: ``culprit`` is the id that the
    conversation alone would have, which is what the quarantine should name.
    """

    def __init__(self, message: str, culprit: str) -> None:
        super().__init__(message)
        self.culprit = culprit


class QuarantineLimitError(DataError):
    """More samples broke than ``data.max_broken`` allows."""


class CacheError(LoomError):
    """The feature store cannot do what was asked (no space, no permission, wrong layout). Never a wrong record."""


class ServiceError(LoomError):
    """The feature service, or another actor, answered with a failure or not at all."""


class DeadlineError(ServiceError):
    """A remote call passed its deadline; the message says who waits for whom since when."""


class PeerLostError(DeadlineError):
    """A rank of another role stopped, ended, failed, or stays in a phase too long; says who waits for whom."""


class BridgeError(LoomError):
    """The two ends of an edge, or the roles of a run, disagree about what they are doing. Names both sides."""


class PlacementError(LoomError):
    """The resources that the roles ask for do not fit the cluster; raised before any actor exists."""


class ResumeError(LoomError):
    """A checkpoint is missing, torn, or belongs to another run."""


class NonFiniteError(LoomError):
    """A loss or a gradient is NaN or infinite more often than ``trainer.max_skipped_steps`` allows."""


#: What a user can cause: printed as a message, not as a traceback.
USER_ERRORS: tuple[type[Exception], ...]


def __getattr__(name: str) -> Any:
    # Later, because importing the models package imports torch, and the store's processes need none.
    if name in ("ModelError", "WeightsError"):
        from models import errors

        return getattr(errors, name)
    if name == "USER_ERRORS":
        from models.errors import ModelError

        return (LoomError, ConfigError, ModelError)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
