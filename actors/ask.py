"""``loom3d ask``: questions about pictures, or about views that the model imagined, answered by its language model.

All questions about the same views are answered in batches from one reading of the views.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.generate import choose_poses, device_of, given_parts, imagine, pose_options
from actors.parts import ANSWERING, IMAGINING, check_recipe, open_pipeline, open_run, text_columns
from actors.references import Picture, pose_between, read_picture, read_pictures
from configs import ConfigError, RunConfig
from models.uniugg.pipeline import Pipeline
from services.contracts import Turn
from services.errors import DataError
from services.streams.text import TextColumns

CAPTION = ("Describe the picture in a few words.", "Describe the place in one sentence.")
"""What ``--caption`` asks of one picture, and of several: as the conversations made of scenes ask it."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer."""

    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The answers about one set of views."""

    views: Sequence[str]
    """Names of the pictures in order; an imagined one is "imagined"."""
    answers: Sequence[Answer]
    pose: Sequence[Sequence[float]] | None = None
    """Of the imagined camera in the reference camera's frame."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        answers = [{"question": a.question, "answer": a.answer} for a in self.answers]
        return {"views": list(self.views), "pose": self.pose, "answers": answers}


# -- the command ---------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> tuple[Path, list[Asked]]:
    """What ``loom3d ask`` does with its arguments; returns the file that it wrote and its content."""
    folder, config = open_run(args.run, args.overrides, args.config)
    options = pose_options(args)
    if (options.given or args.target_view is not None or args.after_reference) and not args.imagine:
        raise ConfigError("a camera pose is for imagined views: add --imagine to be answered about what is seen there")
    recipes, wish = (IMAGINING, "imagine views") if args.imagine else (ANSWERING, "answer questions")
    check_recipe(config, folder, recipes, wish)
    questions = read_questions(args.question, args.questions)
    pictures = _pictures(args, config)
    if args.caption:
        several = len(pictures) > 1 or args.after_reference
        questions = [*questions, CAPTION[1 if several else 0]]
    if not questions:
        raise ConfigError("nothing is asked: give --question TEXT, --questions FILE or --caption")
    pipeline = open_pipeline(
        config, folder=folder, imagine=args.imagine, given=given_parts(args.part), device=device_of(args.device)
    )
    if not args.imagine:
        asked = [ask_pictures(pipeline, config, pictures, questions)]
    else:
        target = None
        if args.target_view is not None:
            if options.given:
                raise ConfigError(f"--target-view and {options.given[0]} both say where the camera stands; keep one")
            target = read_picture(args.image[0].partition(":")[0], config, args.target_view)
            pose_between(pictures[0], target)
        poses = choose_poses(pipeline, config, pictures[0], options, target)
        asked = ask_imagined(
            pipeline, config, pictures[0], poses, questions, target=target, after_reference=args.after_reference
        )
    out = Path(args.out).expanduser().absolute() if args.out else folder / "asked" / f"{pictures[0].stem}.json"
    return _write(out, folder.name, asked), asked


def _pictures(args: argparse.Namespace, config: RunConfig) -> list[Picture]:
    if args.imagine:
        if len(args.image) != 1:
            raise ConfigError(f"--imagine starts from one picture; --image is given {len(args.image)} times")
        return [read_picture(args.image[0], config, args.view)]
    views = None if args.view is None else [args.view]
    return [picture for name in args.image for picture in read_pictures(name, config, views=views)]


def read_questions(given: Sequence[str], file: str) -> list[str]:
    """Questions of the command line, then those of a file, one a line. DataError when the file cannot be read."""
    questions = [text.strip() for text in given]
    if file:
        path = Path(file).expanduser()
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); write one question a line, as UTF-8") from error
        questions += [line.strip() for line in lines if line.strip()]
        if not any(line.strip() for line in lines):
            raise DataError(f"{path}: holds no question; write one a line")
    if "" in questions:
        raise ConfigError("--question is empty; write what to ask")
    return questions


def _write(out: Path, run_name: str, asked: Sequence[Asked]) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps({"run": run_name, "asked": [part.as_dict() for part in asked]}, indent=1))
    temporary.replace(out)
    return out


# -- asking --------------------------------------------------------------------------------------------------


def ask_pictures(pipeline: Pipeline, config: RunConfig, pictures: Sequence[Picture], questions: Sequence[str]) -> Asked:
    """Answers about pictures, which the model sees in order."""
    tokens = pipeline.see(torch.stack([torch.from_numpy(pipeline.cut(p.image, p.K)[0]) for p in pictures]))
    answers = answer(pipeline, text_columns(config, pipeline.llm), config, questions, tokens)
    return Asked(views=[picture.name for picture in pictures], answers=answers)


def ask_imagined(
    pipeline: Pipeline,
    config: RunConfig,
    reference: Picture,
    poses: Tensor,
    questions: Sequence[str],
    *,
    target: Picture | None = None,
    after_reference: bool = False,
) -> list[Asked]:
    """Answers about the views from ``poses`` (N, 4, 4), each asked all ``questions``.

    The imagined tokens take the place of a picture's; with ``after_reference`` the reference's own stand before them.
    """
    made = imagine(pipeline, config, reference, poses, target)
    text = text_columns(config, pipeline.llm)
    seen = pipeline.see(pipeline.cut(reference.image, reference.K)[0][None]) if after_reference else None
    asked = []
    for index in range(len(made)):
        tokens = made.tokens[index : index + 1]
        names = ["imagined"]
        if seen is not None:
            tokens, names = torch.cat([seen.to(tokens), tokens]), [reference.name, "imagined"]
        answers = answer(pipeline, text, config, questions, tokens)
        asked.append(Asked(views=names, answers=answers, pose=made.pose[index].cpu().tolist()))
    return asked


def answer(
    pipeline: Pipeline, text: TextColumns, config: RunConfig, questions: Sequence[str], tokens: Tensor
) -> list[Answer]:
    """Greedy answers about views (V, h, w, C) of at most ``generate.max_new_tokens`` tokens, up to the end of turn.

    DataError for a question that is too long, or has more marks of images than there are views.
    """
    ids = [
        text.question([Turn(role="user", text=question)], len(tokens))["input_ids"].data.tolist()
        for question in questions
    ]
    found = pipeline.generate_text(
        ids,
        tokens,
        max_new_tokens=config.generate.max_new_tokens,
        stop={text.end_of_turn},
        batch_size=config.generate.batch_size,
    )
    return [
        Answer(question=question, answer=text.decode(part).strip())
        for question, part in zip(questions, found, strict=True)
    ]
