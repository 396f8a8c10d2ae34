"""A plan as tables on a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from actors.preflight.plan import Plan

_BYTE_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")
_COUNT_UNITS = ("", "K", "M", "G", "T", "P")


def render(plan: Plan, width: int = 120) -> str:
    """The plan as text: tables of roles, encoders, cache and time, then notes, and whether it fits."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    for table in (_roles(plan), _encoders(plan), _schedule(plan)):
        console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False)
    if plan.fits:
        console.print(f"{plan.name} fits.", highlight=False)
    else:
        console.print(f"{plan.name} does NOT fit:", highlight=False)
        for problem in plan.problems:
            console.print(f"  - {problem}", highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip("\n")


def size(count: float) -> str:
    """Bytes with a decimal unit, three digits."""
    return _scaled(count, _BYTE_UNITS)


def count(number: float) -> str:
    """A number with a decimal prefix, three digits."""
    return _scaled(number, _COUNT_UNITS)


def duration(seconds: float) -> str:
    """Seconds as s, min, h or days."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"


def _scaled(value: float, units: Sequence[str]) -> str:
    index = 0
    while value >= 1000 and index < len(units) - 1:
        value, index = value / 1000, index + 1
    return f"{value:.3g} {units[index]}".rstrip()


def _table(title: str, columns: Iterable[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


def _roles(plan: Plan) -> Table:
    rows = []
    for role in plan.roles:
        asks = ", ".join(f"{amount:g} {name}" for name, amount in role.asks.items())
        nodes = ", ".join(f"{role.nodes.count(name)} on {name}" for name in dict.fromkeys(role.nodes)) or "nowhere"
        device = f" + {size(role.device_bytes)} GPU" if role.device_bytes else ""
        step = plan.steps.get(role.role)
        trains = (
            f"{count(step.trainable)} / {count(step.frozen)}"
            if step
            else "0 / " + (count(sum(encoder.parameters for encoder in plan.encoders)))
        )
        work = count(step.flops / plan.samples[role.role]) + "FLOP" if step else ""
        rows.append((role.role, str(role.workers), asks, nodes, size(role.host_bytes) + device, trains, work))
    columns = ("role", "workers", "one worker asks", "where", "memory of one", "trainable / frozen", "a sample")
    return _table(f"{plan.name}: roles (model {plan.model})", columns, rows)


def _encoders(plan: Plan) -> Table:
    cache = plan.cache
    rows = [
        (
            encoder.name,
            count(encoder.parameters),
            count(encoder.flops) + "FLOP",
            ", ".join(f"{name} {'x'.join(map(str, spec.shape))}" for name, spec in encoder.outputs.items()),
            size(encoder.record_bytes),
            f"{cache.records} records, {size(cache.bytes)}"
            + (f" (budget {size(cache.budget_bytes)})" if cache.budget_bytes else ""),
            f"{cache.mode}: " + ", ".join(f"{rate:.0%}" for rate in cache.hit_rates) + " hits in epochs 1, 2, 3",
        )
        for encoder in plan.encoders
    ]
    columns = ("encoder", "parameters", "an input", "outputs", "a record", "all features", "cache")
    return _table("frozen features", columns, rows)


def _schedule(plan: Plan) -> Table:
    s = plan.schedule
    epochs = f"{s.epochs:.3g} of {s.steps_per_epoch} steps" if s.steps_per_epoch else "unknown"
    rows = [
        (
            f"{s.steps} of {s.samples_per_step} samples",
            epochs,
            duration(s.encode_s),
            duration(s.train_s),
            duration(s.validate_s),
            f"{duration(s.total_s)}, the first epoch limited by {s.bottleneck}",
            s.rates,
        )
    ]
    columns = ("steps", "epochs", "encode all once", "train", "validate", "expected in all", "rates")
    return _table("time", columns, rows)
