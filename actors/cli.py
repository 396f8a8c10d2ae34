"""The command line: ``loom3d VERB [options] [group=option ...] [key=value ...]``, the same as ``python -m actors``.

A flat table of verbs; what a verb needs is imported when it runs, so that ``--help`` answers at once. What a user
can cause (``services.errors.USER_ERRORS``) is printed as one message and ends with status 2.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors import commands
from services.runtime import threads
from services.telemetry import logs

USER_ERROR = 2
INTERRUPTED = 130

_INTRO = """usage: loom3d VERB [options] [group=option ...] [key=value ...]

Trains models that understand and generate 3D scenes, from cached frozen features, on Ray.

  loom3d train recipe=probe size=tiny data=rooms trainer.lr=3e-4
  loom3d plan  recipe=probe size=small --json
"""


@dataclass(frozen=True)
class Option:
    """One argument of a verb, as argparse takes it."""

    name: str
    settings: Mapping[str, Any]


def _option(name: str, **settings: Any) -> Option:
    return Option(name, settings)


@dataclass(frozen=True)
class Verb:
    """What a verb does, and which arguments it takes beside overrides of the configuration."""

    run: Callable[[argparse.Namespace], int]
    help: str
    options: tuple[Option, ...] = ()
    configured: bool = True
    """Takes overrides (``key=value``) and ``--config``."""


_ENCODER = _option("--encoder", metavar="NAME", default="", help="key under `encoders` (default: the recipe's)")
_JSON = _option("--json", action="store_true", help="print JSON instead of tables")
_RUN = _option("--run", metavar="RUN", default="", help="folder or name of a run (default: the one that name= says)")
_USED = (
    _option("--view", metavar="N", type=int, help="view of the scene that --image names"),
    _option(
        "--pose", metavar="FILE", default="", help="4x4 of the imagined camera in the reference's frame, JSON/text"
    ),
    _option("--yaw", metavar="DEG", type=float, help="turn the camera to the right"),
    _option("--pitch", metavar="DEG", type=float, help="turn it upward"),
    _option("--roll", metavar="DEG", type=float, help="turn it clockwise about its axis"),
    _option("--move", metavar="X,Y,Z", default="", help="move it, metres right, down, ahead; write --move=-0.5,0,0"),
    _option(
        "--trajectory", metavar="WHAT", default="", help="orbit | sweep (generate.frames, .angle), or a file of poses"
    ),
    _option("--target-view", metavar="N", type=int, help="the pose of another view of the scene"),
    _option(
        "--part", metavar="NAME=FOLDER", action="append", default=[], help="use this part instead (may be repeated)"
    ),
    _option("--device", metavar="NAME", default="", help="where to compute (default: cuda where there is one)"),
)

VERBS: Mapping[str, Verb] = {
    "train": Verb(commands.train, "train a model; resumes a run of the same name"),
    "plan": Verb(
        commands.plan,
        "say what a run needs (resources, memory, cache, time) without starting it",
        (
            _JSON,
            _option("--rates", metavar="RUN", help="run folder whose measured rates replace the configured ones"),
            _option("--address", metavar="ADDRESS", help="take the nodes from this running cluster"),
            _option(
                "--strategies",
                action="store_true",
                help="compare memory of one worker over DDP, FSDP2, ZeRO with and without offload; full and LoRA",
            ),
        ),
    ),
    "evaluate": Verb(
        commands.evaluate,
        "judge a finished run again, with other evaluate.* or generate.*, or on other data; writes its report anew",
        (
            _RUN,
            _option("--split", choices=["train", "val", "test"], default="test", help="of the data (test)"),
        ),
    ),
    "generate": Verb(
        commands.generate,
        "imagine what another camera sees: points, depth, pictures, a page that turns",
        (
            _RUN,
            _option("--image", metavar="IMAGE", required=True, help="picture file, or SOURCE/SCENE[:VIEW] of the data"),
            *_USED,
            _option("--out", metavar="FOLDER", help="write here (default: <run>/generated/IMAGE)"),
        ),
    ),
    "ask": Verb(
        commands.ask,
        "answer questions about pictures, a video, a scene, or an imagined view",
        (
            _RUN,
            _option(
                "--image",
                metavar="IMAGE",
                action="append",
                default=[],
                help="picture file, or SOURCE/SCENE[:VIEW,VIEW] of the data (may be repeated)",
            ),
            _option("--video", metavar="PATH", default="", help="video file, or folder of its frames (a spa3_vlm run)"),
            _option(
                "--like", metavar="SOURCE", default="", help="choose its frames as those of this source of the data"
            ),
            _option("--question", metavar="TEXT", action="append", default=[], help="what to ask (may be repeated)"),
            _option("--questions", metavar="FILE", default="", help="questions, one a line"),
            _option("--caption", action="store_true", help="ask for a description"),
            _option("--imagine", action="store_true", help="ask about the view from another camera"),
            _option("--after-reference", action="store_true", help="show the reference before the imagined view"),
            *_USED,
            _JSON,
            _option("--out", metavar="FILE", help="write the answers here (default: <run>/asked/IMAGE.json)"),
        ),
    ),
    "show-field": Verb(
        commands.show_field,
        "draw what a Spa3R run predicts at unseen views, beside what is there",
        (
            _RUN,
            _option("--split", choices=["train", "val", "test"], default="test", help="of the data (test)"),
            _option("--scene", metavar="SCENE", default="", help="only this one, as SCENE or SOURCE/SCENE"),
            _option("--sets", metavar="N", type=int, default=4, help="view sets to draw (4)"),
            _option("--out", metavar="FOLDER", default="", help="write here (default: <run>/field)"),
        ),
    ),
    "export": Verb(
        commands.export,
        "write a run's weights as transformers, diffusers and PEFT load them, with a model card",
        (
            _RUN,
            _option("--out", metavar="FOLDER", required=True, help="write here; a folder that is new, or empty"),
            _option("--merge", action="store_true", help="add low-rank updates to the weights, and prove it"),
            _option(
                "--licence",
                metavar="NAME=TEXT",
                action="append",
                default=[],
                help="of weights that the run stands on, e.g. model.init.language=apache-2.0 (may be repeated)",
            ),
        ),
    ),
    "data make": Verb(
        commands.data_make,
        "make the procedural rooms",
        (_option("--out", metavar="FOLDER", help="make them here instead of below storage.root"),),
    ),
    "data index": Verb(commands.data_index, "read the sources and write their manifests"),
    "data check": Verb(
        commands.data_check,
        "look for faults: report, and a list of what to leave out",
        (
            _option("--out", metavar="FOLDER", help="folder of the reports (default: <storage.root>/checks)"),
            _option(
                "--against",
                metavar="NAME=FILE",
                action="append",
                default=[],
                help="scene ids of an evaluation set, one a line, that must not occur (may be repeated)",
            ),
        ),
    ),
    "data pairs": Verb(
        commands.data_pairs,
        "find the pairs of views that see the same things, and say how they are spread",
        (_option("--out", metavar="FOLDER", help="folder of the pages (default: <storage.root>/pairs)"),),
    ),
    "data questions": Verb(
        commands.data_questions,
        "write questions with exact answers, referring expressions and captions",
        (_option("--out", metavar="FOLDER", help="folder of the files (default: <storage.root>/questions)"),),
    ),
    "data show": Verb(
        commands.data_show,
        "draw a scene: cameras from above, pictures, depth, masks, points",
        (
            _option("scene", help="a scene, as SCENE or SOURCE/SCENE"),
            _option("--out", metavar="FOLDER", help="folder of the page (default: <storage.root>/show/SCENE)"),
        ),
    ),
    "features warm": Verb(
        commands.features_warm,
        "encode what is not stored yet",
        (
            _ENCODER,
            _option("--source", metavar="NAME", default="", help="only this source"),
            _option("--split", action="append", default=[], choices=["train", "val", "test"], help="only this split"),
        ),
    ),
    "features stats": Verb(commands.features_stats, "say what the cache holds"),
    "features verify": Verb(
        commands.features_verify,
        "encode a sample of what is stored again, and compare",
        (
            _ENCODER,
            _option("--sample", metavar="N", type=int, default=16, help="inputs to encode again (16)"),
            _option("--tolerance", metavar="X", type=float, default=1e-3, help="largest 1 - cosine (0.001)"),
        ),
    ),
    "features why": Verb(
        commands.features_why,
        "say why a sample's features are stored or not",
        (_option("sample", help="a sample, as SOURCE/SCENE or with its view"), _ENCODER),
    ),
    "features gc": Verb(
        commands.features_gc,
        "remove features",
        (
            _option("--keep", metavar="NAME", action="append", default=[], help="encoder or fingerprint to keep"),
            _option("--budget", metavar="BYTES", type=int, help="remove the oldest until this many bytes are left"),
        ),
    ),
    "report": Verb(
        commands.report,
        "write the report of a run again",
        (
            _option("run", help="run folder"),
            _option("--against", metavar="RUN", help="run on the same data whose metrics stand beside, with margins"),
        ),
        configured=False,
    ),
    "config show": Verb(commands.config_show, "print the composed configuration as YAML"),
    "config keys": Verb(
        commands.config_keys,
        "print every key with its type, default and meaning",
        (_option("pattern", nargs="?", default="", help="only keys that contain this"),),
        configured=False,
    ),
    "models": Verb(
        commands.models,
        "list the models",
        (_option("pattern", nargs="?", default="*", help="a glob, such as 'probe-*'"),),
        configured=False,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 0 done, 1 not fine (a check), 2 refused, 130 interrupted."""
    threads.share_cores()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"loom3d {_version()}")
        return 0
    name, rest = _find(arguments)
    if name not in VERBS:
        return _unknown(name, rest)
    args = _parser(name, VERBS[name]).parse_intermixed_args(rest)
    return _run(VERBS[name], args)


def _run(verb: Verb, args: argparse.Namespace) -> int:
    try:
        with logs.terminal(debug=args.debug):
            return verb.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has enough; keep the interpreter from complaining about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if args.debug or not _is_users(error):
            raise
        place = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        why = f"{place or 'the disk'}: {error.strerror or error}"
        print(f"loom3d: {why}; look at the path, who may write there, and the space that is left", file=sys.stderr)
        return USER_ERROR
    except _user_errors() as error:  # evaluated only when something was raised: the tuple's module imports torch
        if args.debug:
            raise
        kind = "" if type(error).__name__ == "ConfigError" else f"{type(error).__name__}: "
        print(f"loom3d: {kind}{error}", file=sys.stderr)
        return USER_ERROR


def _is_users(error: OSError) -> bool:
    """Whether an error is of a file or a disk, which the user can change; others are ours."""
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def _user_errors() -> tuple[type[BaseException], ...]:
    from services.errors import USER_ERRORS

    return USER_ERRORS


def _find(arguments: list[str]) -> tuple[str, list[str]]:
    """(verb, what follows it); verbs of a group have two words."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in VERBS:
            return name, arguments[words:]
    return arguments[0], arguments[1:]


def _unknown(name: str, rest: list[str]) -> int:
    group = [verb for verb in VERBS if verb.startswith(f"{name} ")]
    wanted = next((word for word in rest if not word.startswith("-")), "")
    if group and not wanted:
        print(f"usage: loom3d {name} VERB ...\n\n" + _table(group))
        return 0 if rest else USER_ERROR
    asked = f"{name} {wanted}" if group else name
    close = difflib.get_close_matches(asked, VERBS, n=1, cutoff=0.5)
    hint = f" Did you mean `loom3d {close[0]}`?" if close else ""
    print(f"loom3d: there is no verb `{asked}`.{hint} Verbs: {', '.join(VERBS)}", file=sys.stderr)
    return USER_ERROR


def _parser(name: str, verb: Verb) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"loom3d {name}", description=verb.help, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show tracebacks, and all that Ray and its workers print")
    for option in verb.options:
        parser.add_argument(option.name, **option.settings)
    if verb.configured:
        parser.add_argument("--config", metavar="FILE", help="start from a saved configuration (config.yaml of a run)")
        parser.add_argument("overrides", nargs="*", help="group=option or key=value; see `loom3d config keys`")
    return parser


def _overview() -> str:
    return f"{_INTRO}\nverbs (loom3d VERB --help says more):\n{_table(list(VERBS))}"


def _table(names: Sequence[str]) -> str:
    width = max(len(name) for name in names) + 2
    return "\n".join(f"  {name:<{width}}{VERBS[name].help}" for name in names)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("loom3d")
    except PackageNotFoundError:  # shipped as a folder by `ray job submit`, not installed
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
