"""Does UniUGG learn? Its chain at size tiny on more rooms than the demo's, with the paper's ablations, judged apart.

``make learn NAME=uniugg`` trains what is not trained yet, run after run, each in a process of its own, and writes the
evaluation of every run and the claims that follow from them to ``models/uniugg/results``. It may be stopped at any
time (or by ``--budget``) and goes on where it was. ``--table`` prints what is there as Markdown and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.learn.uniugg_claims import claims, markdown

RESULTS = Path(__file__).parents[2] / "models" / "uniugg" / "results"
DONE = "learn.json"
"""In a run folder: how the run was called and how long it took, once it is over."""

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

#: Optimiser steps by recipe.
STEPS = {
    "uniugg_encoder": 2000,
    "uniugg_vae": 900,
    "uniugg_align": 1000,
    "uniugg_joint": 1200,
    "uniugg_finetune": 400,
    "uniugg_direct": 1200,
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the experiment."""

    phase: str
    """p1 | p2 | p3."""
    part: str
    """What it is among those of a seed: encoder, vae, vae-c, ..."""
    recipe: str
    seed: int
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the run folder and of the result."""
        return f"{self.part}-{self.seed}"

    def command(self, root: Path, *, quick: bool, lpips: str) -> list[str]:
        """Overrides of ``loom3d train``, each key once."""
        given = [
            f"recipe={self.recipe}",
            *COMMON,
            f"storage.root={root}",
            f"name={self.name}",
            f"seed={self.seed}",
            f"trainer.steps={STEPS[self.recipe]}",
            *((f"evaluate.lpips_weights={lpips}",) if lpips else ()),
            *self.overrides,
            *(QUICK if quick else ()),
        ]
        return [f"{key}={value}" for key, value in dict(text.split("=", 1) for text in given).items()]


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


def job(phase: str, part: str, recipe: str, seed: int, *overrides: str) -> Job:
    """A :class:`Job`."""
    return Job(phase=phase, part=part, recipe=recipe, seed=seed, overrides=overrides)


def llm(seed: int, end: str = "") -> str:
    """The language model after alignment."""
    return f"run:align{end}-{seed}/llm"


def joint_inputs(seed: int, end: str, reads: Sequence[str]) -> tuple[str, ...]:
    """Encoders of the stages that imagine: the ViT, and both ways of the VAE behind it."""
    vae = f"run:vae{end}-{seed}/vae"
    return (*reads, f"encoders.vae.weights={vae}", f"encoders.reconstruction.weights={vae}")


def jobs(seeds: int, joint_seeds: int) -> list[Job]:
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
    further = {seed: chain(seed) for seed in range(1, max(seeds, joint_seeds))}
    found += chain(0, kind="b", encoder=GEOMETRY_ONLY)
    found += chain(0, kind="a", vit=TEACHER)
    found += [one for seed, made in further.items() if seed < seeds for one in made if one.phase != "p3"]
    found += [one for seed, made in further.items() if seed < joint_seeds for one in made if one.phase == "p3"]
    return found


def finished(one: Job, root: Path, command: Sequence[str]) -> bool:
    """Whether a run is over. SystemExit when its folder holds the run of another call."""
    path = root / "runs" / one.name / DONE
    if not path.exists():
        return False
    if json.loads(path.read_text())["command"] != list(command):
        raise SystemExit(f"{path.parent} was trained by another call than this one; give another --root, or remove it")
    return True


def ready(one: Job, waiting: Sequence[Job]) -> bool:
    """Whether no run is waiting, or under way, whose weights ``one`` reads."""
    return not any(f"run:{other.name}/" in text for other in waiting for text in one.overrides)


def train(todo: Sequence[tuple[Job, Sequence[str]]], root: Path, *, parallel: int, end: float) -> Iterator[Job]:
    """Train and judge, ``parallel`` runs at a time and each from its newest checkpoint; yields those that are over.

    A run starts when those are over whose weights it reads. At the time ``end`` (of the monotonic clock) what is
    under way is stopped. SystemExit with the status of a run that fails.
    """
    waiting = list(todo)
    running: dict[subprocess.Popen[bytes], tuple[Job, Sequence[str], float]] = {}
    try:
        while waiting or running:
            pending = [one for one, _ in waiting] + [one for one, *_ in running.values()]
            for one, command in list(waiting):
                if len(running) < parallel and ready(one, pending):
                    waiting.remove((one, command))
                    print(f"== {one.name}: {one.recipe}", file=sys.stderr, flush=True)
                    process = subprocess.Popen([sys.executable, "-m", "actors", "train", *command])
                    running[process] = (one, command, time.monotonic())
            for process, (one, command, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[process]
                if process.returncode:
                    raise SystemExit(process.returncode)
                called = {"command": list(command), "seconds": round(time.monotonic() - began, 1)}
                (root / "runs" / one.name / DONE).write_text(json.dumps(called, indent=1))
                yield one
            if time.monotonic() > end:
                return
            time.sleep(0.2)
    finally:
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:  # started with the signal ignored, as a shell does behind "&"
                process.kill()
                process.wait()


def collect(one: Job, root: Path, out: Path) -> None:
    """Copy what a run came to, and how it was called, into ``<out>/<name>.json``. The root is left out."""
    folder = root / "runs" / one.name
    called = json.loads((folder / DONE).read_text())
    tables = json.loads((folder / "tables.json").read_text()) if (folder / "tables.json").exists() else []
    evaluation = json.loads((folder / "evaluation.json").read_text())
    result = {
        "name": one.name,
        "recipe": one.recipe,
        "seed": one.seed,
        "overrides": [text for text in called["command"] if str(root) not in text and "_weights=" not in text],
        "seconds": called["seconds"],
        **evaluation,
        "tables": [table for table in tables if not table["title"].startswith("Questions")],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{one.name}.json").write_text(json.dumps(result, indent=1) + "\n")


def read(out: Path) -> dict[str, dict[str, Any]]:
    """Name -> result, of all that are there."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*-[0-9]*.json"))]
    return {result["name"]: result for result in found}


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, collect, and print the claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="~/loom3d/learn-uniugg", help="storage.root of these runs")
    parser.add_argument("--phase", action="append", choices=("p1", "p2", "p3"), default=[], help="only these phases")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only these runs")
    parser.add_argument("--seeds", type=int, default=2, help="seeds of the first two phases")
    parser.add_argument("--joint-seeds", type=int, default=1, help="seeds of the third phase")
    parser.add_argument("--budget", type=float, default=120.0, help="minutes after which it stops; call again to go on")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, each with one thread")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: does it run at all?")
    parser.add_argument("--lpips", default=_alexnet(), help="AlexNet trunk of LPIPS (folder or file); without it, PSNR")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the claims from the results that are there")
    args = parser.parse_args(argv)
    if not args.table:
        _run(args)
    found = read(args.out)
    if not found:
        print(f"{args.out} holds no results; run `make learn NAME=uniugg` first", file=sys.stderr)
        return 1
    made = claims(found)
    if not args.table:
        (args.out / "claims.json").write_text(json.dumps(made, indent=1) + "\n")
    print(markdown(made))
    return 0


def _run(args: argparse.Namespace) -> None:
    """Train and collect within the budget."""
    if args.quick and args.out == RESULTS:
        raise SystemExit("--quick makes no figures: give it a folder of its own with --out")
    root, end = Path(args.root).expanduser().absolute(), time.monotonic() + 60 * args.budget
    chosen = jobs(args.seeds, args.joint_seeds)
    names = [one.name for one in chosen]
    if unknown := [name for name in args.only if name not in names]:
        raise SystemExit(f"--only {unknown[0]}: no such run; there are: {', '.join(names)}")
    wanted = [
        one
        for one in chosen
        if (not args.phase or one.phase in args.phase) and (not args.only or one.name in args.only)
    ]
    commands = {one.name: one.command(root, quick=args.quick, lpips=args.lpips) for one in wanted}
    done = [one for one in wanted if finished(one, root, commands[one.name])]
    for one in done:
        collect(one, root, args.out)
    todo = [(one, commands[one.name]) for one in wanted if one not in done]
    for number, one in enumerate(train(todo, root, parallel=args.parallel, end=end), start=1):
        collect(one, root, args.out)
        print(f"== {one.name} is over, {len(todo) - number} left", file=sys.stderr, flush=True)
        done.append(one)
    if len(done) < len(wanted):
        print(f"{args.budget:g} minutes are over; the same call goes on", file=sys.stderr)


def _alexnet() -> str:
    """The trunk beside the other weights that tests read, where there is one."""
    folder = Path(os.environ.get("LOOM3D_WEIGHTS", "/nowhere")) / "alexnet"
    return str(folder) if folder.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
