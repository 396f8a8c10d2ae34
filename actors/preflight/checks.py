"""What stops a run before it starts, beside roles that fit nowhere. Each check yields one sentence a fault."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import psutil

from actors.preflight.plan import CachePlan, NodePlan, RolePlan
from actors.preflight.sizes import DataSize
from configs.schema import RunConfig
from services.runtime.placement import MEMORY
from services.streams.inputs import wanted_kinds

GB = 1e9

#: File system types that several machines see alike.
SHARED_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "lustre", "beegfs", "gpfs", "ceph", "cifs", "smb3", "fuse.ceph", "fuse.glusterfs", "fuse.juicefs",
     "glusterfs", "wekafs", "fuse.gcsfuse", "fuse.s3fs", "afs", "panfs", "orangefs", "efs"}
)  # fmt: skip


def storage_problems(config: RunConfig, nodes: Sequence[NodePlan]) -> Iterator[str]:
    """A folder that only this machine sees, in a run of several; optional libraries that a setting needs."""
    root = config.storage.root
    if len(nodes) > 1 and config.cluster.mode == "attach":
        kind = file_system(Path(root))
        if kind not in SHARED_FILE_SYSTEMS:
            yield (
                f"storage.root={root} lies on a local disk of this machine (file system {kind or 'unknown'}), but the "
                f"run has {len(nodes)} nodes: checkpoints and features written on one would be missing on the others; "
                "give a folder on a shared file system"
            )
        tier = cache_root(config)
        if config.cache.mode != "never" and file_system(tier) in SHARED_FILE_SYSTEMS:
            yield (
                f"the cache's node-local tier {tier} lies on a shared file system (its files are mapped into memory): "
                f"give cache.root=/folder/on/each/node's/disk, and share by cache=shared cache.remote={root}/features"
            )
    for library, value in (("wandb", config.logger.wandb), ("mlflow", config.logger.mlflow)):
        if value and find_spec(library) is None:
            yield f"logger.{library}={value} needs the library {library}: pip install 'loom3d[{library}]'"


def data_problems(config: RunConfig, data: Sequence[DataSize]) -> Iterator[str]:
    """Kinds of sample that none of the sources can give, where that is known before they are read."""
    drawn = [size for size in data if config.data.sources[size.source].weight > 0]
    for kind in wanted_kinds(config):
        if any(not size.known or size.units(kind, "train") for size in drawn):
            continue
        needs, example = _NEEDS[kind]
        yield (
            f"recipe.quotas gives {kind!r} a share, but the training split of {', '.join(s.source for s in drawn)} has "
            f"none: it takes {needs}; add a source that has them ({example}), or set recipe.quotas.{kind}=0"
        )
    yield from _too_short_scenes(config, drawn)


def _too_short_scenes(config: RunConfig, drawn: Sequence[DataSize]) -> Iterator[str]:
    """Scenes none of which has as many views as the largest view set, so that all of them would be left out."""
    sets = config.recipe.view_set
    if sets.scheme != "walks" or "view_set" not in wanted_kinds(config) or any(not size.scene_views for size in drawn):
        return
    longest = max((views for size in drawn for views in size.scene_views.get("train", ())), default=0)
    if 0 < longest < sets.views[-1]:
        yield (
            f"recipe.view_set.views={sets.views}: a scene needs {sets.views[-1]} views for the largest set, and of "
            f"{', '.join(size.source for size in drawn)} no training scene has more than {longest}: all would be left "
            "out; lower recipe.view_set.views, or take scenes of more views (data.rooms.views for rooms)"
        )


def leak_problems(config: RunConfig) -> Iterator[str]:
    """Training data that shares scenes with an evaluation set, as far as both were indexed before."""
    from services.data.leakage import find_leaks, refusal, stored_manifests

    found = [
        leak for leak in find_leaks(config, stored_manifests(config)) if leak.evaluation not in config.data.allow_leak
    ]
    if found:
        yield refusal(found)


#: Kind -> what it is made of, and where that can be had.
_NEEDS: Mapping[str, tuple[str, str]] = {
    "view": ("views of scenes", "data=rooms"),
    "view_set": ("views of scenes", "data=rooms"),
    "pair": ("views of scenes with depth, intrinsics and poses that see the same things", "data=rooms"),
    "generation": ("views of scenes with depth, intrinsics and poses that see the same things", "data=rooms"),
    "item": ("pictures that belong to no scene", "data=corpus"),
    "conversation": ("items with questions and answers", "data=rooms-qa"),
}


#: Roles of a recipe -> the described cluster of GPUs that they fit at size=paper.
EXAMPLES: Mapping[frozenset[str], str] = {
    frozenset({"trainer"}): "mixed-gpus",
    frozenset({"llm"}): "mixed-gpus-language",
    frozenset({"vlm"}): "8x80gb",
    frozenset({"llm", "diffusion"}): "mixed-gpus-joint",
}


def gpu_memory_gb(config: RunConfig) -> float:
    """Memory of the largest GPU that the cluster's description names; 0 where it names none."""
    return max((spec.gpu_memory_gb for spec in config.cluster.nodes.values()), default=0.0)


def memory_problems(roles: Sequence[RolePlan], nodes: Sequence[NodePlan], gpu_memory_gb: float) -> Iterator[str]:
    """Workers that need more memory than their node or their GPU has."""
    example = EXAMPLES.get(frozenset(role.role for role in roles) - {"feature"})
    no_gpus = example and not any(role.asks.get("GPU") for role in roles)
    elsewhere = f", or describe other machines as cluster={example} does" if no_gpus else ""
    for node in nodes:
        offered = node.offers.get(MEMORY, 0.0)
        if offered and node.host_bytes > offered * GB:
            inside = ", ".join(f"{r.nodes.count(node.name)} x {r.role}" for r in roles if node.name in r.nodes)
            yield (
                f"node {node.name}: {inside} need about {node.host_bytes / GB:.1f} GB of memory, it has "
                f"{offered:g} GB; lower trainer.micro_batch (with more accumulation), use fewer workers, or add memory"
                f"{elsewhere}"
            )
    for role in roles:
        room = role.asks.get("GPU", 0.0) * gpu_memory_gb * GB
        if role.device_bytes and room and role.device_bytes > room:
            yield (
                f"role {role.role!r}: one worker needs about {role.device_bytes / GB:.1f} GB of GPU memory, "
                f"{role.asks['GPU']:g} GPU of {gpu_memory_gb:g} GB has {room / GB:.1f} GB; lower trainer.micro_batch "
                "(with more accumulation), set trainer.activation_checkpointing=true or trainer.precision=bfloat16, or "
                "choose another backend, offload or peft=lora: `loom3d plan --strategies` compares them"
            )


def disk_problems(config: RunConfig, cache: CachePlan) -> Iterator[str]:
    """A cache that does not fit the disk of this machine, where the run is on this machine."""
    root = cache_root(config)
    if config.cluster.mode == "attach" or not cache.stored_bytes:
        return
    free = shutil.disk_usage(existing_parent(root)).free
    if cache.stored_bytes > free:
        yield (
            f"the features need {cache.stored_bytes / GB:.1f} GB, {root} has {free / GB:.1f} GB free; set "
            f"cache.budget_bytes (below {free:.0f}), cache=fp8, fewer encoders.*.layers, or another cache.root"
        )


def cache_root(config: RunConfig) -> Path:
    """Folder of the node-local tier."""
    return Path(config.cache.root) if config.cache.root else Path(config.storage.root) / "cache"


def existing_parent(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def file_system(path: Path) -> str:
    """Type of the file system that holds ``path`` (which need not exist yet); "" where it cannot be known."""
    path = existing_parent(path).resolve()
    best, kind = -1, ""
    for partition in psutil.disk_partitions(all=True):
        mount = Path(partition.mountpoint)
        if path.is_relative_to(mount) and len(mount.parts) > best:
            best, kind = len(mount.parts), partition.fstype
    return kind
