"""``pretrain_cached``: Spa3R's pre-training with VGGT and the semantic encoder online, beside the cache."""

from __future__ import annotations

from pathlib import Path

from infra.bench.cached_step import Stage, compare
from infra.bench.harness import Bench, Context, Measured, Target

_VGGT = "{model: vggt-tiny, width: 256, heads: 4, depth: 20, vit_depth: 20}"
"""Large enough that frozen work is about 90 % of a step, as it is at every size but tiny (the line says how much)."""
_STEPS = 8
"""Two rounds of the planned sets: the first step waits for its batch and makes the optimiser's state, once."""


def _settings(root: Path, *, quick: bool) -> list[str]:
    """The stage at tiny behind :data:`_VGGT`: sets of six views, each of them planned once."""
    rooms = {"scenes": 6, "views": 6, "width": 64, "height": 48} if quick else {"scenes": 24, "views": 8}
    return [
        "recipe=spa3r_pretrain",
        "size=tiny",
        "cluster=inline",
        "logger=quiet",
        f"storage.root={root}",
        "service.replicas=0",
        "recipe.view_set.views=[6, 6]",
        "recipe.view_set.plans_per_scene=1",
        *((f"encoders.patches.arch={_VGGT}", f"encoders.views.arch={_VGGT}") if not quick else ()),
        *(f"data.rooms.{key}={value}" for key, value in rooms.items()),
        *(("trainer.micro_batch=2",) if quick else ()),
    ]


def prepare_cached(context: Context) -> Measured:
    """Some steps of ``recipe=spa3r_pretrain`` on procedural rooms, with frozen networks of random weights."""
    return compare(context, Stage(_settings(context.folder, quick=context.quick), 2 if context.quick else _STEPS))


TABLE = [
    Bench(name="pretrain_cached", unit="ratio", target=Target(on="ratio", op=">=", limit=0.8), prepare=prepare_cached),
]
