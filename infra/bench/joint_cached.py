"""``p3_cached``: UniUGG's joint stage with ViT and VAE encoding online, beside the same from the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from infra.bench.cached_step import Stage, compare
from infra.bench.harness import Bench, Context, Measured, Target

_PARTS = {
    "encoder": ("uniugg-vit-tiny", {"width": 384, "depth": 12, "heads": 6}),
    "vae": ("spatial-vae-tiny", {"channels": 384, "width": 128, "depth": 4}),
}
"""A ViT-S, so that encoding online is most of an epoch, as it is at every size but tiny."""


def _settings(root: Path, *, quick: bool) -> list[str]:
    """The stage at tiny, behind the parts of :data:`_PARTS`."""
    rooms = {"scenes": 10, "views": 6, "width": 64, "height": 48} if quick else {"scenes": 16, "views": 8}
    return [
        "recipe=uniugg_joint",
        "size=tiny",
        "cluster=inline",
        "logger=quiet",
        f"storage.root={root}",
        "model.init.llm=random",
        "service.replicas=0",
        f"encoders.vit.weights={root / 'parts' / 'encoder'}",
        f"encoders.vae.weights={root / 'parts' / 'vae'}",
        f"encoders.reconstruction.weights={root / 'parts' / 'vae'}",
        *(f"data.rooms.{key}={value}" for key, value in rooms.items()),
        *(("trainer.micro_batch=2",) if quick else ()),
    ]


def _save_parts(root: Path, *, quick: bool) -> None:
    """Write a ViT and a VAE of random weights where the configuration looks for them."""
    import torch

    import models
    from models.pretrained import save_pretrained

    torch.manual_seed(0)
    for part, (name, sizes) in _PARTS.items():
        module: Any = models.build(name, **({} if quick else sizes))
        save_pretrained(module, root / "parts" / part, name, module.settings)


def prepare_cached(context: Context) -> Measured:
    """Some steps of ``recipe=uniugg_joint`` on procedural rooms, with a ViT and a VAE of random weights."""
    _save_parts(context.folder, quick=context.quick)
    return compare(context, Stage(_settings(context.folder, quick=context.quick), 2 if context.quick else 6))


TABLE = [
    Bench(name="p3_cached", unit="ratio", target=Target(on="ratio", op=">=", limit=0.8), prepare=prepare_cached),
]
