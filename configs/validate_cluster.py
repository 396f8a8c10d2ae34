"""Rules over ``cluster``, ``bridge`` and ``backend``, one message a violation; called by :mod:`configs.validate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from configs.convert import nearest
from configs.roles import ROLES
from configs.schema import RoleConfig, RoleOverrides, RunConfig

_SHOWN = 8
"""Numbers that a message lists, at most."""
_REACH = 16
"""A micro-batch that many times larger than the given one is no way out."""


def _bridge(config: RunConfig) -> Iterator[str]:
    roles, transport = ROLES.get(config.recipe.name, ()), config.bridge.transport
    if len(roles) < 2 or transport == "auto":
        return
    inline = config.cluster.mode == "inline"
    if inline and transport != "local":
        yield (
            f"bridge.transport={transport} contradicts cluster.mode=inline, where the roles share one process; "
            "set bridge.transport=auto, or choose cluster=local"
        )
    if not inline and transport == "local":
        yield (
            f"bridge.transport=local contradicts cluster.mode={config.cluster.mode}, where the roles "
            f"{' and '.join(roles)} are in processes of their own; set bridge.transport=auto, or choose cluster=inline"
        )


def _role_names(config: RunConfig) -> Iterator[str]:
    """Worker groups are those of the recipe's roles."""
    roles = ROLES.get(config.recipe.name, ())
    for role in roles:
        if role not in config.cluster.roles:
            yield f"cluster.roles has no {role!r}, which recipe {config.recipe.name} trains; add cluster.roles.{role}"
    for role in config.cluster.roles:
        if roles and role not in roles:
            yield (
                f"cluster.roles.{role}: recipe {config.recipe.name} has no such role.{nearest(role, roles)} "
                f"Roles: {', '.join(roles)}"
            )


def _cluster(config: RunConfig) -> Iterator[str]:
    cluster = config.cluster
    if cluster.mode == "attach" and not cluster.address:
        yield "cluster.mode=attach needs cluster.address: ray://host:port, host:port, or auto inside a submitted job"
    if cluster.mode != "attach" and cluster.address:
        yield (
            f"cluster.address={cluster.address!r} contradicts cluster.mode={cluster.mode}: "
            "it is used with cluster=attach only"
        )
    if not cluster.nodes:
        yield "cluster.nodes is empty: describe at least one kind of node, such as cluster.nodes.local.num_cpus=2"
    gpus = [(f"cluster.roles.{name}.num_gpus", role.num_gpus) for name, role in cluster.roles.items()]
    for path, value in [*gpus, ("service.num_gpus", config.service.num_gpus)]:
        if value > 1 and value != int(value):
            yield f"{path}={value} must be a whole number above 1: a fraction shares one GPU, it cannot span several"
    for name, role in cluster.roles.items():
        yield from _workers(f"cluster.roles.{name}.workers", role, config)


def _workers(path: str, role: RoleConfig, config: RunConfig) -> Iterator[str]:
    sizes, batch = role.workers, config.trainer.micro_batch
    if len(sizes) not in (1, 2) or any(n < 1 for n in sizes) or sorted(sizes) != sizes:
        yield f"{path}={sizes} must be [n], or [min,max] with 1 <= min <= max for an elastic group"
        return
    if batch < 1:
        return  # its range says so
    # Of several roles the driver chooses numbers that divide; the group of a single one is sized by Ray Train.
    alone = len(ROLES.get(config.recipe.name, ())) == 1
    possible = range(sizes[0], (sizes[-1] if alone else sizes[0]) + 1)
    uneven = list(islice((size for size in possible if batch % size), _SHOWN + 1))
    if uneven and len(possible) == 1:
        yield (
            f"trainer.micro_batch={batch} cannot be divided among {uneven[0]} workers ({path}={sizes}); "
            f"sizes that divide it: {', '.join(map(str, _divisors(batch)))}"
        )
    elif uneven:
        told = ", ".join(map(str, uneven[:_SHOWN])) + (" and others" if len(uneven) > _SHOWN else "")
        yield (
            f"{path}={sizes}: Ray Train may choose every number of that range, and {told} cannot share "
            f"trainer.micro_batch={batch} evenly; {_micro_batches(possible, batch)}set {path} to "
            f"{' or '.join(map(str, _even_ranges(batch)))}"
        )
    if sizes[-1] > 1 and config.cluster.mode == "inline":
        yield f"{path}={sizes} contradicts cluster.mode=inline, which has one process; choose cluster=local"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _micro_batches(sizes: Iterable[int], batch: int) -> str:
    """The ``trainer.micro_batch`` nearest to ``batch`` that all of ``sizes`` divide; "" where it is out of reach."""
    unit = 1
    for size in sizes:
        unit = math.lcm(unit, size)
        if unit > batch * _REACH:
            return ""
    near = sorted({max(1, batch // unit) * unit, (batch // unit + 1) * unit}, key=lambda n: abs(n - batch))
    return f"set trainer.micro_batch to {' or '.join(map(str, near))}, or "


def _even_ranges(batch: int) -> list[list[int]]:
    """As wide as they can be, the ranges of numbers that all divide ``batch``."""
    found: list[list[int]] = []
    for n in _divisors(batch):
        if found and n == found[-1][-1] + 1:
            found[-1] = [found[-1][0], n]
        else:
            found.append([n])
    return found


def _backends(config: RunConfig) -> Iterator[str]:
    """What a backend cannot do, by role: each may have one of its own."""
    for name in ROLES.get(config.recipe.name, ()):
        given = config.roles.get(name, RoleOverrides())
        key = f"roles.{name}.backend" if given.backend else "backend.name"
        backend = given.backend or config.backend.name
        sizes = config.cluster.roles[name].workers if name in config.cluster.roles else [1]
        if backend == "single" and sizes and sizes[-1] > 1:
            yield (
                f"cluster.roles.{name}.workers={sizes} contradicts {key}=single, which has one worker; "
                f"choose {key.removesuffix('.name')}=ddp"
            )
        offload, able = config.backend.offload, {"optimizer": ("zero2", "zero3"), "parameters": ("zero3",)}
        if offload != "none" and backend not in able.get(offload, (backend,)):
            yield (
                f"backend.offload={offload} contradicts {key}={backend}: only {' and '.join(able[offload])} can; "
                f"set it to none, or choose {key.removesuffix('.name')}={able[offload][-1]}"
            )
        ema = given.trainer.get("ema", config.trainer.ema)
        if backend == "zero3" and ema:
            yield (
                f"trainer.ema={ema} contradicts {key}=zero3: no rank holds the weights that would be averaged; "
                f"set it to 0, or choose {key.removesuffix('.name')}=zero2 or fsdp2"
            )


CLUSTER_RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (_bridge, _role_names, _cluster, _backends)
