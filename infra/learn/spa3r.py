"""Do Spa3R and Spa3-VLM learn? Fields at tiny and with DINOv2-S, and a language model with each kind of geometry.

``make learn NAME=spa3r`` trains what is not trained yet, run after run, each in a process of its own, and writes the
evaluation of every run and the claims that follow from them to ``models/spa3r/results``. It may be stopped at any time
(or by ``--budget``) and goes on where it was. ``--table`` prints what is there as Markdown and trains nothing.

VGGT is random at this size, and its depth then nearly constant. Of the depth head the last layer is made larger
(:data:`DEPTH_GAIN`), so that there is a map to read; it is a function of the pictures, not their depth.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from infra.learn.runs import Job, arguments, carry_out, check, chosen, conclude, job, merged, read
from infra.learn.spa3r_claims import claims, scores
from infra.learn.spa3r_questions import ASKED, BLIND, write_questions

if TYPE_CHECKING:
    from models.encoders.vggt.model import Vggt

RESULTS = Path(__file__).parents[2] / "models" / "spa3r" / "results"
PRETRAIN, SMALL, VLM = PHASES = ("pretrain", "small", "vlm")

#: Of every run: as `loom3d train` reads it.
COMMON = (
    "cluster=inline",
    "logger=quiet",
    "trainer.threads=1",
    "trainer.validate_every=0",
    "trainer.checkpoint_every=0",
    "data.rooms.scenes=600",
    "data.rooms.views=8",
)
QUICK = (
    "data.rooms.scenes=12",
    "trainer.steps=4",
    "trainer.warmup_steps=1",
    "evaluate.samples=4",
)

#: One random VGGT for all runs, written by :func:`write_vggt`.
VGGT = (
    "encoders.patches.arch={}",
    "encoders.patches.weights=run:vggt/vggt",
    "encoders.views.arch={}",
    "encoders.views.weights=run:vggt/vggt",
)
VGGT_SEED, DEPTH_GAIN = 0, 100.0

FIELD = ("recipe.view_set.views=[4,8]", "recipe.view_set.plans_per_scene=3", "evaluate.samples=100", *VGGT)
"""A field sees each room in three sets of four to eight of its eight views; the curve is of a hundred of them."""
FIELD_TINY = ("size=tiny", *FIELD, "trainer.steps=800", "trainer.micro_batch=8", "trainer.warmup_steps=50")
#: The network of size small and the real DINOv2-S, behind the tiny VGGT on pictures of its size, for one CPU core.
FIELD_SMALL = (
    "size=small",
    *FIELD,
    "recipe.view_set.interval=[1,2]",
    "data.rooms.width=160",
    "data.rooms.height=120",
    "encoders.patches.height=84",
    "encoders.patches.width=112",
    "encoders.patches.dtype=float32",
    "encoders.views.dtype=float32",
    "encoders.semantic.height=84",
    "encoders.semantic.width=112",
    "encoders.semantic.dtype=float32",
    "service.threads=1",
    "trainer.precision=float32",
    "trainer.steps=1800",
    "trainer.micro_batch=8",
    "trainer.warmup_steps=50",
)

#: All questions of the chosen types are judged, each beside what an image-blind guess scores.
ANSWERS = (
    "size=tiny",
    "data=rooms",
    "data.sources.asked.format=questions",
    "recipe.spa3_vlm.baseline=off",
    "recipe.spa3_vlm.questions_per_sample=8",
    "evaluate.samples=0",
    "generate.max_new_tokens=8",
    "trainer.micro_batch=4",
    "trainer.warmup_steps=20",
    *VGGT,
)
#: Every kind of geometry goes on from one language model, which learns to answer without; so does the one without.
BASE_STEPS, STEPS = 500, 250
BLIND_BATCH = 13
GEOMETRY = ("none", "vggt", "append", "cross")


def jobs(seeds: int, small_seeds: int) -> list[Job]:
    """All runs, in the order in which they are worth having.

    Args:
        seeds: of the fields at tiny, and of the language models behind them.
        small_seeds: of the field with DINOv2-S (0: without it).
    """
    fields = [job(PRETRAIN, "field", "spa3r_pretrain", seed, *FIELD_TINY) for seed in range(seeds)]
    small = [job(SMALL, "field-dinov2", "spa3r_pretrain", seed, *FIELD_SMALL) for seed in range(small_seeds)]
    return [*fields[:1], *small[:1], *fields[1:], *(one for seed in range(seeds) for one in answers(seed)), *small[1:]]


def answers(seed: int) -> list[Job]:
    """The language models of a seed: without pictures, the base, and what goes on from it with each geometry."""
    # Without pictures there is nothing to share, and a sample is one question: as many of them a step as others see.
    blind = (f"trainer.steps={BASE_STEPS + STEPS}", f"trainer.micro_batch={BLIND_BATCH}")
    made = [
        job(VLM, "base", "spa3_vlm", seed, *ANSWERS, *geometry("none", seed), f"trainer.steps={BASE_STEPS}"),
        job(VLM, BLIND, "spa3_vlm", seed, *ANSWERS, *geometry("none", seed), *blind),
    ]
    start = (f"model.init.llm=run:base-{seed}/llm", f"trainer.steps={STEPS}")
    return [
        *made,
        *(job(VLM, kind, "spa3_vlm", seed, *ANSWERS, *geometry(kind, seed), *start) for kind in GEOMETRY),
    ]


def geometry(kind: str, seed: int) -> tuple[str, ...]:
    """What a language model knows of space, and the field of the same seed where it is of that."""
    return (f"recipe.spa3_vlm.geometry={kind}", f"encoders.spa3r.weights=run:field-{seed}/spa3r")


def command(one: Job, root: Path, *, quick: bool, weights: str) -> list[str]:
    """Overrides of ``loom3d train``; ``weights`` is the folder that holds dinov2-small."""
    questions = root / "questions" / (BLIND if one.part == BLIND else ASKED)
    asked = (f"data.sources.asked.root={questions}",) if one.phase == VLM else ()
    dinov2 = (f"encoders.semantic.weights={weights}/dinov2-small",) if one.phase == SMALL else ()
    return one.command(root, *COMMON, *one.overrides, *asked, *dinov2, *(QUICK if quick else ()))


def write_vggt(folder: Path) -> None:
    """A random vggt-tiny whose depth varies, as part ``vggt`` of a run; nothing where it is there."""
    from models.encoders.vggt.model import Vggt
    from models.encoders.weights import seeded
    from models.pretrained import CONFIG, save_pretrained
    from models.registry import build

    if (folder / CONFIG).is_file():
        return
    network = seeded(lambda: build("vggt-tiny"), VGGT_SEED)
    assert isinstance(network, Vggt), "the name is of a Vggt"
    stretch_depth(network, DEPTH_GAIN)
    save_pretrained(network, folder, "vggt-tiny", {}, extra={"depth_gain": DEPTH_GAIN})


def stretch_depth(network: Vggt, gain: float) -> None:
    """Make the logarithm of the depth ``gain`` times as varied, around 0 for noise in the place of pictures."""
    import torch

    last = network.depth_head.get_submodule("scratch.output_conv2.2")
    assert isinstance(last, torch.nn.Conv2d), "the head ends with a convolution"
    assert last.bias is not None, "with a bias"
    with torch.no_grad():
        noise = torch.rand(1, 2, 3, 84, 112, generator=torch.Generator().manual_seed(VGGT_SEED))
        last.weight[0] *= gain
        last.bias[0] = 0.0
        depth = network.eval()(noise).depth
        last.bias[0] = -depth.log().mean()


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, collect, and print the claims."""
    parser = arguments(__doc__, "spa3r", RESULTS, PHASES, budget=120.0)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the fields at tiny and of the language models")
    parser.add_argument("--small-seeds", type=int, default=1, help="seeds of the field with DINOv2-S")
    parser.add_argument(
        "--weights",
        default=os.environ.get("LOOM3D_WEIGHTS", ""),
        help="folder that holds dinov2-small (default $LOOM3D_WEIGHTS); without it, no phase small",
    )
    args = parser.parse_args(argv)
    if not args.table:
        root = check(args, RESULTS)
        if not args.weights:
            print("neither --weights nor $LOOM3D_WEIGHTS: the runs with DINOv2-S are left out", file=sys.stderr)
        wanted = chosen(args, jobs(args.seeds, args.small_seeds if args.weights else 0))
        prepare(root, wanted, quick=args.quick)
        carry_out(args, root, {one: command(one, root, quick=args.quick, weights=args.weights) for one in wanted})
    found = read(args.out)
    if table := scores(found):
        print(table, end="\n\n")
    return conclude(args, "spa3r", claims(found))


def prepare(root: Path, wanted: Sequence[Job], *, quick: bool) -> None:
    """Make what no run makes: the random VGGT, and the questions."""
    write_vggt(root / "runs" / "vggt" / "weights" / "vggt")
    if any(one.phase == VLM for one in wanted):
        import configs
        from services.data.questions.ondemand import ensure_annotations
        from services.data.sources import open_sources

        settings = ["recipe=spa3_vlm", "size=tiny", "data=rooms", f"storage.root={root}", *COMMON]
        config = configs.load(merged([*settings, *(QUICK if quick else ())]))
        rooms = open_sources(config)["rooms"]
        counts = write_questions(ensure_annotations(rooms, config.data.questions, config.storage), root / "questions")
        print(f"questions: {counts}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
