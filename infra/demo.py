"""``make demo``: UniUGG's chain at its smallest, from rooms to an imagined view, checked and told on one page.

Every phase is the command that a person would type, in a process of its own. At the end each phase must have a smaller
held-out loss than the same network before training, and one metric that is better too; otherwise the status is 1.
A phase that is finished already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEFORE = ("untrained network", "before training")
"""Names of baselines that are the network before training."""
LOSSES = ("loss", "text/ce", "diffusion/noise_mse")
"""Names under which evaluations report held-out losses."""


@dataclass(frozen=True)
class Phase:
    """One run of the chain."""

    recipe: str
    what: str
    overrides: tuple[str, ...] = ("cluster=inline",)

    @property
    def run(self) -> str:
        """Name of the run folder."""
        return f"{self.recipe}-tiny"


PHASES = (
    Phase("uniugg_encoder", "a student ViT learns points, matches and colours from pairs of views"),
    Phase("uniugg_vae", "its tokens are squeezed into a latent that the spatial decoder can still read"),
    Phase("uniugg_align", "a language model learns to read those tokens"),
    Phase("uniugg_joint", "language model and diffusion learn together, two worker groups on Ray", ()),
    Phase("uniugg_finetune", "the same on spatial questions, in one process"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chain; 0 when every phase beats its untrained self."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True, help="storage.root: data, cache and runs lie below")
    arguments, overrides = parser.parse_known_args(argv)
    root = Path(arguments.root).expanduser().absolute()
    began, times = time.monotonic(), {}
    for phase in PHASES:
        print(f"\n== {phase.recipe}: {phase.what}", flush=True)
        start = time.monotonic()
        loom3d("train", f"recipe={phase.recipe}", "size=tiny", f"storage.root={root}", *phase.overrides, *overrides)
        times[phase.run] = time.monotonic() - start
    print("\n== a view that nobody took, and what the model says of it", flush=True)
    last = root / "runs" / PHASES[-1].run
    imagined = root / "demo" / "imagined"
    loom3d("generate", "--run", str(last), *reference(last), "--yaw", "15", "--out", str(imagined))
    loom3d("ask", "--run", str(last), *reference(last), "--imagine", "--yaw", "15", "--caption")
    faults = [fault for phase in PHASES for fault in check(root / "runs" / phase.run)]
    page = write_page(root, times, imagined, faults)
    print(f"\n{time.monotonic() - began:.0f} s. Open {page}")
    for fault in faults:
        print(f"NOT REACHED: {fault}")
    return 1 if faults else 0


def loom3d(*arguments: str) -> None:
    """Run a command of ours and wait; SystemExit with its status when it fails."""
    done = subprocess.run([sys.executable, "-m", "actors", *arguments], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def reference(run: Path) -> tuple[str, ...]:
    """A held-out picture to imagine from: the first view of the first scene that the evaluation drew."""
    shown = json.loads((run / "pictures.json").read_text())
    if not shown:
        raise SystemExit(f"{run}/pictures.json is empty: the evaluation imagined nothing; see its log")
    scene = shown[0]["title"].partition("#")[0]
    return "--image", scene, "--view", "0"


def check(run: Path) -> list[str]:
    """What of a run is not better than before training: the loss, and at least one metric. Empty when all is well."""
    metrics = json.loads((run / "evaluation.json").read_text())["metrics"]
    losses = [name for name in metrics if name in LOSSES]
    faults = [
        f"{run.name}: {name} has no untrained loss beside it" for name in losses if untrained(metrics[name]) is None
    ]
    if not losses:
        faults.append(f"{run.name}: evaluation.json has no loss")
    faults += [
        f"{run.name}: {name} is {metrics[name]['value']:.4g}, untrained {untrained(metrics[name]):.4g}"
        for name in losses
        if untrained(metrics[name]) is not None and not better(metrics[name])
    ]
    if not any(better(row) for name, row in metrics.items() if name not in losses):
        faults.append(f"{run.name}: no metric beats the untrained network")
    return faults


def untrained(row: Mapping[str, Any]) -> float | None:
    """What the network before training scores in a row of evaluation.json; None where it was not asked."""
    if row.get("baseline_name") in BEFORE:
        return row["baseline"]
    return next((value for name, value in row.get("also", {}).items() if name in BEFORE), None)


def better(row: Mapping[str, Any]) -> bool:
    """Whether the trained network is better than the untrained one."""
    before = untrained(row)
    if before is None:
        return False
    return bool(row["value"] < before if row["better"] == "lower" else row["value"] > before)


def write_page(root: Path, times: Mapping[str, float], imagined: Path, faults: Sequence[str]) -> Path:
    """One page over the reports of all phases: their figures beside the baselines, and where to look further."""
    import jinja2

    runs = []
    for phase in PHASES:
        folder = root / "runs" / phase.run
        evaluation = json.loads((folder / "evaluation.json").read_text())
        runs.append(
            {
                "name": phase.run,
                "what": phase.what,
                "seconds": times[phase.run],
                "report": f"../runs/{phase.run}/report/index.html",
                "samples": evaluation["samples"],
                "metrics": evaluation["metrics"],
            }
        )
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((Path(__file__).parent / "demo.html.j2").read_text())
    path = root / "demo" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    viewer = imagined.relative_to(path.parent) / "index.html"
    path.write_text(template.render(runs=runs, viewer=str(viewer), faults=faults), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
