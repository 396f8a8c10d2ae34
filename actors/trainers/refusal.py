"""What a worker tells the driver when trying again cannot help.

Worker groups start again after an exception, up to ``cluster.max_failures`` times. A broken sample too many or a loss
that is never finite would fail each time in the same way; the worker notes such an error in the run folder. So the
driver has it whichever role's group ends first, and a worker of another role that starts only then ends at once.
"""

from __future__ import annotations

import json
from pathlib import Path

from services import errors

_FILE = "refusal.json"
#: Errors of the user's making, and roles that disagree. A ServiceError or a CacheError may pass: those are tried again.
FINAL = (
    errors.ConfigError,
    errors.ModelError,
    errors.DataError,
    errors.ResumeError,
    errors.NonFiniteError,
    errors.BridgeError,
)


def clear(folder: Path) -> None:
    """Forget the refusal of an earlier run."""
    (folder / _FILE).unlink(missing_ok=True)


def note(folder: Path, error: Exception) -> None:
    """Write ``error`` down. Several ranks may; the last one stays."""
    path = folder / _FILE
    temporary = path.with_suffix(f".{id(error)}.tmp")
    temporary.write_text(json.dumps({"type": type(error).__name__, "message": str(error)}))
    temporary.replace(path)


def read(folder: Path) -> Exception | None:
    """The error that was noted, of its own class; None if there is none."""
    path = folder / _FILE
    if not path.exists():
        return None
    noted = json.loads(path.read_text())
    kind = getattr(errors, noted["type"], errors.ServiceError)
    return kind(noted["message"])
