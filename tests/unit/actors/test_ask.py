"""Questions about pictures and about what was imagined, on random parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import configs
from actors import cli
from actors.ask_views import ask_imagined, ask_pictures
from actors.asked import CAPTION, read_questions
from actors.parts import open_pipeline, text_columns
from actors.references import read_picture
from configs import RunConfig
from models.uniugg.pipeline import Pipeline
from services.contracts import Turn
from services.data.questions.views import PROMPTS
from services.data.questions.write import DESCRIBE
from services.errors import DataError
from tests.support.uniugg_parts import make_run

QUICK = ["generate.steps=2", "generate.max_new_tokens=5"]
QUESTIONS = ["What do you see?", "How many chairs are there?", "Is the table left of the lamp?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rooms = ["data.rooms.scenes=3", "data.rooms.views=3", "data.rooms.width=64", "data.rooms.height=48"]
    return make_run(tmp_path_factory.mktemp("ask"), "uniugg_finetune", *rooms)[0]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(1)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(root / f"{name}.png")
    return [str(root / "a.png"), str(root / "b.png")]


@pytest.fixture(scope="module")
def config(folder: Path) -> RunConfig:
    return configs.load(QUICK, file=folder / "config.yaml")


@pytest.fixture(scope="module")
def pipeline(config: RunConfig, folder: Path) -> Pipeline:
    opened = open_pipeline(config, folder=folder)
    # Far from where it starts, with a head of its own for letters alone: answers are no tie, and differ.
    with torch.no_grad():
        for parameter in opened.llm.language.parameters():
            parameter.mul_(6.0 if parameter.ndim == 2 else 1.0)
    head = opened.llm.language.get_output_embeddings()
    weight = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3))
    weight[:97] = weight[123:] = 0.0
    head.weight = torch.nn.Parameter(weight)
    return opened


def plainly(pipeline: Pipeline, config: RunConfig, question: str, tokens: torch.Tensor) -> str:
    """Every token from a forward pass over everything before it."""
    text = text_columns(config, pipeline.llm)
    ids = text.question([Turn(role="user", text=question)], len(tokens))["input_ids"].data.tolist()
    answer: list[int] = []
    while len(answer) < config.generate.max_new_tokens:
        batch: dict[str, Any] = {
            "kind": "conversation", "weight": torch.ones(1), "input_ids": torch.tensor([[*ids, *answer]]),
            "tokens": tokens[None, :, None],
        }  # fmt: skip
        with torch.no_grad():
            hidden = pipeline.llm.hidden(pipeline.llm.embed(batch, "metres"), batch["input_ids"])
            token = int(pipeline.llm.logits(hidden[:, -1]).argmax())
        if token == text.end_of_turn:
            break
        answer.append(token)
    return text.decode(answer).strip()


def test_answers_equal_those_without_a_cache(pipeline: Pipeline, config: RunConfig, pictures: list[str]) -> None:
    shown = [read_picture(name, config) for name in pictures]
    asked = ask_pictures(pipeline, config, shown, QUESTIONS)
    tokens = torch.cat([pipeline.see(pipeline.cut(p.image, p.K)[0][None]) for p in shown])
    assert [a.answer for a in asked.answers] == [plainly(pipeline, config, q, tokens) for q in QUESTIONS]
    assert [a.question for a in asked.answers] == QUESTIONS
    assert asked.views == ["a.png", "b.png"]
    assert len({a.answer for a in asked.answers}) > 1
    assert all(len(a.answer) == 5 for a in asked.answers)


def test_imagined_tokens_stand_where_a_picture_stood(
    pipeline: Pipeline, config: RunConfig, pictures: list[str]
) -> None:
    shown = read_picture(pictures[0], config)
    poses = torch.eye(4, dtype=torch.float64)[None].repeat(2, 1, 1)
    poses[1, 0, 3] = 0.4
    made = pipeline.imagine(shown.image, shown.K, poses.float(), steps=2, guidance=1.0, seed=config.seed)
    alone = ask_imagined(pipeline, config, shown, poses, QUESTIONS[:2])
    assert [part.views for part in alone] == [["imagined"], ["imagined"]]
    for part, tokens in zip(alone, made.tokens, strict=True):
        assert [a.answer for a in part.answers] == [plainly(pipeline, config, q, tokens[None]) for q in QUESTIONS[:2]]
    (after, _) = ask_imagined(pipeline, config, shown, poses, QUESTIONS[:1], after_reference=True)
    seen = pipeline.see(pipeline.cut(shown.image, shown.K)[0][None])
    both = torch.cat([seen, made.tokens[:1]])
    assert after.views == ["a.png", "imagined"]
    assert after.answers[0].answer == plainly(pipeline, config, QUESTIONS[0], both)


def test_the_command_prints_and_writes(
    folder: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "questions.txt").write_text("How large is it?\n\n  What is behind?  \n")
    out = tmp_path / "answers.json"
    arguments = ["ask", "--run", str(folder), "--image", pictures[0], "--question", QUESTIONS[0]]
    arguments += ["--questions", str(tmp_path / "questions.txt"), "--caption", "--out", str(out), *QUICK]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    written = json.loads(out.read_text())
    (asked,) = written["asked"]
    assert written["run"] == "uniugg_finetune-tiny"
    assert [a["question"] for a in asked["answers"]] == [
        QUESTIONS[0], "How large is it?", "What is behind?", "Describe the picture in a few words.",
    ]  # fmt: skip
    assert asked["pose"] is None
    assert "Q  What is behind?" in text
    assert str(out) in text
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [asked]


def test_a_scene_and_what_is_imagined_of_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["ask", "--run", str(folder), "--question", QUESTIONS[1], "--json"]
    assert cli.main([*run, "--image", "rooms/room0_0000", *QUICK]) == 0
    (whole,) = json.loads(capsys.readouterr().out)
    assert whole["views"] == [f"rooms/room0_0000:{view}" for view in range(3)]
    assert cli.main([*run, "--image", "rooms/room0_0000:0", "--imagine", "--target-view", "2", *QUICK]) == 0
    (imagined,) = json.loads(capsys.readouterr().out)
    assert imagined["views"] == ["imagined"]
    assert np.asarray(imagined["pose"]).shape == (4, 4)
    # What it says lies in the run folder too.
    assert json.loads((folder / "asked" / "room0_0000-0.json").read_text())["asked"] == [imagined]


def test_stage_i_answers_too(tmp_path: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = make_run(tmp_path, "uniugg_align")
    assert cli.main(["ask", "--run", str(run), "--image", pictures[0], "--caption", *QUICK]) == 0
    assert CAPTION[0] in capsys.readouterr().out
    assert cli.main(["ask", "--run", str(run), "--image", pictures[0], "--caption", "--imagine", "--yaw", "3"]) == 2
    assert "uniugg_align, which cannot imagine views" in capsys.readouterr().err


def test_captions_are_asked_as_they_were_taught() -> None:
    assert CAPTION[0] in PROMPTS
    assert CAPTION[1] in DESCRIBE


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "{a}"], ["nothing is asked"]),
        (["--image", "{a}", "--question", " "], ["--question is empty"]),
        (["--image", "{a}", "--questions", "/absent.txt"], ["/absent.txt: cannot be read"]),
        (["--image", "{a}", "--caption", "--yaw", "3"], ["add --imagine"]),
        (["--image", "{a}", "--image", "{b}", "--caption", "--imagine", "--yaw", "3"], ["--image is given 2 times"]),
        (["--image", "{a}", "--caption", "--imagine"], ["no pose is given"]),
        (["--image", "{a}", "--question", "<image> or <image>?"], ["DataError", "2 marks <image> and 1 images"]),
        (["--image", "{a}", "--caption", "data.text.max_length=40"], ["data.text.max_length=40 allows no more"]),
        (["--image", "/absent.jpg", "--caption"], ["/absent.jpg: there is no such file"]),
        (["--image", "{a}", "--caption", "--out", "/"], ["--out / is a folder; give the file to write"]),
        (["--image", "{a}", "--caption", "--out", "{b}/x.json"], ["b.png is a file; give a folder"]),
    ],
)
def test_what_cannot_be_asked_is_one_message(
    folder: Path, pictures: list[str], arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [text.format(a=pictures[0], b=pictures[1]) for text in arguments]
    assert cli.main(["ask", "--run", str(folder), *filled]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said


def test_a_file_without_questions_is_named(tmp_path: Path) -> None:
    (tmp_path / "none.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"none\.txt: holds no question"):
        read_questions([], str(tmp_path / "none.txt"))
