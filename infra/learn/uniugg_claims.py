"""What the results of :mod:`infra.learn.uniugg` say of each claim: the figure of every seed, and whether it holds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Mapping[str, Any]]
"""Name of a run (part-seed) -> its result."""
Claim = dict[str, Any]

UNTRAINED, ORIGINALS, MEAN_PICTURE = "untrained network", "originals, first decoder", "mean training picture"
COPY, PLANE, POSED_PLANE = "copying the reference", "mean-depth plane", "mean-depth plane, true pose given"
BLIND = "best image-blind baseline"
BINS = "Imagined views by how far the camera moved"

#: A match must be this many times likelier than chance to beat it by a wide margin.
WIDE = 10.0


def claims(results: Results) -> list[Claim]:
    """Every claim of which there are results, in order. A claim has the runs, figures, mean, spread, and verdict.

    A claim holds when it does for every seed.
    """
    made = [*_first(results), *_second(results), *_answers(results), *_views(results), *_compared(results)]
    return [claim for claim in made if claim["figures"]]


def markdown(made: Sequence[Claim]) -> str:
    """The claims as a Markdown table."""
    lines = ["| phase | claim | figure | limit | holds |", "| --- | --- | --- | --- | --- |"]
    for claim in made:
        spread = f" ± {claim['spread']:.3g}" if len(claim["figures"]) > 1 else ""
        lines.append(
            f"| {claim['phase']} | {claim['claim']} | {claim['mean']:.3g}{spread} | {claim['limit']} | "
            f"{'yes' if claim['holds'] else '**no**'} |"
        )
    return "\n".join(lines)


# -- one claim -----------------------------------------------------------------------------------------------


def _claim(phase: str, text: str, op: str, limit: float, figures: Mapping[str, float | None]) -> Claim:
    """A figure of each run against a limit; runs without the figure are left out."""
    there = {name: value for name, value in figures.items() if value is not None}
    values = list(there.values())
    holds = {">": lambda v: v > limit, ">=": lambda v: v >= limit, "<": lambda v: v < limit, "<=": lambda v: v <= limit}
    return {
        "phase": phase,
        "claim": text,
        "figures": there,
        "mean": statistics.fmean(values) if values else 0.0,
        "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
        "limit": f"{op} {limit:g}",
        "holds": bool(values) and all(holds[op](value) for value in values),
    }


def _runs(results: Results, part: str) -> dict[str, Mapping[str, Any]]:
    """The runs of one part, by name: one a seed."""
    return {name: result for name, result in results.items() if name.rpartition("-")[0] == part}


def _metric(result: Mapping[str, Any], name: str, beside: str = "") -> float | None:
    """A metric of a result, or what stands beside it under a name; None where that was not measured."""
    row = result["metrics"].get(name)
    if row is None:
        return None
    if not beside:
        return float(row["value"])
    found = row["baseline"] if row["baseline_name"] == beside else row.get("also", {}).get(beside)
    return None if found is None else float(found)


def _values(runs: Results, name: str) -> dict[str, float | None]:
    return {run: _metric(result, name) for run, result in runs.items()}


def _ratios(runs: Results, name: str, beside: str) -> dict[str, float | None]:
    """A metric over what stands beside it."""
    return {run: _ratio(_metric(result, name), _metric(result, name, beside)) for run, result in runs.items()}


def _differences(runs: Results, name: str, beside: str) -> dict[str, float | None]:
    """A metric less what stands beside it."""
    return {run: _difference(_metric(result, name), _metric(result, name, beside)) for run, result in runs.items()}


def _apart(runs: Results, others: Results, part: str, name: str) -> dict[str, float | None]:
    """A metric of the runs less that of the run of ``part`` of the same seed; only where there are both."""
    pairs = {run: f"{part}-{run.rpartition('-')[2]}" for run in runs}
    return {
        run: _difference(_metric(runs[run], name), _metric(others[other], name))
        for run, other in pairs.items()
        if other in others
    }


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


# -- the first two phases ------------------------------------------------------------------------------------


def _first(results: Results) -> list[Claim]:
    runs = _runs(results, "encoder")
    errors = [
        _claim("P1", f"pointmap error of {view} / {beside}", "<", 1.0, _ratios(runs, f"points/{view}_error", beside))
        for view in ("view1", "view2")
        for beside in (PLANE, *((POSED_PLANE,) if view == "view2" else ()), UNTRAINED)
    ]
    learnt = _differences(runs, "tokens/cosine", UNTRAINED)
    colours = _differences(runs, "rgb/psnr", "mean colour")
    return [
        *errors,
        _claim("P1", "match accuracy / chance", ">=", WIDE, _ratios(runs, "matches/accuracy", "chance")),
        _claim("P1", "token cosine to the teacher", ">=", 0.9, _values(runs, "tokens/cosine")),
        _claim("P1", f"token cosine to the teacher − {UNTRAINED}", ">", 0.0, learnt),
        _claim("P1", "PSNR of the RGB head − mean colour, dB", ">", 0.0, colours),
    ]


def _second(results: Results) -> list[Claim]:
    runs, frozen = _runs(results, "vae"), _runs(results, "vae-c")
    depth = _ratios(runs, "depth/abs_rel", ORIGINALS)
    worse = {
        name: _ratio(_metric(result, "depth/abs_rel"), _metric(runs[f"vae-{seed}"], "depth/abs_rel"))
        for name, result in frozen.items()
        if f"vae-{(seed := name.rpartition('-')[2])}" in runs
    }
    return [
        _claim("P2", "cosine of reconstructed tokens", ">=", 0.9, _values(runs, "tokens/cosine")),
        _claim("P2", "depth AbsRel from reconstructions / from originals by P1's decoder", "<=", 1.3, depth),
        _claim("P2", "(c) depth AbsRel without decoder finetuning / with it", ">", 1.0, worse),
    ]


# -- the third phase -----------------------------------------------------------------------------------------


def _answers(results: Results) -> list[Claim]:
    return [
        _claim(
            "P3",
            f"{name.removeprefix('answers/')} after {part} − {BLIND}",
            ">",
            0.0,
            _differences(_runs(results, part), name, BLIND),
        )
        for part in ("joint", "finetune")
        for name in _answer_names(_runs(results, part))
    ]


def _answer_names(runs: Results) -> list[str]:
    return sorted({name for result in runs.values() for name in result["metrics"] if name.startswith("answers/")})


def _views(results: Results) -> list[Claim]:
    """Imagined views against copying the reference and against what is known without looking, also by bins."""
    runs, score = _runs(results, "joint"), _score(results)
    made = [
        _claim("P3", f"imagined views, {name} − {other}", _better(runs, name), 0.0, _differences(runs, name, other))
        for name, last in ((score, MEAN_PICTURE), ("depth/abs_rel", PLANE), ("points/chamfer", PLANE))
        for other in (COPY, last)
    ]
    return [*made, *_by_bins(runs, "depth AbsRel", f"AbsRel, {COPY}"), *_picture_bins(runs)]


def _picture_bins(runs: Results) -> list[Claim]:
    for score in ("lpips", "psnr"):
        made = _by_bins(runs, f"{score}, colours", f"{score}, {COPY}")
        if made:
            return made
    return []


def _by_bins(runs: Results, column: str, other: str) -> list[Claim]:
    """The same by bins of angle and of distance, from the table that the evaluation wrote."""
    found: dict[str, dict[str, float]] = {}
    for name, result in runs.items():
        for table in result.get("tables", ()):
            if table["title"] != BINS or column not in table["columns"] or other not in table["columns"]:
                continue
            mine, theirs = table["columns"].index(column), table["columns"].index(other)
            for row in table["rows"]:
                if isinstance(row[mine], float | int) and isinstance(row[theirs], float | int):
                    found.setdefault(str(row[0]), {})[name] = row[mine] - row[theirs]
    op = ">" if column.startswith("psnr") else "<"
    return [
        _claim("P3", f"imagined views, {column} − {COPY}, {where}", op, 0.0, figures)
        for where, figures in found.items()
    ]


def _compared(results: Results) -> list[Claim]:
    """Diffusion against the direct variant, and our encoder against (a) the teacher and (b) geometry alone."""
    made, joint = [], _runs(results, "joint")
    views = (_score(results), "depth/abs_rel", "points/chamfer")
    for part, label, names in (
        ("direct", "diffusion − direct variant (d)", views),
        ("joint-a", "our encoder − teacher's features (a)", (*views, *_answer_names(joint))),
        ("joint-b", "our encoder − geometry alone, as MASt3R's (b)", (*views, *_answer_names(joint))),
    ):
        others = _runs(results, part)
        made += [
            _claim("P3", f"{label}, {name}", _better(joint, name), 0.0, _apart(joint, others, part, name))
            for name in names
        ]
    return made


def _better(runs: Results, name: str) -> str:
    """The sign of an improvement."""
    rows = [result["metrics"][name] for result in runs.values() if name in result["metrics"]]
    return ">" if rows and rows[0]["better"] == "higher" else "<"


def _score(results: Results) -> str:
    """The score of pictures: LPIPS where it was measured."""
    there = any("rgb/lpips" in result["metrics"] for result in _runs(results, "joint").values())
    return "rgb/lpips" if there else "rgb/psnr"
