"""A few scenes on disk and a manifest of them in memory, for tests of the streams."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from configs import RunConfig
from configs.schema import (
    CacheConfig,
    DataConfig,
    EncoderConfig,
    RecipeConfig,
    ServiceConfig,
    SourceConfig,
    StorageConfig,
    TrainerConfig,
    ViewSetConfig,
)
from services.contracts import DepthRef, FeatureKey, ImageRef, Intrinsics, Scene, Split, StepPlan, View
from services.errors import DataError
from services.streams.requests import sample_requests

CLASSES = ("none", "wall", "", "chair")
WIDTH, HEIGHT = 40, 30


@dataclass(frozen=True)
class SmallEntry:
    id: str
    n_views: int
    digests: tuple[str, ...]
    scene_type: str | None
    kind: str = "scene"
    split: Split = Split.TRAIN
    length: int = 0


class SmallManifest:
    """What the streams read of a manifest."""

    def __init__(self, scenes: list[Scene], classes: tuple[str, ...] = CLASSES) -> None:
        self.classes = classes
        self.digest = "small"
        self._scenes = {scene.id: scene for scene in scenes}
        self.entries = [
            SmallEntry(s.id, len(s.views), tuple(_digest(v.image.path) for v in s.views), s.scene_type) for s in scenes
        ]

    def of_split(self, split: Split) -> list[SmallEntry]:
        return [entry for entry in self.entries if entry.split == split]

    def entry(self, entry_id: str) -> SmallEntry:
        return next(entry for entry in self.entries if entry.id == entry_id)

    @property
    def scene_types(self) -> tuple[str, ...]:
        return tuple({entry.scene_type for entry in self.entries if entry.scene_type is not None})

    def scene_type(self, entry_id: str) -> str | None:
        return self._scenes[entry_id].scene_type

    def views(self, entry_id: str, places: list[int]) -> list[View]:
        return [self._scenes[entry_id].views[place] for place in places]

    def digests(self, entry_id: str, places: list[int]) -> list[str]:
        known = self.entry(entry_id).digests
        if max(places) >= len(known):
            raise DataError(f"{entry_id!r} has {len(known)} views, not {places}")
        return [known[place] for place in places]


class SmallKeys:
    """What a stage of the pipeline does for each step; notes how far it got."""

    def __init__(self, config: RunConfig, manifest: SmallManifest, note: Path) -> None:
        self.config, self.manifest, self.note = config, manifest, note

    def __call__(self, plan: StepPlan) -> dict[str, tuple[FeatureKey, ...]]:
        self.note.write_text(str(plan.step))
        samples = [sample for batch in plan.micro_batches for sample in batch.samples]
        return {s.id: tuple(r.key for r in sample_requests(s, self.manifest, self.config)) for s in samples}


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_view(folder: Path, name: str, rng: np.random.Generator, *, scale: int = 1) -> View:
    """Random image, depth in millimetres (some unknown) and class ids (0 to 4), the latter two ``scale`` smaller."""
    folder.mkdir(parents=True, exist_ok=True)
    size = (HEIGHT // scale, WIDTH // scale)
    depth = rng.integers(500, 4000, size).astype(np.uint16)
    depth[rng.random(size) < 0.1] = 0
    Image.fromarray(rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)).save(folder / f"{name}.png")
    Image.fromarray(depth).save(folder / f"{name}-depth.png")
    Image.fromarray(rng.integers(0, 5, size).astype(np.uint8)).save(folder / f"{name}-label.png")
    K = Intrinsics(fx=30.0, fy=30.0, cx=(WIDTH - 1) / 2, cy=(HEIGHT - 1) / 2, width=WIDTH, height=HEIGHT)
    return View(
        image=ImageRef(path=str(folder / f"{name}.png")),
        K=K,
        depth=DepthRef(path=str(folder / f"{name}-depth.png"), metres_per_unit=0.001, K=K.resized(size[1], size[0])),
        label_path=str(folder / f"{name}-label.png"),
    )


def write_scenes(folder: Path, views: tuple[int, ...] = (4, 3, 5), seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    types = ("kitchen", "office", None)
    return [
        Scene(
            id=f"scene{i}",
            views=tuple(write_view(folder / f"scene{i}", str(j), rng) for j in range(n)),
            scene_type=types[i % 3],
        )
        for i, n in enumerate(views)
    ]


def small_config(root: Path, *, quotas: dict[str, float] | None = None, **trainer: int) -> RunConfig:
    """Two micro-batches of four samples a step unless told otherwise; a tiny random DINOv2 in this process."""
    return RunConfig(
        storage=StorageConfig(root=str(root)),
        data=DataConfig(sources={"small": SourceConfig(format="scannet", root=str(root / "data"))}),
        recipe=RecipeConfig(quotas=quotas or {"view": 1.0}, view_set=ViewSetConfig(views=[2, 3], stride=2)),
        encoders={
            "features": EncoderConfig(
                weights="random",
                height=28,
                width=28,
                layers=[1, 2],
                arch={
                    "hidden_size": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "mlp_ratio": 2,
                    "image_size": 28,
                },
            )
        },
        service=ServiceConfig(replicas=0),
        cache=CacheConfig(seal_s=0.2, shard_bytes=2**20),
        trainer=TrainerConfig(**{"micro_batch": 4, "accumulation": 2, **trainer}),
    )
