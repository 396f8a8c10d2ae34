"""Does pretraining show? The probe on DINOv2-S against the same network at random initialisation, held-out rooms.

``make learn NAME=probe ARGS='--weights FOLDER'`` trains both on the same rooms for every seed, prints one JSON
object, and writes it to ``models/probe/results/dinov2_small.json``. The folder is a transformers-style DINOv2-S.
Rooms and features are kept under ``--root`` and reused by a second run.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import configs
from actors import driver
from actors.report import write_report

RESULTS = Path(__file__).parents[2] / "models" / "probe" / "results" / "dinov2_small.json"

#: The committed configuration: as `loom3d train` reads it, but for the weights, the seed and the name.
SETTINGS = (
    "recipe=probe",
    "size=small",
    "data=rooms",
    "cluster=inline",
    "logger=quiet",
    "data.rooms.scenes=48",
    "data.rooms.views=8",
    "data.rooms.width=320",
    "data.rooms.height=240",
    "encoders.features.height=154",
    "encoders.features.width=154",
    "trainer.steps=200",
    "trainer.validate_every=100",
    "trainer.checkpoint_every=0",
    "cache.codec=none",
)

#: The architecture of DINOv2-S, for the network at random initialisation.
ARCH = "{hidden_size: 384, num_hidden_layers: 12, num_attention_heads: 6, patch_size: 14}"


def run(root: Path, weights: str, seed: int) -> dict[str, Any]:
    """Metrics of one run, as in evaluation.json. ``weights`` is a folder or "random"."""
    kind = "random" if weights == "random" else "pretrained"
    overrides = [
        *SETTINGS,
        f"storage.root={root}",
        f"name=learn-{kind}-{seed}",
        f"seed={seed}",
        f"encoders.features.weights={weights}",
        *((f"encoders.features.arch={ARCH}", f"encoders.features.seed={seed}") if kind == "random" else ()),
    ]
    return dict(driver.train(configs.load(overrides)).metrics)


def summarise(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Per metric: mean and standard deviation over the seeds for both initialisations, and the trivial baseline."""
    first = runs["pretrained"][0]
    table: dict[str, Any] = {}
    for name, row in first.items():
        entry: dict[str, Any] = {"better": row["better"], "baseline_name": row["baseline_name"]}
        entry["baseline"] = (
            statistics.fmean(r[name]["baseline"] for r in runs["pretrained"]) if (row["baseline"] is not None) else None
        )
        for kind, results in runs.items():
            values = [result[name]["value"] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            entry[kind] = {"mean": statistics.fmean(values), "stdev": spread, "values": values}
        table[name] = entry
    return table


def main() -> None:
    """Run every seed with both initialisations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="folder of DINOv2-S weights")
    parser.add_argument("--root", default="~/loom3d/learn", help="storage.root of these runs")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    root = Path(args.root).expanduser()
    runs: dict[str, list[dict[str, Any]]] = {"pretrained": [], "random": []}
    for seed in range(args.seeds):
        for kind, weights in (("pretrained", args.weights), ("random", "random")):
            runs[kind].append(run(root, weights, seed))
        print(write_report(root / "runs" / f"learn-pretrained-{seed}", root / "runs" / f"learn-random-{seed}"))
    result = {"settings": list(SETTINGS), "seeds": list(range(args.seeds)), "metrics": summarise(runs)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
