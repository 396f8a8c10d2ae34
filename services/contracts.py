"""The data that cross a process boundary. No ray, no torch: plain frozen dataclasses and numpy.

Conventions, everywhere behind the readers: poses are 4x4 camera-to-world matrices in metres with OpenCV axes
(x right, y down, z forward); pixel centres lie at integers, so that the middle of a W-pixel row is (W-1)/2;
intrinsics are in pixels of the image they stand beside.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

Matrix = tuple[tuple[float, ...], ...]
"""Row-major matrix as nested tuples: hashable and JSON-able. ``np.asarray`` makes it an array."""


class Split(StrEnum):
    """Split of a source, always by scene (room), never by view."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class Role(StrEnum):
    """What a view is to its sample: seen by the model, or to be predicted."""

    CONTEXT = "context"
    TARGET = "target"


@dataclass(frozen=True, kw_only=True, slots=True)
class Intrinsics:
    """Pinhole camera of an image of ``width`` x ``height`` pixels, pixel centres at integers."""

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int

    def matrix(self) -> np.ndarray:
        """The 3x3 matrix K, float64."""
        return np.array([[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]])

    def resized(self, width: int, height: int) -> Intrinsics:
        """The camera of the same image resized to ``width`` x ``height``.

        Resizing scales the continuous plane, whose origin is the corner of the first pixel; with centres at
        integers that corner is at -0.5, hence the half-pixel terms.
        """
        sx, sy = width / self.width, height / self.height
        return Intrinsics(
            fx=self.fx * sx,
            fy=self.fy * sy,
            cx=(self.cx + 0.5) * sx - 0.5,
            cy=(self.cy + 0.5) * sy - 0.5,
            width=width,
            height=height,
        )

    def cropped(self, left: int, top: int, width: int, height: int) -> Intrinsics:
        """The camera of the window that starts at pixel (``left``, ``top``)."""
        return dataclasses.replace(self, cx=self.cx - left, cy=self.cy - top, width=width, height=height)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRef:
    """One image: a file, or one frame of a video. ``path`` is absolute or relative to the manifest's root."""

    path: str
    frame: int | None = None
    """Index of the decoded frame when ``path`` is a video; None for an image file."""
    member: str | None = None
    """Name of the image inside ``path`` when that is a tar archive; ``column:row`` of a Parquet file, or
    ``column[place]:row`` where a cell holds a list of images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthRef:
    """A depth map along z. ``metres_per_unit`` times the stored number is metres; 0 and non-finite are unknown."""

    path: str
    metres_per_unit: float
    K: Intrinsics
    """Camera of the stored depth map, which may have another size than the image."""
    unknown: float | None = None
    """A further stored number that means unknown (7-Scenes writes 65535)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One picture of a scene. Distorted pictures are undistorted at ingest or refused by name."""

    image: ImageRef
    K: Intrinsics | None = None
    pose: Matrix | None = None
    """4x4 camera-to-world, metres, OpenCV axes; None where the source has no pose."""
    depth: DepthRef | None = None
    instance_path: str | None = None
    """16- or 8-bit PNG of instance ids (0 = none), same field of view as the image."""
    label_path: str | None = None
    """16- or 8-bit PNG of semantic class ids (0 = none), same field of view as the image."""
    timestamp: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Box3D:
    """Oriented box in the scene's world frame, metres. ``axes`` has the box's unit axes as columns."""

    center: tuple[float, float, float]
    size: tuple[float, float, float]
    axes: Matrix = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Instance:
    """One object of a scene. ``id`` is the value in the instance masks."""

    id: int
    label: str
    class_id: int
    box: Box3D | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One turn of a conversation; ``role`` is "user", "assistant" or "system"."""

    role: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question about a scene with its exact answer; ``options`` is empty for a numeric question."""

    id: str
    type: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    views: tuple[int, ...] = ()
    """Indices of the views that show what the question is about; empty means all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferringExpression:
    """A sentence that names objects of a scene: spans are (start, end, instance id), end exclusive, target first."""

    text: str
    spans: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Ordered views of one place, with what is known about it. Produced by a reader; readers' names end here."""

    id: str
    views: tuple[View, ...]
    split: Split | None = None
    scene_type: str | None = None
    instances: tuple[Instance, ...] = ()
    mesh_path: str | None = None
    superpoint_path: str | None = None
    axis_alignment: Matrix | None = None
    """4x4 that turns the world frame so that z is up and walls follow x and y."""
    questions: tuple[Question, ...] = ()
    captions: tuple[str, ...] = ()
    expressions: tuple[ReferringExpression, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An image or a conversation that is no scene (COCO, LAION, LLaVA, text)."""

    id: str
    images: tuple[ImageRef, ...] = ()
    turns: tuple[Turn, ...] = ()
    split: Split | None = None
    label: str | None = None
    question: Question | None = None
    """What an evaluation scores the answer by, where the conversation asks a question with one right answer."""
    tokens: int = 0
    """Length in tokens as the source states it, pictures among them; 0 where it does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewRole:
    """One view of a planned sample, by its index in the scene, in order."""

    index: int
    role: Role = Role.CONTEXT


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSample:
    """One row of the epoch plan: everything that determines a training sample, nothing of its pixels."""

    id: str
    """Unique within an epoch: ``source/item#kindN``, N being the unit of the item (for ``view``, the view)."""
    source: str
    item: str
    kind: str
    views: tuple[ViewRole, ...]
    seed: int
    """Key of all draws of this sample; see ``services.streams.plan.generator``."""
    questions: tuple[str, ...] = ()
    length: int = 0
    """Tokens, where the source states them; packing is planned from it."""
    weight: float = 1.0
    """0 for a filler that completes the last batch of a pass over a whole split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """A **global** micro-batch of one kind: rank r of w takes samples [r*B/w, (r+1)*B/w)."""

    index: int
    kind: str
    samples: tuple[PlanSample, ...]

    def slice(self, rank: int, world_size: int) -> tuple[PlanSample, ...]:
        """The samples of ``rank``. ValueError when ``world_size`` does not divide the batch."""
        if len(self.samples) % world_size:
            raise ValueError(
                f"a micro-batch of {len(self.samples)} samples cannot be divided among {world_size} ranks; "
                "choose a world size that divides trainer.micro_batch"
            )
        share = len(self.samples) // world_size
        return self.samples[rank * share : (rank + 1) * share]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One optimiser step: an ordered list of global micro-batches, the same for every world size."""

    step: int
    epoch: int
    micro_batches: tuple[MicroBatch, ...]


@dataclass(frozen=True, slots=True)
class FeatureKey:
    """16 bytes that name the input of an encoder: content digests, transform parameters, ordered views with roles."""

    digest: bytes

    def __post_init__(self) -> None:
        if len(self.digest) != 16:
            raise ValueError(f"a feature key has 16 bytes, got {len(self.digest)}")

    def hex(self) -> str:
        """32 hexadecimal digits."""
        return self.digest.hex()


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """A stored tensor: ``data`` in a numpy dtype, ``dtype`` the logical one (bfloat16 is stored as int16 bits).

    Mapped arrays are read-only; whoever needs to write copies.
    """

    data: np.ndarray
    dtype: str


Record = dict[str, Tensor]
"""What an encoder made of one input: named tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureRequest:
    """One input for one encoder. ``images`` are absolute paths; ``transform`` holds per-sample parameters only."""

    key: FeatureKey
    encoder: str
    """Name of the encoder in the run's config (``encoders.<name>``)."""
    sample_id: str
    images: tuple[ImageRef, ...] = ()
    digests: tuple[str, ...] = ()
    """Content digests of ``images``: they are in the key; `features why` compares them one by one."""
    roles: tuple[Role, ...] = ()
    text: str | None = None
    transform: dict[str, Any] = field(default_factory=dict)
    upstream: FeatureRequest | None = None
    """For an encoder of records: the request that makes its input."""
    once: bool = False
    """Whether nobody will ask for it again: a view set that was drawn for one epoch."""
    pixels: np.ndarray | None = field(default=None, compare=False)
    """uint8 (H, W, 3): the picture itself, where it was augmented and is in no file; ``digests`` is then of these."""

    @property
    def passing(self) -> bool:
        """Whether the input will never come again, so that its features are not looked for and not kept."""
        return self.once or self.pixels is not None or (self.upstream is not None and self.upstream.passing)


@dataclass
class Lookups:
    """What the cache answered to one of the consumers that share a client; the client counts on in it."""

    hits: int = 0
    misses: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits over look-ups; 0 before the first."""
        total = self.hits + self.misses
        return self.hits / total if total else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStats:
    """Counters since the object that holds them was made."""

    hits: int = 0
    misses: int = 0
    encoded: int = 0
    corrupt: int = 0
    refused: int = 0
    """Records that admission turned away because the budget is full of what live runs reread."""
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: CacheStats) -> CacheStats:
        return CacheStats(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(CacheStats)}
        )

    @property
    def hit_rate(self) -> float:
        """Hits over look-ups; 0 before the first."""
        return Lookups(self.hits, self.misses).hit_rate
