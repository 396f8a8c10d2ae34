"""A plan as tables on a terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from actors.preflight.plan import Plan
from actors.preflight.rates import GIVEN

_BYTE_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")
_COUNT_UNITS = ("", "K", "M", "G", "T", "P")


def render(plan: Plan, width: int = 120) -> str:
    """The plan as text: tables of roles, encoders, cache and time, then notes, and whether it fits."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    edges = [_edges(plan)] if plan.edges else []
    for table in (_roles(plan), *edges, _encoders(plan), _schedule(plan)):
        console.print(table)
    if plan.strategies:
        console.print(_strategies(plan))
    for text in plan.missing:
        console.print(f"missing: {text}", highlight=False)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False)
    if plan.fits:
        console.print(f"{plan.name} fits{_but(plan)}.", highlight=False)
    else:
        console.print(f"{plan.name} does NOT fit:", highlight=False)
        for problem in plan.problems:
            console.print(f"  - {problem}", highlight=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().rstrip("\n")


def _but(plan: Plan) -> str:
    if plan.missing:
        return ", but cannot start before what is missing is there"
    return "; mind the notes" if plan.notes else ""


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
        asks = ", ".join(_ask(name, amount) for name, amount in role.asks.items())
        nodes = ", ".join(f"{role.nodes.count(name)} on {name}" for name in dict.fromkeys(role.nodes)) or "nowhere"
        device = f" + {size(role.device_bytes)} GPU" if role.device_bytes else ""
        step = plan.steps.get(role.role)
        trains = (
            f"{count(step.trainable)} / {count(step.frozen)}"
            if step
            else "0 / " + (count(sum(encoder.parameters for encoder in plan.encoders)))
        )
        work = count(step.sample_flops) + "FLOP" if step else ""
        rows.append((role.role, str(role.workers), asks, nodes, size(role.host_bytes) + device, trains, work))
    columns = ("role", "workers", "one worker asks", "where", "memory of one", "trainable / frozen", "a sample")
    return _table(f"{plan.name}: roles (model {plan.model})", columns, rows)


def _ask(name: str, amount: float) -> str:
    """A resource in words; Ray asks for a kind of accelerator by a small share of a resource of its name."""
    kind, _, accelerator = name.partition(":")
    return f"on a node with {accelerator}" if kind == "accelerator_type" else f"{amount:g} {name}"


def _encoders(plan: Plan) -> Table:
    cache = plan.cache
    rows = []
    for encoder in plan.encoders:
        outputs = ", ".join(f"{name} {form(spec.shape)}" for name, spec in encoder.outputs.items())
        records, whole = cache.encoders[encoder.name], cache.sizes[encoder.name]
        stored = f"{records} records of {size(whole / records if records else encoder.record_bytes)}"
        rows += [
            ("encoder", f"{encoder.name}: {count(encoder.parameters)} parameters"),
            ("an input", f"{count(encoder.flops)}FLOP -> {outputs}"),
            ("all inputs", f"{stored}: {size(whole)}"),
        ]
    budget = f", of which {size(cache.budget_bytes)} may be stored" if cache.budget_bytes else ""
    hits = ", ".join(f"{rate:.0%}" for rate in cache.hit_rates)
    rows += [
        ("together", f"{cache.records} records, {size(cache.bytes)}{budget}"),
        ("cache hits", f"{hits} in epochs 1, 2, 3, if nothing is stored yet (cache.mode={cache.mode})"),
    ]
    return _facts("frozen features", rows)


def _strategies(plan: Plan) -> Table:
    """Memory of one worker by strategy; an arrow before what the run has."""
    rows = []
    for one in plan.strategies:
        room = f" of {size(one.room_bytes)}" if one.room_bytes else ""
        rows.append(
            (
                "->" if one.chosen else "",
                one.role,
                {"none": "full", "lora": "LoRA"}[one.peft] + f", {count(one.trainable)} trained",
                one.backend,
                one.offload,
                size(one.device_bytes) + room if one.device_bytes else "-",
                size(one.host_bytes),
                "fits" if one.fits else "no",
            )
        )
    ranks = ", ".join(
        f"{role.workers} x {role.role} with {plan.samples[role.role]} samples each"
        for role in plan.roles
        if role.role in plan.samples
    )
    columns = ("", "role", "finetuning", "backend", "offload", "GPU memory of one", "host memory of one", "")
    return _table(f"strategies ({ranks})", columns, rows)


def _schedule(plan: Plan) -> Table:
    s = plan.schedule
    epochs = f"{s.epochs:.3g} epochs of {s.steps_per_epoch} steps" if s.steps_per_epoch else "epochs unknown"
    first, later = s.bottlenecks
    limits = (
        f"{first} limits the first epoch, {later} the later ones" if first != later else f"{first} limits every epoch"
    )
    rows = [
        ("steps", f"{s.steps} of {s.samples_per_step} samples: {epochs}"),
        ("encode every input once", duration(s.encode_s)),
        ("compute all steps", duration(s.train_s) + _by_role(plan)),
        ("read features of all steps", duration(s.read_s) if s.read_s else "within the measured steps"),
        ("validate and evaluate", duration(s.validate_s)),
        ("expected in all", f"{duration(s.total_s)}; {limits}"),
        ("", "without making data, starting processes and writing the report"),
        (
            "rates",
            s.rates + (" of cluster.nodes.*; --rates RUN takes those of an earlier run" if s.rates == GIVEN else ""),
        ),
    ]
    return _facts("time", rows)


def _by_role(plan: Plan) -> str:
    """What each of several roles takes, the slowest first."""
    seconds = sorted(plan.schedule.role_s.items(), key=lambda entry: -entry[1])
    if len(seconds) < 2:
        return ""
    return " (" + ", ".join(f"{role} alone {duration(each)}" for role, each in seconds) + ")"


def _edges(plan: Plan) -> Table:
    rows = [
        (
            f"{edge.source} -> {edge.target}",
            f"{', '.join(edge.tensors)} of {', '.join(edge.kinds)}: {size(edge.forward_bytes)} a step, "
            f"{size(edge.backward_bytes)} of gradients back",
        )
        for edge in plan.edges
    ]
    return _facts("between roles", rows)


def _facts(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    return table


def form(shape: Sequence[int | None]) -> str:
    """Axes of an output; "n" where they differ from input to input."""
    return "x".join("n" if axis is None else str(axis) for axis in shape)
