"""Questions to Spa3-VLM about the frames of a video or of a scene.

Frames are chosen, cut and encoded as in training: what the feature cache has of them is read, what it lacks is computed
and, where the run's config stores features, kept. The language model reads them once for all questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from actors.asked import CAPTION, Answer, Asked, Features, answered
from actors.generate import device_of, given_parts
from actors.parts_vlm import open_vlm
from actors.references import find_images
from configs import ConfigError, RunConfig
from models.spa3r.vlm.pipeline import SeenScene
from models.spa3r.vlm.spec import CONVERSATION
from services.contracts import ImageRef, Lookups, PlanSample, Record, Turn, View, ViewRole
from services.data.digests import Digester
from services.data.images import VIDEO_SUFFIXES, image_size
from services.data.readers.base import Notes
from services.data.readers.benchmarks.reader import BenchmarkReader
from services.data.readers.corpus import CorpusReader
from services.data.readers.corpus_video import Videos, with_frames
from services.errors import DataError
from services.features.client import FeatureClient
from services.features.encode import pin_weights
from services.features.sink import open_store
from services.streams.collate import Collate, Slot
from services.streams.columns import column_specs
from services.streams.frames import FrameColumns, FrameTexts
from services.streams.inputs import KindInputs, kind_inputs
from services.streams.requests import column_requests


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The pictures that a question is about, in order."""

    names: Sequence[str]
    images: Sequence[ImageRef]
    stem: str
    """What a file about them may be called."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Read:
    """What the frozen encoders made of frames."""

    record: Record
    """The columns of one sample."""
    batch: dict[str, Any]
    """The same as a batch of one."""
    features: Features


def ask(args: argparse.Namespace, config: RunConfig, folder: Path, questions: list[str]) -> tuple[str, list[Asked]]:
    """Answer what a command asks; returns also what a file of the answers may be called.

    Raises:
        ConfigError: options that contradict each other, or nothing is asked or shown.
        DataError: a video that does not decode or has no frames, an empty folder, a picture that cannot be read.
        WeightsError: a part is missing, or was trained behind other encoders than the run's.
    """
    frames = choose(args, config)
    if args.caption:
        questions = [*questions, CAPTION[1 if len(frames.images) > 1 else 0]]
    if not questions:
        raise ConfigError("nothing is asked: give --question TEXT, --questions FILE or --caption")
    config = pin_weights(config)
    pipeline = open_vlm(config, folder, given=given_parts(args.part), device=device_of(args.device))
    read = encode(config, frames)
    answers = answer(pipeline.look(_scene(read)), config, read, questions)
    asked = Asked(views=frames.names, answers=answers, features=read.features, remarks=remarks(config, frames))
    return frames.stem, [asked]


# -- what is shown -------------------------------------------------------------------------------------------


def choose(args: argparse.Namespace, config: RunConfig) -> Frames:
    """The frames of ``--video``, or the pictures and scenes of ``--image``."""
    if args.video and (args.image or args.view is not None):
        raise ConfigError("--video and --image both say what is shown; keep one")
    if args.video:
        path = Path(args.video).expanduser()
        if not path.exists():
            raise DataError(f"--video {args.video}: there is no such file or folder")
        images = frame_choice(config, args.like).frames(path.absolute(), "--video", Notes())
        return Frames(names=[_name(image) for image in images], images=images, stem=path.stem)
    if args.like:
        raise ConfigError("--like says how the frames of --video are chosen; there is none")
    if not args.image:
        raise ConfigError("nothing is shown: give --video FILE or FOLDER, or --image")
    views = None if args.view is None else [args.view]
    found = []
    for name in args.image:
        path = Path(name).expanduser()
        if path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES:
            raise ConfigError(f"--image {name} is no picture; frames of a video or of a folder are chosen by --video")
        found += find_images(name, config, views=views)
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(found[0][0]).stem)
    return Frames(names=[name for name, _ in found], images=[image for _, image in found], stem=stem)


def _name(image: ImageRef) -> str:
    name = Path(image.path).name
    return name if image.frame is None else f"{name}#{image.frame}"


def frame_choice(config: RunConfig, like: str = "") -> Videos:
    """How the run chooses the frames of a video: by the options of its sources of conversations.

    ``like`` names one of them where they differ; without any, the published choice (one frame in two seconds, at least
    four and at most eight). ConfigError for a source that has no videos, or when they differ and none is named.
    """
    kinds = {"corpus": _of_corpus, "benchmark": _of_benchmark}
    sources = {name: s for name, s in config.data.sources.items() if s.format in kinds}
    if like and like not in sources:
        raise ConfigError(
            f"--like {like}: the run has no source of that name whose videos have frames to choose; it has "
            f"{', '.join(sources) or 'none'}"
        )
    found = {name: kinds[source.format](source.options) for name, source in sources.items() if like in ("", name)}
    trained = {name: choice for name, choice in found.items() if like or sources[name].format == "corpus"}
    if len(set(trained.values())) > 1:
        raise ConfigError(
            f"the run's sources choose frames in different ways ({', '.join(trained)}): say with --like SOURCE which "
            "of them is meant"
        )
    return Videos.from_options(dict(next(iter(trained.values()), _of_corpus({}))))


Choice = tuple[tuple[str, Any], ...]
_FRAMES = ("least_frames", "most_frames", "frame_seconds", "folder_fps")


def _of_corpus(options: Any) -> Choice:
    return tuple((name, options.get(name, CorpusReader.options[name])) for name in _FRAMES)


def _of_benchmark(options: Any) -> Choice:
    """As many as it shows, however long the video is."""
    frames = options.get("frames", BenchmarkReader.options["frames"])
    return _of_corpus({"least_frames": frames, "most_frames": frames})


def remarks(config: RunConfig, frames: Frames) -> list[str]:
    """What is to be said where frames have several shapes."""
    sizes = list(dict.fromkeys(image_size(image) for image in frames.images))
    shapes = {round(width / height, 2) for width, height in sizes}
    if len(shapes) < 2:
        return []
    made = f"the frames have {len(shapes)} shapes ({', '.join(f'{width}x{height}' for width, height in sizes)})"
    patches = config.encoders.get("patches")
    seen = f"; VGGT sees of each the largest central part of {patches.width}:{patches.height}" if patches else ""
    return [f"{made}: the vision tower sees each in its own{seen}"]


# -- what is made of it --------------------------------------------------------------------------------------


class _Shown:
    """The frames, as a manifest of one item gives them."""

    def __init__(self, images: Sequence[ImageRef]) -> None:
        self._images, self._digester = images, Digester()

    def views(self, entry_id: str, places: Sequence[int]) -> list[View]:  # noqa: ARG002
        return [View(image=self._images[place]) for place in places]

    def digests(self, entry_id: str, places: Sequence[int]) -> list[str]:  # noqa: ARG002
        return [self._digester.image(self._images[place]).hex() for place in places]


def encode(config: RunConfig, frames: Frames) -> Read:
    """The columns that the model reads of frames, by the requests that a conversation about them has in training."""
    inputs = kind_inputs(config)
    sample = PlanSample(
        id=f"asked/{frames.stem}",
        source="asked",
        item=frames.stem,
        kind=CONVERSATION,
        views=tuple(ViewRole(index=index) for index in range(len(frames.images))),
        seed=0,
    )
    wanted = column_requests(sample, _Shown(frames.images), config, inputs)
    record: Record = {}
    lookups = Lookups()
    with ExitStack() as stack:
        store = open_store(config)
        if store is not None:
            stack.enter_context(closing(store))
        client = stack.enter_context(closing(FeatureClient(config, store)))
        for columns in wanted:
            answers = client.get(columns.requests, 0, lookups)
            broken = next((found for found in answers if isinstance(found, BaseException)), None)
            if broken is not None:
                raise broken
            record |= columns.record([found for found in answers if not isinstance(found, BaseException)])
        specs = column_specs(config, inputs, client.outputs)
        features = Features(cached=lookups.hits, computed=client.stats.encoded)
    return Read(record=record, batch=Collate(specs)(CONVERSATION, [sample], [record], Slot()), features=features)


def _scene(read: Read) -> dict[str, Tensor]:
    return {name: column for name, column in read.batch.items() if isinstance(column, Tensor)}


def answer(scene: SeenScene, config: RunConfig, read: Read, questions: Sequence[str]) -> list[Answer]:
    """Greedy answers of at most ``generate.max_new_tokens`` tokens, up to the end of turn.

    DataError for a question that is too long with its frames, or has more marks of images than there are frames.
    """
    text = FrameColumns(config)
    prompts = [prompt(text, kind_inputs(config)[CONVERSATION], read.record, question) for question in questions]
    return answered(questions, partial(scene.answers, prompts), text, config)


def prompt(text: FrameColumns, inputs: KindInputs, record: Record, question: str) -> list[int]:
    """Token ids up to where the answer begins: frames, in the place of ``<video>`` or in front, and question."""
    blocks = FrameTexts(text, {}, appended=inputs.appended).blocks(record)
    turns = with_frames((Turn(role="user", text=question),), len(blocks), f"the question {question!r:.80}")
    ids: list[int] = text.question(turns, blocks)["input_ids"].data.tolist()
    return ids
