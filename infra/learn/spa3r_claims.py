"""What the results of :mod:`infra.learn.spa3r` say of each claim: the figure of every seed, and whether it holds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from infra.learn.claims import Claim, Results, apart, differences, make_claim, of_part, ratios, values

FIELDS = {"field": "tiny", "field-dinov2": "DINOv2-S"}
"""Part -> phase, as the table says it."""
HEADS = ("geo", "sem")
COPY, SCENE = "nearest context view", "scene mean"
TYPICAL, STRANGER = "mean of training views", "another scene's context"
DEPTHS = ("mean depth", "mean depth of the context", "mean depth map")
CURVE, VIEWS = "By the number of context views", "context views"

ANSWERED = "Answers about"
"""Beginning of the title of a table of scores by type of question."""
BLIND_GUESS = "best image-blind baseline"
BLIND_MODEL = "blind"
GEOMETRY = {
    "none": "no geometry", "vggt": "VGGT features", "append": "Spa3R appended", "cross": "Spa3R by cross-attention",
}  # fmt: skip
#: The paper's Tables 3 and 5: which geometry scores above which.
ORDER = (("vggt", "none"), ("append", "none"), ("cross", "none"), ("cross", "vggt"), ("cross", "append"))


def claims(results: Results) -> list[Claim]:
    """Every claim of which there are results, in order. One holds when it does for every seed."""
    made = [claim for part in FIELDS for claim in _field(results, part)] + _answers(results) + _order(results)
    return [claim for claim in made if claim["figures"]]


def _field(results: Results, part: str) -> list[Claim]:
    """Features at unseen views beside what is known without the model, and without the scene; depth; the curve."""
    runs, phase = of_part(results, part), FIELDS[part]
    cosines = [
        make_claim(phase, f"{head} cosine − {beside}", ">", 0.0, differences(runs, f"{head}/cosine", beside))
        for head in HEADS
        for beside in (COPY, SCENE, TYPICAL, STRANGER)
    ]
    depths = [
        make_claim(phase, f"depth probe AbsRel / {beside}", "<", 1.0, ratios(runs, "depth_probe/abs_rel", beside))
        for beside in DEPTHS
    ]
    return [*cosines, *depths, *(claim for head in HEADS for claim in _curve(runs, phase, head))]


def _curve(runs: Results, phase: str, head: str) -> list[Claim]:
    """Each number of context views against the one before it, at the same unseen views."""
    curves = {name: curve for name, result in runs.items() if len(curve := curve_of(result, f"{head}/model")) > 1}
    counts = sorted({count for curve in curves.values() for count in curve})
    steps = [(after, before) for before, after in itertools.pairwise(counts)]
    return [
        make_claim(
            phase,
            f"{head} cosine, {after} − {before} context views",
            ">",
            0.0,
            {name: curve[after] - curve[before] for name, curve in curves.items() if {before, after} <= set(curve)},
        )
        for after, before in steps
    ]


def curve_of(result: Mapping[str, Any], column: str) -> dict[int, float]:
    """Number of context views -> a column of the table that the evaluation wrote; {} without it."""
    for table in result.get("tables", ()):
        if table["title"] == CURVE and column in table["columns"]:
            place, value = table["columns"].index(VIEWS), table["columns"].index(column)
            return {int(row[place]): float(row[value]) for row in table["rows"]}
    return {}


def _answers(results: Results) -> list[Claim]:
    """Every kind of geometry, by type of question, against guessing by the training answers and against a model that
    saw no picture.
    """
    blind, made = of_part(results, BLIND_MODEL), []
    for kind, label in GEOMETRY.items():
        runs = of_part(results, kind)
        for asked in question_types(runs):
            scores, guesses = by_type(runs, asked), by_type(runs, asked, "guessing")
            made += [
                make_claim("VLM", f"{asked}, {label} − {BLIND_GUESS}", ">", 0.0, less(scores, guesses)),
                make_claim(
                    "VLM", f"{asked}, {label} − image-blind model", ">", 0.0, less(scores, by_type(blind, asked))
                ),
            ]
    return made


def _order(results: Results) -> list[Claim]:
    """The paper's order of the kinds of geometry: of the mean over types, and of each."""
    made = []
    for better, worse in ORDER:
        runs, others = of_part(results, better), of_part(results, worse)
        label = f"{GEOMETRY[better]} − {GEOMETRY[worse]}"
        made += [
            make_claim("VLM", f"mean over types, {label}", ">", 0.0, apart(runs, others, worse, name))
            for name in answer_names(runs)
        ]
        made += [
            make_claim("VLM", f"{asked}, {label}", ">", 0.0, less(by_type(runs, asked), by_type(others, asked)))
            for asked in question_types(runs)
        ]
    return made


def answer_names(runs: Results) -> list[str]:
    """Metrics that are scores of answers."""
    return sorted({name for result in runs.values() for name in result["metrics"] if name.startswith("answers/")})


def question_types(runs: Results) -> list[str]:
    """Types of question that were asked."""
    return sorted({row[0] for result in runs.values() for table in _answered(result) for row in table["rows"]})


def by_type(runs: Results, asked: str, column: str = "score") -> dict[str, float]:
    """Run -> what the answers to one type of question score; or a guess, with ``column`` guessing."""
    return {
        name: float(row[table["columns"].index(column)])
        for name, result in runs.items()
        for table in _answered(result)
        for row in table["rows"]
        if row[0] == asked
    }


def less(figures: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float | None]:
    """Figures of runs less those of others of the same seeds; only where there are both."""
    by_seed = {name.rpartition("-")[2]: value for name, value in others.items()}
    return {
        name: value - by_seed[seed] for name, value in figures.items() if (seed := name.rpartition("-")[2]) in by_seed
    }


def _answered(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [table for table in result.get("tables", ()) if table["title"].startswith(ANSWERED)]


def scores(results: Results) -> str:
    """What each kind of geometry scores by type of question, mean and deviation over seeds, as a Markdown table."""
    labels = {**GEOMETRY, BLIND_MODEL: "image-blind model"}
    runs = {kind: found for kind in labels if (found := of_part(results, kind))}
    types = sorted({asked for found in runs.values() for asked in question_types(found)})
    if not types:
        return ""
    lines = [f"| | {' | '.join(types)} | cross-entropy |", f"| --- {'| --- ' * (len(types) + 1)}|"]
    guesses = {
        asked: [value for found in runs.values() for value in by_type(found, asked, "guessing").values()]
        for asked in types
    }
    lines.append(f"| {BLIND_GUESS} | {' | '.join(spread_of(guesses[asked][:1]) for asked in types)} | |")
    for kind, found in runs.items():
        cells = [spread_of(list(by_type(found, asked).values())) for asked in types]
        entropies = [value for value in values(found, "text/ce").values() if value is not None]
        lines.append(f"| {labels[kind]} | {' | '.join(cells)} | {spread_of(entropies)} |")
    return "\n".join(lines)


def spread_of(found: Sequence[float]) -> str:
    """Mean, and deviation where there are several."""
    if not found:
        return ""
    return f"{fmean(found):.3f}" + (f" ± {stdev(found):.3f}" if len(found) > 1 else "")
