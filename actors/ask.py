"""``loom3d ask``: questions answered by a run's language model: UniUGG's about pictures and views that it imagined,
Spa3-VLM's about the frames of a video or of a scene.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from actors.asked import Asked, read_questions, write_answers
from actors.generate import pose_options
from actors.outputs import check_file
from actors.parts import ANSWERING, FRAMES, IMAGINING, check_recipe, open_run
from configs import ConfigError


def run(args: argparse.Namespace) -> tuple[Path, list[Asked]]:
    """What ``loom3d ask`` does with its arguments; returns the file that it wrote and its content."""
    folder, config = open_run(args.run, args.overrides, args.config)
    posed = pose_options(args).given or args.target_view is not None or args.after_reference
    if posed and not args.imagine:
        raise ConfigError("a camera pose is for imagined views: add --imagine to be answered about what is seen there")
    allowed, wish = (IMAGINING, "imagine views") if args.imagine else ((*ANSWERING, *FRAMES), "answer questions")
    check_recipe(config, folder, allowed, wish)
    questions = read_questions(args.question, args.questions)
    wanted = check_file(Path(args.out).expanduser().absolute()) if args.out else None
    if config.recipe.name in FRAMES:
        from actors.ask_frames import ask
    else:
        from actors.ask_views import ask
    stem, asked = ask(args, config, folder, questions)
    return write_answers(wanted or folder / "asked" / f"{stem}.json", folder.name, asked), asked
