"""Questions about the frames of videos and scenes, on parts that nobody trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import configs
from actors import cli
from actors.ask_frames import frame_choice, prompt
from actors.recipes.base import every_batch
from actors.trainers.feed import Feed
from configs import ConfigError, RunConfig
from models.spa3r.vlm.model import Spa3VLM
from services.contracts import ImageRef, Record, Split, Tensor
from services.data.readers.base import Notes
from services.data.sources import open_sources
from services.features.client import FeatureClient
from services.features.sink import open_store
from services.streams.frames import FrameColumns
from services.streams.inputs import kind_inputs
from tests.support.films import write_video
from tests.support.spa3_runs import make_spa3r_run, make_vlm_run

QUESTION = "How many chairs are there?"
ANSWER = "Four."


def pictures(number: int, height: int = 48, width: int = 64, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    return [
        np.kron(draw.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
        for _ in range(number)
    ]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 12 seconds with a conversation about it, a folder of frames, and what cannot be shown."""
    root = tmp_path_factory.mktemp("media")
    write_video(root / "walk.mp4", pictures(24), fps=2)
    turns = [{"from": "human", "value": f"<video>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}]
    (root / "walk.jsonl").write_text(json.dumps({"id": "0", "video": "walk.mp4", "conversations": turns}) + "\n")
    (root / "frames").mkdir()
    for number, picture in enumerate(pictures(9, seed=1)):
        Image.fromarray(picture).save(root / "frames" / f"{number}.png")
    Image.fromarray(pictures(1, 64, 48, seed=2)[0]).save(root / "tall.png")
    (root / "empty").mkdir()
    (root / "torn.mp4").write_bytes((root / "walk.mp4").read_bytes()[:600])
    (root / "text.mp4").write_text("no video")
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, media: Path) -> tuple[Path, RunConfig]:
    source = f"data.sources.clips={{format: corpus, root: {media}/walk.jsonl}}"
    return make_vlm_run(tmp_path_factory.mktemp("ask"), source)


def asked(folder: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main(["ask", "--run", str(folder), *arguments, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    return found


def train_on(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Read every conversation of the training split once, as training does; returns columns by sample id."""
    store = open_store(config)
    assert store is not None
    seen = {}
    with (
        closing(store),
        closing(FeatureClient(config, store)) as client,
        closing(Feed.open(config, open_sources(config), client, store)) as feed,
    ):
        for batch, samples in every_batch(feed, Split.TRAIN):
            for place, sample in enumerate(samples):
                length = int(batch["input_ids_lengths"][place, 0])
                ids, supervised = (batch[name][place, :length].tolist() for name in ("input_ids", "supervised"))
                grids = batch["grids"][place, : int(batch["grids_lengths"][place, 0])].numpy().copy()
                seen[sample.id] = {"ids": ids, "supervised": supervised, "grids": grids, "sample": sample}
    return seen


def test_what_was_trained_on_is_asked_about_without_computing_anything(
    made: tuple[Path, RunConfig], media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = made
    seen = train_on(config)
    found = asked(folder, "--video", str(media / "walk.mp4"), "--question", QUESTION, capsys=capsys)
    assert found["views"] == [f"walk.mp4#{frame}" for frame in (0, 4, 9, 13, 18, 23)], "a frame in two seconds"
    assert found["features"] == {"cached": 6 + 1, "computed": 0}, "a picture's tokens each, and the latents of all"
    # Its content counts, not where it lies.
    shutil.copy(media / "walk.mp4", tmp_path / "other.mp4")
    moved = asked(folder, "--video", str(tmp_path / "other.mp4"), "--question", QUESTION, capsys=capsys)
    assert moved["features"] == found["features"]
    assert moved["answers"] == found["answers"]
    # The prompt is the conversation up to its answer.
    (clip,) = (entry for name, entry in seen.items() if name.startswith("clips/"))
    record: Record = {"grids": Tensor(data=clip["grids"], dtype="int64")}
    text, inputs = FrameColumns(config), kind_inputs(config)["conversation"]
    ids = prompt(text, inputs, record, QUESTION)
    assert ids == clip["ids"][: clip["supervised"].index(True)]
    assert ids == prompt(text, inputs, record, f"<video>\n{QUESTION}")
    # A room of the training split, whose questions show all of its views.
    room = next(entry["sample"].item for name, entry in seen.items() if name.startswith("questions/")).split("-")[0]
    found = asked(folder, "--image", f"rooms/{room.split('/')[0]}", "--question", QUESTION, capsys=capsys)
    assert found["features"] == {"cached": 4 + 1, "computed": 0}


def test_what_is_new_is_computed_once_and_kept(
    made: tuple[Path, RunConfig], media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = made
    shown = ["--video", str(media / "frames"), "--question", QUESTION]
    first = asked(folder, *shown, capsys=capsys)
    assert first["views"] == ["0.png", "2.png", "5.png", "8.png"], "folders have a frame a second"
    # Visual tokens and VGGT's patches of four pictures, VGGT over all of them, latents.
    assert first["features"] == {"cached": 0, "computed": 4 + 4 + 1 + 1}
    again = asked(folder, *shown, capsys=capsys)
    assert again["features"] == {"cached": 5, "computed": 0}
    assert again["answers"] == first["answers"]
    nothing = asked(folder, *shown, "cache.mode=never", capsys=capsys)
    assert nothing["features"] == {"cached": 0, "computed": 10}
    assert nothing["answers"] == first["answers"]


def test_frames_are_read_once_for_all_questions(
    made: tuple[Path, RunConfig], media: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = made
    run, shown = Spa3VLM.run, []

    def running(self: Spa3VLM, *given: Any, ids: Any = None, images: Any = None, **options: Any) -> torch.Tensor:
        shown.append(0 if images is None else len(images["image"].pooler_output[0]))
        return run(self, *given, ids=ids, images=images, **options)

    monkeypatch.setattr(Spa3VLM, "run", running)
    questions = [f"{QUESTION} {number}" for number in range(5)]
    arguments = [text for question in questions for text in ("--question", question)]
    found = asked(
        folder, "--video", str(media / "frames"), *arguments, "--caption", "generate.batch_size=2", capsys=capsys
    )
    assert [one["question"] for one in found["answers"]] == [*questions, "Describe the place in one sentence."]
    assert [number for number in shown if number] == [4 * 2], "the tokens of four frames, once"
    assert len(shown) > 3, "three batches of questions behind them"


@pytest.mark.parametrize("geometry", ["append", "vggt"])
def test_every_geometry_is_asked(
    geometry: str, made: tuple[Path, RunConfig], media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(made[1].storage.root)
    folder, _ = make_vlm_run(root, f"name={geometry}", f"recipe.spa3_vlm.geometry={geometry}")
    found = asked(folder, "--video", str(media / "frames"), "--question", QUESTION, capsys=capsys)
    assert len(found["answers"]) == 1
    assert sum(found["features"].values()) >= 4 + 1, "tokens of four frames, and what all of them are together"


def test_mixed_shapes_are_read_and_said(
    made: tuple[Path, RunConfig], media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = made
    shown = ["--image", str(media / "frames" / "0.png"), "--image", str(media / "tall.png")]
    found = asked(folder, *shown, "--question", QUESTION, capsys=capsys)
    assert found["views"] == ["0.png", "tall.png"]
    (remark,) = found["remarks"]
    assert "2 shapes (64x48, 48x64)" in remark
    assert "VGGT sees of each the largest central part of 56:42" in remark
    assert cli.main(["ask", "--run", str(folder), *shown, "--caption"]) == 0
    printed = capsys.readouterr().out
    assert "note: the frames have 2 shapes" in printed
    assert "features 3 from the cache, 0 computed" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--video", "{m}/text.mp4", "--caption"], ["DataError", "text.mp4: not a readable video"]),
        (["--video", "{m}/torn.mp4", "--caption"], ["DataError", "torn.mp4"]),
        (["--video", "{m}/absent.mp4", "--caption"], ["absent.mp4: there is no such file or folder"]),
        (["--video", "{m}/walk.jsonl", "--caption"], ["walk.jsonl: is no video", ".mp4"]),
        (["--video", "{m}/empty", "--caption"], ["empty: the folder holds no pictures"]),
        (["--video", "{m}/walk.mp4"], ["nothing is asked"]),
        (["--video", "{m}/walk.mp4", "--question", ""], ["--question is empty", "write what to ask"]),
        (["--video", "{m}/walk.mp4", "--question", "<video>"], ["only says where the pictures stand"]),
        (["--video", "{m}/walk.mp4", "--question", "<video> or <video>?"], ["2 marks <video>"]),
        (["--video", "{m}/walk.mp4", "--caption", "--like", "rooms"], ["--like rooms", "it has clips"]),
        (["--video", "{m}/walk.mp4", "--image", "{m}/tall.png", "--caption"], ["both say what is shown"]),
        (["--image", "{m}/walk.mp4", "--caption"], ["is no picture", "--video"]),
        (["--image", "{m}/frames", "--caption"], ["is no picture", "--video"]),
        (["--image", "{m}/tall.png", "--caption", "--like", "clips"], ["there is none"]),
        (["--image", "rooms/room0_0000:9", "--caption"], ["has no view 9"]),
        (["--image", "/absent.png", "--caption"], ["/absent.png"]),
        (["--caption"], ["nothing is shown: give --video"]),
        (["--image", "{m}/tall.png", "--caption", "--imagine", "--yaw", "3"], ["cannot imagine views"]),
        (["--image", "{m}/tall.png", "--caption", "--part", "vae=/x"], ["the parts llm, adapter"]),
        (["--image", "{m}/tall.png", "--caption", "data.text.max_length=20"], ["data.text.max_length=20"]),
    ],
)
def test_what_cannot_be_asked_is_one_message(
    made: tuple[Path, RunConfig],
    media: Path,
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    filled = [text.format(m=media) for text in arguments]
    assert cli.main(["ask", "--run", str(made[0]), *filled]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said


def test_frames_are_chosen_as_the_sources_choose(made: tuple[Path, RunConfig], media: Path) -> None:
    _, config = made

    def chosen(like: str, *overrides: str) -> Sequence[ImageRef]:
        changed = configs.load(overrides, file=made[0] / "config.yaml")
        return frame_choice(changed, like).frames(media / "walk.mp4", "here", Notes())

    assert [image.frame for image in frame_choice(config).frames(media / "walk.mp4", "here", Notes())] == [
        0, 4, 9, 13, 18, 23,
    ]  # fmt: skip
    dense = "data.sources.dense={format: corpus, root: x.jsonl, options: {frame_seconds: 1.0, most_frames: 12}}"
    bench = "data.sources.bench={format: benchmark, root: y, options: {name: vsibench, frames: 24}}"
    assert len(chosen("dense", dense)) == 12
    assert len(chosen("clips", dense)) == 6
    assert [image.frame for image in chosen("bench", bench)] == list(range(24))
    assert len(chosen("", bench)) == 6, "an evaluation's choice is taken where it is named"
    with pytest.raises(ConfigError, match=r"in different ways \(clips, dense\): say with --like SOURCE"):
        chosen("", dense)


def test_parts_that_do_not_belong_together_are_refused(
    tmp_path: Path, media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = make_vlm_run(tmp_path)
    plain, _ = make_vlm_run(tmp_path, "name=plain", "recipe.spa3_vlm.geometry=none")
    shown = ["--image", str(media / "tall.png"), "--question", QUESTION]

    def refused(run: Path, *arguments: str) -> str:
        assert cli.main(["ask", "--run", str(run), *shown, *arguments]) == 2
        return capsys.readouterr().err

    assert asked(plain, *shown, capsys=capsys)["features"] == {"cached": 0, "computed": 1}, "no geometry"
    assert "has no adapter, the run's recipe.spa3_vlm.geometry=cross" in refused(folder, "--part", "llm=run:plain/llm")
    assert "the model has none" in refused(plain, "--part", "adapter=run:spa3_vlm-tiny/adapter")
    make_vlm_run(tmp_path, "name=behind", "recipe.spa3_vlm.geometry=append")
    said = refused(folder, "--part", "llm=run:behind/llm")
    assert "has an adapter that appends tokens, the run's recipe.spa3_vlm.geometry=cross needs an adapter by" in said
    said = refused(folder, "--part", "adapter=run:behind/adapter")
    assert "weights/adapter is an adapter that appends tokens, the run's recipe.spa3_vlm.geometry=cross" in said
    make_vlm_run(tmp_path, "name=narrow", "model.overrides.adapter.kind=cross", "recipe.spa3_vlm.geometry=vggt")
    said = refused(folder, "--part", "adapter=run:narrow/adapter")
    assert "is an adapter for another base" in said
    assert "latent_channels" in said
    make_vlm_run(tmp_path, "name=other", seed=1)
    said = refused(folder, "--part", "adapter=run:other/adapter")
    assert "is an adapter for another base: it was trained behind random (seed 1)" in said
    again = asked(folder, *shown, "--part", "adapter=run:spa3_vlm-tiny/adapter", capsys=capsys)
    assert again["answers"] == asked(folder, *shown, capsys=capsys)["answers"]
    make_spa3r_run(tmp_path, seed=5)  # trained again since
    said = refused(folder)
    assert "encoders.spa3r" in said
    assert "sha256" in said or "digest" in said
    shutil.rmtree(folder / "weights")
    make_spa3r_run(tmp_path)
    assert "part 'llm' is missing" in refused(folder)
