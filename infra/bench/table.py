"""``python -m infra.bench.table joint``: the committed results of a group of benchmarks as a Markdown table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_SIGNS = {">=": "≥", "<=": "≤"}


def table(lines: Sequence[Mapping[str, Any]], rows: Mapping[str, tuple[str, str]]) -> str:
    """A row for each benchmark in the order of ``rows`` (name -> what is measured, what it is compared with).

    Of several lines of one benchmark the last counts. ValueError for figures of a smoke test.
    """
    found = {line["name"]: line for line in lines}
    out = ["| name | what | measured | baseline | ratio | target |", "| --- | --- | --- | --- | --- | --- |"]
    for name, (what, against) in rows.items():
        if name not in found:
            continue
        line = found[name]
        if line["extra"].get("quick"):
            raise ValueError(f"{name} was measured with --quick, which gives no figures; measure it again without")
        target, met = line["target"], "" if line["met"] else ", **missed**"
        ratio = "–" if line["ratio"] is None else f"{line['ratio']:.2f}"
        out.append(
            f"| {name} | {what} | {_number(line['value'], line['unit'])} | {_number(line['baseline'], line['unit'])}, "
            f"{against} | {ratio} | {target['on']} {_SIGNS[target['op']]} {target['limit']:g}{met} |"
        )
    return "\n".join(out)


def _number(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 2**20:.1f} MiB"
    return f"{value:.3g}" if unit == "ratio" else f"{value:.3g} {unit}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a group that describes its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=("joint", "spa3r"))
    parser.add_argument("--results", type=Path, help="default: infra/bench/results/<group>.jsonl")
    args = parser.parse_args(argv)
    path = args.results or RESULTS / f"{args.group}.jsonl"
    if not path.exists():
        print(f"{path} does not exist: run `make bench NAME={args.group} ARGS='--out {path}'` first", file=sys.stderr)
        return 1
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    print(table(lines, import_module(f"infra.bench.{args.group}").ROWS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
