"""What the ranks of all roles tell each other once before and once after the passes of a step, and what follows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from services.errors import BridgeError

Directive = Literal["continue", "checkpoint", "evaluate", "stop", "resize"]
"""What all ranks do after a step, by the word of the coordinating rank."""

DIRECTIVES: tuple[str, ...] = get_args(Directive)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What is known before the first forward of a step."""

    counts: Mapping[str, float]
    """Elements per loss term over the global batch, of this rank's role."""
    broken: Mapping[str, str]
    """Sample id -> reason, of all ranks of all roles: these weigh nothing anywhere."""
    all_counts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Role -> counts of its terms."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What all ranks do after the passes of a step."""

    finite: bool
    """Step the optimiser; otherwise all roles skip the step."""
    directive: Directive = "continue"
    blame: tuple[str, ...] = ()
    """Roles whose loss or gradient is not finite."""


def sum_counts(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Counts of the ranks of one role -> counts over the global batch; terms in the order in which they come."""
    total: dict[str, float] = {}
    for part in counts:
        for term, count in part.items():
            total[term] = total.get(term, 0.0) + count
    return total


def agreement(
    role: str, roles: Sequence[str], messages: Sequence[tuple[Mapping[str, float], Mapping[str, str]]]
) -> Agreement:
    """From the messages of all places, where ``roles`` says whose place each is."""
    by_role = {
        name: sum_counts(counts for owner, (counts, _) in zip(roles, messages, strict=True) if owner == name)
        for name in dict.fromkeys(roles)
    }
    broken: dict[str, str] = {}
    for _, part in messages:
        for sample, reason in part.items():
            broken.setdefault(sample, reason)
    return Agreement(counts=by_role[role], broken=broken, all_counts=by_role)


def verdict(roles: Sequence[str], ballots: Sequence[tuple[bool, str]]) -> Verdict:
    """From the ballots (finite, directive) of all places. The directive is that of place 0, the coordinating rank.

    BridgeError for a directive that there is not.
    """
    directive: Any = ballots[0][1]
    if directive not in DIRECTIVES:
        raise BridgeError(f"rank 0 of {roles[0]} gave the directive {directive!r}; there are {', '.join(DIRECTIVES)}")
    blame = dict.fromkeys(role for role, (finite, _) in zip(roles, ballots, strict=True) if not finite)
    return Verdict(finite=not blame, directive=directive, blame=tuple(blame))


def encode(what: str, generation: int, step: int, data: Any) -> bytes:
    """A message to all places."""
    return json.dumps({"what": what, "generation": generation, "step": step, "data": data}).encode()


def decode(message: bytes, what: str, generation: int, step: int, *, sender: str, receiver: str) -> Any:
    """The data of a message. BridgeError, naming both sides, if it is about something else."""
    try:
        fields = json.loads(message)
        seen = (fields["what"], fields["generation"], fields["step"])
        data = fields["data"]
    except (ValueError, KeyError, TypeError):
        other = message[:300].decode(errors="replace")
        raise BridgeError(
            f"{receiver} is at {what!r} of step {step} and expects the same of {sender}, which sent {other}"
        ) from None
    if seen != (what, generation, step):
        raise BridgeError(
            f"{receiver} is at {what!r} of step {step}, generation {generation}; {sender} sent {seen[0]!r} of step "
            f"{seen[2]}, generation {seen[1]}. All roles must resume from the same step of the joint manifest"
        )
    return data
