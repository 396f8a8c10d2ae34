"""The end of a process group, so that no thread of gloo is at work when the interpreter ends.

A thread of gloo lets go of a collective's tensors after the rank has gone on. When that is the interpreter's end, it
asks for a lock that is gone, and the process aborts ("terminate called without an active exception"). The threads end
with their group, and a group ends when nobody holds it, which ``destroy_process_group`` alone does not see to. Where
torch's own caches still hold one (FSDP2), its threads stay, idle; they are waited for until they are.
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch.distributed as dist

_HOLDERS = ("torch.distributed", "deepspeed")
"""Packages whose modules hold groups: as defaults of arguments, where they are imported after the group was made
(torch.distributed.nn), and in variables of their own."""
_TASKS = Path("/proc/self/task")
_LOOK_S, _PATIENCE_S, _OFTEN = 0.005, 5.0, 3


def close_groups() -> None:
    """End the default group of this process, and those made beside it, when all have made their last collective.

    Nothing may be holding them any more (a sharded module, a device mesh); without a group nothing happens.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    for name, module in list(sys.modules.items()):
        if name.startswith(_HOLDERS) and isinstance(module, ModuleType):
            _let_go(module)
    gc.collect()
    _rest()


def gloo_threads() -> dict[str, str]:
    """The state of every thread of gloo in this process, by its id ("S": it waits for work); Linux alone tells."""
    found = {}
    for task in _TASKS.iterdir() if _TASKS.exists() else ():
        try:
            text = (task / "stat").read_text()
        except OSError:  # it has just ended
            continue
        name, _, rest = text.partition("(")[2].rpartition(")")
        if "gloo" in name:
            found[task.name] = rest.split()[0]
    return found


def _rest() -> None:
    """Sleep, so that others have the interpreter's lock, until gloo's threads have been seen idle several times."""
    seen, end = 0, time.monotonic() + _PATIENCE_S
    while seen < _OFTEN and time.monotonic() < end:
        time.sleep(_LOOK_S)
        seen = seen + 1 if all(state == "S" for state in gloo_threads().values()) else 0


def _let_go(module: ModuleType) -> None:
    """Forget the groups in a module's variables, and in the defaults of its functions: None is the default group."""
    for name, value in list(vars(module).items()):
        if _is_group(value):
            setattr(module, name, None)
        elif type(value) is FunctionType and any(map(_is_group, value.__defaults__ or ())):
            value.__defaults__ = tuple(None if _is_group(default) else default for default in value.__defaults__ or ())


def _is_group(value: Any) -> bool:
    # By its type: ``isinstance`` asks the value, and some of torch's warn when they are asked anything.
    return issubclass(type(value), dist.ProcessGroup)
