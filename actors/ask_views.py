"""Questions to UniUGG: about pictures, or about views that it imagined.

All questions about the same views are answered in batches from one reading of the views.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from actors.asked import CAPTION, Answer, Asked, answered
from actors.generate import choose_poses, device_of, given_parts, imagine, pose_options
from actors.parts import open_pipeline, text_columns
from actors.references import Picture, pose_between, read_picture, read_pictures
from configs import ConfigError, RunConfig
from models.uniugg.pipeline import Pipeline
from services.contracts import Turn
from services.streams.text import TextColumns


def ask(args: argparse.Namespace, config: RunConfig, folder: Path, questions: list[str]) -> tuple[str, list[Asked]]:
    """Answer what a command asks; returns also what a file of the answers may be called.

    ConfigError for options that contradict each other, or when nothing is asked.
    """
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
        return pictures[0].stem, [ask_pictures(pipeline, config, pictures, questions)]
    options, target = pose_options(args), None
    if args.target_view is not None:
        if options.given:
            raise ConfigError(f"--target-view and {options.given[0]} both say where the camera stands; keep one")
        target = read_picture(args.image[0].partition(":")[0], config, args.target_view)
        pose_between(pictures[0], target)
    poses = choose_poses(pipeline, config, pictures[0], options, target)
    asked = ask_imagined(
        pipeline, config, pictures[0], poses, questions, target=target, after_reference=args.after_reference
    )
    return pictures[0].stem, asked


def _pictures(args: argparse.Namespace, config: RunConfig) -> list[Picture]:
    if args.video or args.like:
        raise ConfigError(
            f"--video and --like are for models that read frames; this one, of recipe {config.recipe.name}, reads "
            "pictures: give --image for each"
        )
    if not args.image:
        raise ConfigError("nothing is shown: give --image")
    if args.imagine:
        if len(args.image) != 1:
            raise ConfigError(f"--imagine starts from one picture; --image is given {len(args.image)} times")
        return [read_picture(args.image[0], config, args.view)]
    views = None if args.view is None else [args.view]
    return [picture for name in args.image for picture in read_pictures(name, config, views=views)]


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
    return answered(questions, partial(pipeline.generate_text, ids, tokens), text, config)
