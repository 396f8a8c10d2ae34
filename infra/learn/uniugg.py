"""Does UniUGG learn? Its chain at size tiny on more rooms than the demo's, with the paper's ablations, judged apart.

``make learn NAME=uniugg`` trains what is not trained yet, run after run, each in a process of its own, and writes the
evaluation of every run and the claims that follow from them to ``models/uniugg/results``. It may be stopped at any
time (or by ``--budget``) and goes on where it was. ``--table`` prints what is there as Markdown and trains nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from infra.learn.runs import Job, arguments, carry_out, check, chosen, conclude, job, read
from infra.learn.uniugg_claims import claims

RESULTS = Path(__file__).parents[2] / "models" / "uniugg" / "results"

#: Of every run: as `loom3d train` reads it.
COMMON = (
    "size=tiny",
    "cluster=inline",
    "logger=quiet",
    "trainer.threads=1",
    "data.rooms.scenes=240",
    "data.rooms.views=8",
    "evaluate.samples=200",
)
QUICK = (
    "data.rooms.scenes=12",
    "data.rooms.views=6",
    "evaluate.samples=4",
    "trainer.steps=4",
    "trainer.warmup_steps=1",
    "trainer.checkpoint_every=0",
    "trainer.validate_every=0",
)

#: The teacher of the first phase, which at tiny is random, in the place of the encoder that learns from it.
TEACHER = (
    "encoders.vit.family=radio",
    "encoders.vit.weights=random",
    "encoders.vit.seed=1000",
    "encoders.vit.layers=[]",
    "encoders.vit.arch={hidden_size: 96, num_hidden_layers: 4, num_attention_heads: 3, patch_size: 16, "
    "num_cls_tokens: 4, num_registers: 4, summary_idxs: [0, 1, 2]}",
)
GEOMETRY_ONLY = ("recipe.losses.semantic_tokens=0", "recipe.losses.semantic_summary=0")

#: Of every run of the third phase. Its questions are about single pictures: those about whole rooms, which are asked of
#: eight pictures and need more than a language model of this size picks up, are left to larger ones.
THIRD = ("data=rooms-single", "evaluate.samples=400", "trainer.micro_batch=8", "trainer.lr=1e-3")
ALIGN = ("trainer.micro_batch=16",)

#: What more of the first phase gives; the phases behind it go on from the shorter one.
LONG = ("trainer.steps=4000",)

#: Optimiser steps by recipe.
STEPS = {
    "uniugg_encoder": 2000,
    "uniugg_vae": 900,
    "uniugg_align": 1000,
    "uniugg_joint": 1200,
    "uniugg_finetune": 400,
    "uniugg_direct": 1200,
}


def command(one: Job, root: Path, *, quick: bool, lpips: str) -> list[str]:
    """Overrides of ``loom3d train``."""
    trunk = (f"evaluate.lpips_weights={lpips}",) if lpips else ()
    third = (*THIRD, *(ALIGN if one.recipe == "uniugg_align" else ())) if one.phase == "p3" else ()
    steps = f"trainer.steps={STEPS[one.recipe]}"
    return one.command(root, *COMMON, *third, steps, *trunk, *one.overrides, *(QUICK if quick else ()))


def chain(seed: int, *, kind: str = "", encoder: Sequence[str] = (), vit: Sequence[str] = ()) -> list[Job]:
    """Encoder, VAE, alignment and joint stage; ``kind`` marks an ablation.

    Args:
        seed: of all of them.
        kind: "", or the letter of the ablation.
        encoder: what is different in the first phase.
        vit: an encoder in the place of what the first phase trains, which is then left out.
    """
    end = f"-{kind}" if kind else ""
    trained = f"encoder{end}-{seed}"
    decoder = f"encoder-{seed}" if vit else trained  # an encoder that nothing was trained with starts from ours
    reads = tuple(vit) or (f"encoders.vit.weights=run:{trained}/encoder",)
    jobs = [] if vit else [job("p1", f"encoder{end}", "uniugg_encoder", seed, *encoder)]
    jobs += [
        job("p2", f"vae{end}", "uniugg_vae", seed, *reads, f"model.init.spatial_decoder=run:{decoder}/spatial_decoder"),
        job("p3", f"align{end}", "uniugg_align", seed, *reads),
        job(
            "p3",
            f"joint{end}",
            "uniugg_joint",
            seed,
            *joint_inputs(seed, end, reads),
            f"model.init.llm={llm(seed, end)}",
        ),
    ]
    return jobs


def llm(seed: int, end: str = "") -> str:
    """The language model after alignment."""
    return f"run:align{end}-{seed}/llm"


def joint_inputs(seed: int, end: str, reads: Sequence[str]) -> tuple[str, ...]:
    """Encoders of the stages that imagine: the ViT, and both ways of the VAE behind it."""
    vae = f"run:vae{end}-{seed}/vae"
    return (*reads, f"encoders.vae.weights={vae}", f"encoders.reconstruction.weights={vae}")


def jobs(seeds: int) -> list[Job]:
    """All runs, in the order in which they are worth having: what all claims need first, further seeds last."""
    reads = ("encoders.vit.weights=run:encoder-0/encoder",)
    start = "model.init.spatial_decoder=run:encoder-0/spatial_decoder"
    tuned = ("model.init.llm=run:joint-0/llm", "model.init.diffusion=run:joint-0/diffusion")
    found = [
        *chain(0),
        job("p2", "vae-c", "uniugg_vae", 0, *reads, start, "recipe.uniugg.finetune_spatial_decoder=false"),
        job("p3", "direct", "uniugg_direct", 0, *reads, f"model.init.llm={llm(0)}"),
        job("p3", "finetune", "uniugg_finetune", 0, *joint_inputs(0, "", reads), *tuned),
    ]
    found += [job("p1", "encoder-long", "uniugg_encoder", seed, *LONG) for seed in range(seeds)]
    found += chain(0, kind="b", encoder=GEOMETRY_ONLY)
    found += chain(0, kind="a", vit=TEACHER)
    for seed in range(1, seeds):
        found += chain(seed)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, collect, and print the claims."""
    parser = arguments(__doc__, "uniugg", RESULTS, ("p1", "p2", "p3"), budget=120.0)
    parser.add_argument("--seeds", type=int, default=2, help="seeds of the main line; ablations have one")
    parser.add_argument("--lpips", default=_alexnet(), help="AlexNet trunk of LPIPS (folder or file); without it, PSNR")
    args = parser.parse_args(argv)
    if not args.table:
        root = check(args, RESULTS)
        wanted = chosen(args, jobs(args.seeds))
        carry_out(args, root, {one: command(one, root, quick=args.quick, lpips=args.lpips) for one in wanted})
    return conclude(args, "uniugg", claims(read(args.out)))


def _alexnet() -> str:
    """The trunk beside the other weights that tests read, where there is one."""
    folder = Path(os.environ.get("LOOM3D_WEIGHTS", "/nowhere")) / "alexnet"
    return str(folder) if folder.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
