"""The order in which a role computes the micro-batches of a step: 1F1B with a window, a pure function.

The same order runs where roles share a process and where they do not, so gradients are summed in the same order.
Micro-batches of a kind that crosses go forward in the source, forward and backward in the target, and backward in the
source; those that do not cross are work of one role alone and fill the time in which it would wait.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from configs import ConfigError

Action = Literal["forward", "backward"]


@dataclass(frozen=True)
class Op:
    """One pass over micro-batch ``micro`` of a step."""

    action: Action
    micro: int


def source_schedule(kinds: Sequence[str], crossing: Collection[str], window: int) -> tuple[Op, ...]:
    """Order of the role that sends.

    At most ``window`` micro-batches are sent whose gradients have not come back. While the target works on the oldest
    of them, an even share of the micro-batches that do not cross is computed.

    Args:
        kinds: kind of every micro-batch of the step; "" for one in which the role takes no part.
        crossing: kinds that send activations.
        window: micro-batches ahead of their gradients, at least 1.
    """
    if window < 1:
        raise ConfigError(f"bridge.window={window}: it must be at least 1")
    ahead = [i for i, kind in enumerate(kinds) if kind and kind in crossing]
    alone = [i for i, kind in enumerate(kinds) if kind and kind not in crossing]
    ops = [Op("forward", micro) for micro in ahead[:window]]
    for place, micro in enumerate(ahead):
        ops += _both(_share(alone, place, len(ahead)))
        ops.append(Op("backward", micro))
        if place + window < len(ahead):
            ops.append(Op("forward", ahead[place + window]))
    return tuple(ops if ahead else _both(alone))


def target_schedule(kinds: Sequence[str], crossing: Collection[str]) -> tuple[Op, ...]:
    """Order of the role that receives: what comes is answered at once; its own work is done while it waits."""
    coming = [i for i, kind in enumerate(kinds) if kind and kind in crossing]
    alone = [i for i, kind in enumerate(kinds) if kind and kind not in crossing]
    ops: list[Op] = []
    for place, micro in enumerate(coming):
        ops += _both([*_share(alone, place, len(coming)), micro])
    return tuple(ops if coming else _both(alone))


def _both(micros: Sequence[int]) -> list[Op]:
    """Forward and backward of one after the other."""
    return [op for micro in micros for op in (Op("forward", micro), Op("backward", micro))]


def _share(items: Sequence[int], place: int, places: int) -> Sequence[int]:
    """The part of ``items`` that falls to ``place`` when they are spread evenly."""
    return items[place * len(items) // places : (place + 1) * len(items) // places]
