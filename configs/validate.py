"""What a typed configuration must still satisfy: allowed values, ranges, and keys that contradict each other.

Single-key rules are tables by dotted path (``*`` stands for a name of the user's choice); rules over several keys
are short functions that yield one message for every violation. Nothing here looks at files or at a cluster: that is
what ``loom3d plan`` does.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from configs.convert import hints_of, nearest, section_problems
from configs.paths import is_uri
from configs.roles import ROLES, SHARED_TRAINER, role_config
from configs.schema import RunConfig, SourceConfig, TrainerConfig
from configs.validate_cluster import CLUSTER_RULES
from configs.validate_encoders import ENCODER_RULES, IMAGE_FAMILIES, RECORD_FAMILIES, TEXT_FAMILIES
from configs.validate_recipes import RECIPE_ALLOWED, RECIPE_RULES

SPLITS = ("train", "val", "test")
FORMATS = (
    "rooms", "scannet", "scannetpp", "arkitscenes", "re10k", "nerfstudio", "colmap", "sevenscenes", "images", "corpus",
    "questions", "benchmark",
)  # fmt: skip
RECIPES = tuple(ROLES)
BACKENDS = ("single", "ddp", "fsdp2", "zero2", "zero3")
DTYPES = ("float32", "bfloat16", "float16")

ALLOWED: Mapping[str, tuple[str, ...]] = {
    "size": ("tiny", "small", "paper"),
    "recipe.name": RECIPES,
    **RECIPE_ALLOWED,
    "bridge.transport": ("auto", "local", "group", "objects"),
    "generate.points": ("target", "union"),
    "data.sources.*.format": FORMATS,
    "data.text.supervise": ("answer", "turn"),
    "encoders.*.family": (*IMAGE_FAMILIES, *TEXT_FAMILIES, *RECORD_FAMILIES),
    "encoders.*.dtype": DTYPES,
    "cache.mode": ("always", "never", "auto"),
    "cache.verify": ("always", "first_touch", "off"),
    "cache.codec": ("none", "fp8_e4m3"),
    "trainer.precision": ("float32", "bfloat16"),
    "trainer.best_mode": ("min", "max"),
    "trainer.resume": ("auto", "never"),
    "backend.name": BACKENDS,
    "backend.offload": ("none", "optimizer", "parameters"),
    "peft.method": ("none", "lora"),
    "peft.base_dtype": ("auto", "stored", "float32", "bfloat16"),
    "roles.*.backend": ("", *BACKENDS),
    "roles.*.peft": ("", "none", "lora"),
    "cluster.mode": ("inline", "local", "attach"),
    "logger.progress": ("auto", "plain", "off"),
}


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; an ``open`` end is excluded."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"{'more than' if self.open_low else 'at least'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'less than' if self.open_high else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return " and ".join(part for part in (low, high) if part)


_COUNT, _POSITIVE = Range(low=0), Range(low=1)
_ABOVE_0 = Range(low=0, open_low=True)
_SHARE = Range(low=0, high=1)
_DECAY = Range(low=0, high=1, open_high=True)

RANGES: Mapping[str, Range] = {
    "seed": _COUNT,
    "data.max_broken": _SHARE,
    "data.rooms.scenes": Range(low=3),  # one for each split
    "data.rooms.views": _POSITIVE,
    "data.rooms.width": Range(low=16),
    "data.rooms.height": Range(low=16),
    "data.rooms.seed": _COUNT,
    "data.questions.seed": _COUNT,
    "data.questions.per_scene": _POSITIVE,
    "data.questions.max_views": _POSITIVE,
    "data.questions.min_visible": _SHARE,
    "data.checks.min_overlap": _SHARE,
    "data.checks.min_depth": _COUNT,
    "data.checks.max_depth": _ABOVE_0,
    "data.checks.duplicate_bits": Range(low=0, high=64),
    "data.checks.threads": _POSITIVE,
    "data.sources.*.weight": _COUNT,
    "data.sources.*.frame_stride": _POSITIVE,
    "data.sources.*.limit": _COUNT,
    "encoders.*.seed": _COUNT,
    "encoders.*.height": _POSITIVE,
    "encoders.*.width": _POSITIVE,
    "encoders.*.side": _COUNT,
    "encoders.*.batch_size": _POSITIVE,
    "service.replicas": _COUNT,
    "service.batch_wait_s": _COUNT,
    "service.queue": _POSITIVE,
    "service.deadline_s": _ABOVE_0,
    "service.lease_s": _ABOVE_0,
    "service.num_gpus": _COUNT,
    "service.release_at": Range(low=0, high=1, open_low=True),
    "service.threads": _COUNT,
    "cache.budget_bytes": _COUNT,
    "cache.shard_bytes": _POSITIVE,
    "cache.seal_s": _ABOVE_0,
    "cache.lookahead_bytes": _POSITIVE,
    "recipe.quotas.*": _COUNT,
    "recipe.view_set.target_ratio": _DECAY,
    "recipe.view_set.stride": _POSITIVE,
    "recipe.view_set.plans_per_scene": _COUNT,
    "recipe.view_set.partitions": _COUNT,
    "recipe.view_set.seed": _COUNT,
    "recipe.losses.*": _COUNT,
    "recipe.spa3_vlm.questions_per_sample": _POSITIVE,
    "recipe.spa3_vlm.adapter.heads": _COUNT,
    "recipe.uniugg.matches": _POSITIVE,
    "recipe.uniugg.match_share": _SHARE,
    "recipe.uniugg.match_temperature": _ABOVE_0,
    "recipe.uniugg.match_block": _POSITIVE,
    "recipe.uniugg.point_alpha": _COUNT,
    "recipe.uniugg.match_beta": _COUNT,
    "recipe.uniugg.rgb_lpips": _COUNT,
    "recipe.uniugg.rgb_ssim": _COUNT,
    "recipe.uniugg.semantic_cosine": _COUNT,
    "recipe.uniugg.semantic_smooth_l1": _COUNT,
    "recipe.uniugg.semantic_share": Range(low=0, high=1, open_low=True),
    "recipe.uniugg.mixed_share": _SHARE,
    "recipe.uniugg.reconstruction_share": _SHARE,
    "recipe.uniugg.condition_dropout": _DECAY,
    "recipe.uniugg.min_snr": _COUNT,
    "recipe.uniugg.offset_noise": _COUNT,
    "data.pairs.min_overlap": _SHARE,
    "data.pairs.max_overlap": _SHARE,
    "data.pairs.per_scene": _COUNT,
    "data.pairs.side": Range(low=8),
    "data.augment.crops": _COUNT,
    "data.augment.min_crop": Range(low=0, high=1, open_low=True),
    "data.augment.same_image": _SHARE,
    "data.text.max_length": _POSITIVE,
    "trainer.lr_scale.*": _COUNT,
    "backend.persistence_threshold": _COUNT,
    "bridge.window": _POSITIVE,
    "bridge.heartbeat_s": _ABOVE_0,
    "bridge.silence_s": _ABOVE_0,
    "bridge.phase_s.*": _ABOVE_0,
    "bridge.timeout_s": _ABOVE_0,
    "generate.steps": _POSITIVE,
    "generate.guidance": _COUNT,
    "generate.eta": _SHARE,
    "generate.confidence": _COUNT,
    "generate.radius": _COUNT,
    "generate.fill": _COUNT,
    "generate.max_new_tokens": _POSITIVE,
    "generate.batch_size": _POSITIVE,
    "generate.fov": Range(low=1, high=170),
    "generate.frames": Range(low=2),
    "generate.angle": Range(low=0, high=180, open_low=True),
    "generate.frame_rate": Range(low=0, high=100, open_low=True),
    "evaluate.samples": _COUNT,
    "evaluate.seed": _COUNT,
    "trainer.steps": _POSITIVE,
    "trainer.micro_batch": _POSITIVE,
    "trainer.accumulation": _POSITIVE,
    "trainer.lr": _ABOVE_0,
    "trainer.min_lr_ratio": _SHARE,
    "trainer.warmup_steps": _COUNT,
    "trainer.weight_decay": _COUNT,
    "trainer.clip_norm": _COUNT,
    "trainer.ema": _DECAY,
    "trainer.max_skipped_steps": _COUNT,
    "trainer.checkpoint_every": _COUNT,
    "trainer.keep_checkpoints": _POSITIVE,
    "trainer.validate_every": _COUNT,
    "trainer.log_every": _POSITIVE,
    "trainer.threads": _COUNT,
    "trainer.prefetch_steps": _POSITIVE,
    "trainer.lookahead_steps": _POSITIVE,
    "peft.rank": _POSITIVE,
    "peft.alpha": _ABOVE_0,
    "peft.dropout": _DECAY,
    "cluster.roles.*.num_cpus": _COUNT,
    "cluster.roles.*.num_gpus": _COUNT,
    "cluster.roles.*.memory_gb": _COUNT,
    "cluster.nodes.*.count": _POSITIVE,
    "cluster.nodes.*.num_cpus": _COUNT,
    "cluster.nodes.*.num_gpus": _COUNT,
    "cluster.nodes.*.memory_gb": _ABOVE_0,
    "cluster.nodes.*.gpu_memory_gb": _COUNT,
    "cluster.nodes.*.resources.*": _COUNT,
    "cluster.nodes.*.tflops": _ABOVE_0,
    "cluster.nodes.*.read_gb_s": _ABOVE_0,
    "cluster.max_failures": _COUNT,
    "cluster.start_timeout_s": _ABOVE_0,
    "cluster.object_store_bytes": Range(low=75 * 2**20),  # Ray refuses less
}


def problems(config: RunConfig) -> Iterator[str]:
    """One message for every rule that ``config`` breaks: key, value seen, what is allowed, what to do."""
    for path, pattern, value in leaves(config):
        yield from _leaf(path, pattern, value)
    for rule in _RULES:
        yield from rule(config)


def _leaf(path: str, pattern: str, value: Any) -> Iterator[str]:
    """What a value breaks of the rules for keys of ``pattern``."""
    if pattern in ALLOWED and value not in ALLOWED[pattern]:
        allowed = ALLOWED[pattern]
        yield f"{path}={value!r} is not allowed.{nearest(str(value), allowed)} Allowed: {', '.join(allowed)}"
    if pattern in RANGES and value not in RANGES[pattern]:
        yield f"{path}={value} is out of range: it must be {RANGES[pattern]}"


def leaves(config: Any) -> Iterator[tuple[str, str, Any]]:
    """(path, pattern, value) of every leaf; in a pattern ``*`` stands for an entry of a dictionary."""
    for item in dataclasses.fields(config):
        yield from _leaves(item.name, item.name, getattr(config, item.name))


def _leaves(path: str, pattern: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            yield from _leaves(f"{path}.{item.name}", f"{pattern}.{item.name}", getattr(value, item.name))
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _leaves(f"{path}.{name}", f"{pattern}.*", entry)
    else:
        yield path, pattern, value


def _run(config: RunConfig) -> Iterator[str]:
    if config.name and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        yield (
            f"name={config.name!r} is not a folder name: use letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    root = config.storage.root
    if is_uri(root):
        yield (
            f"storage.root={root!r} is a URI: checkpoints and records are locked and appended to in a folder; "
            "give one that all nodes see (a shared file system, a mounted bucket). Features go to a bucket with "
            "cache=shared cache.remote=s3://bucket/features"
        )
    elif not root.startswith("/"):
        yield (
            f"storage.root={root!r} is relative: a worker on another node, or a submitted job, has another working "
            "folder; give an absolute folder, or one that begins with ~"
        )


def _data(config: RunConfig) -> Iterator[str]:
    sources = config.data.sources
    if not sources:
        yield "data.sources is empty: choose data=rooms, or another option of the group data"
    elif not any(source.weight > 0 for source in sources.values()):
        yield "data.sources: every weight is 0, so there is nothing to draw; give one source a positive weight"
    checks = config.data.checks
    if checks.min_depth >= checks.max_depth:
        yield f"data.checks.min_depth={checks.min_depth} must be less than data.checks.max_depth={checks.max_depth}"
    pairs = config.data.pairs
    if pairs.min_overlap >= pairs.max_overlap:
        yield (
            f"data.pairs.min_overlap={pairs.min_overlap} must be less than data.pairs.max_overlap={pairs.max_overlap}"
        )
    jitter = config.data.augment.jitter
    if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
        yield (
            f"data.augment.jitter={jitter} must be four numbers >= 0: brightness, contrast, saturation, and hue up to "
            "0.5 (half a turn), e.g. [0.5,0.5,0.5,0.1]"
        )
    for name, source in sources.items():
        if source.format == "questions" and not source.root:
            yield from _questions(name, config.data.sources)
        elif not source.root and source.format != "rooms":
            yield f"data.sources.{name}.root is empty: a source of format {source.format} needs its folder or file"
        for split in source.splits:
            if split not in SPLITS:
                yield f"data.sources.{name}.splits.{split}: no such split.{nearest(split, SPLITS)} Allowed: " + (
                    ", ".join(SPLITS)
                )


def _leaks(config: RunConfig) -> Iterator[str]:
    benchmarks = (name for name, source in config.data.sources.items() if source.format == "benchmark")
    known = [*config.data.evaluation_sets, *benchmarks]
    for name in config.data.allow_leak:
        if name not in known:
            yield (
                f"data.allow_leak has {name!r}, which is no evaluation set.{nearest(name, known)} There are: "
                f"{', '.join(known) or 'none'} (data.evaluation_sets, and sources of format benchmark)"
            )


def _questions(name: str, sources: Mapping[str, SourceConfig]) -> Iterator[str]:
    """Rules for a source whose questions are made from the scenes of another."""
    key, of = f"data.sources.{name}.options.of", sources[name].options.get("of", "")
    scenes = [other for other, source in sources.items() if source.format not in ("questions", "corpus", "benchmark")]
    if of not in scenes:
        named = f"={of!r} names no source of scenes.{nearest(str(of), scenes)}" if of else " is empty:"
        yield f"{key}{named} Name the source that the questions are about; there are: {', '.join(scenes) or 'none'}"


def _cache(config: RunConfig) -> Iterator[str]:
    cache = config.cache
    if cache.root and not cache.root.startswith("/"):
        yield (
            f"cache.root={cache.root!r} must be an absolute folder on a local disk: the node-local tier is read by "
            "memory mapping; a shared folder or a URI goes into cache.remote"
        )
    if cache.remote and not is_uri(cache.remote) and not cache.remote.startswith("/"):
        yield f"cache.remote={cache.remote!r} must be an absolute folder or a URI such as s3://bucket/folder"
    if cache.mode == "never" and cache.remote:
        yield f"cache.remote={cache.remote} contradicts cache.mode=never: nothing is stored; drop one of the two"
    if cache.mode == "never" and cache.codec != "none":
        yield f"cache.codec={cache.codec} contradicts cache.mode=never: nothing is stored; drop one of the two"
    if 0 < cache.budget_bytes < cache.shard_bytes:
        yield (
            f"cache.budget_bytes={cache.budget_bytes} is smaller than one shard "
            f"(cache.shard_bytes={cache.shard_bytes}); raise the first or lower the second"
        )


def _trainer(config: RunConfig) -> Iterator[str]:
    trainer = config.trainer
    yield from _optimisation("", trainer)
    adapted = config.peft.method != "none" or any(role.peft not in ("", "none") for role in config.roles.values())
    if config.peft.targets and not adapted:
        yield f"peft.targets={config.peft.targets} has no effect with peft.method=none; choose peft=lora"
    for key in ("dora", "rslora"):
        if getattr(config.peft, key) and not adapted:
            yield f"peft.{key}=true has no effect with peft.method=none; choose peft=lora"
    if config.peft.base_dtype == "bfloat16" and not (adapted and trainer.precision == "bfloat16"):
        yield "peft.base_dtype=bfloat16 is for peft=lora with trainer.precision=bfloat16; set both, or leave it auto"


def _optimisation(prefix: str, trainer: TrainerConfig) -> Iterator[str]:
    """Rules over several keys of ``trainer``, as they stand below ``prefix``."""
    if len(trainer.betas) != 2 or any(beta not in _DECAY for beta in trainer.betas):
        yield f"{prefix}trainer.betas={trainer.betas} must be two numbers, each {_DECAY}"
    if trainer.warmup_steps >= trainer.steps > 1:
        yield (
            f"{prefix}trainer.warmup_steps={trainer.warmup_steps} must be less than trainer.steps={trainer.steps}, "
            "or the learning rate never reaches its peak"
        )


def _roles(config: RunConfig) -> Iterator[str]:
    """What is different for single roles: of roles that there are, and of settings that a role may have alone."""
    known = ROLES.get(config.recipe.name, ())
    for name, given in config.roles.items():
        path = f"roles.{name}"
        if known and name not in known:
            yield (
                f"{path}: recipe {config.recipe.name} has no such role.{nearest(name, known)} Roles: {', '.join(known)}"
            )
        for key in sorted(SHARED_TRAINER & set(given.trainer)):
            own = sorted(set(hints_of(TrainerConfig)) - SHARED_TRAINER)
            yield (
                f"{path}.trainer.{key}={given.trainer[key]!r}: all roles of a run share it; set trainer.{key}. "
                f"A role may have its own {', '.join(own)}"
            )
        wrong = section_problems(TrainerConfig, given.trainer, f"{path}.trainer")
        yield from wrong
        if not wrong:
            for inner, pattern, value in _leaves("trainer", "trainer", given.trainer):
                yield from _leaf(f"{path}.{inner}", _named(pattern, inner), value)
        if not wrong and not SHARED_TRAINER & set(given.trainer):
            yield from _optimisation(f"{path}.", role_config(config, name).trainer)
        if given.targets and (given.peft or config.peft.method) == "none":
            yield f"{path}.targets={given.targets} has no effect without low-rank updates; set {path}.peft=lora"


def _named(pattern: str, path: str) -> str:
    """``trainer.*`` with the key's name: keys of a role's section are known, though the schema has them open."""
    return ".".join([*path.split(".")[:2], *pattern.split(".")[2:]])


_RULES: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    _run,
    _data,
    _leaks,
    *RECIPE_RULES,
    *ENCODER_RULES,
    _cache,
    _trainer,
    _roles,
    *CLUSTER_RULES,
)
