"""What the results of :mod:`infra.learn.spa3r` say of each claim: the figure of every seed, and whether it holds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from infra.learn.claims import Claim, Results, apart, differences, make_claim, of_part, ratios

FIELDS = {"field": "tiny", "field-dinov2": "DINOv2-S"}
"""Part -> phase, as the table says it."""
HEADS = ("geo", "sem")
COPY, SCENE = "nearest context view", "scene mean"
TYPICAL, STRANGER = "mean of training views", "another scene's context"
DEPTHS = ("mean depth", "mean depth of the context")
CURVE, VIEWS = "By the number of context views", "context views"

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
    """Every kind of geometry against guessing by the training answers, and against a model that saw no picture."""
    blind, made = of_part(results, BLIND_MODEL), []
    for kind, label in GEOMETRY.items():
        runs = of_part(results, kind)
        for name in answer_names(runs):
            score = f"{name.removeprefix('answers/')}, {label}"
            made += [
                make_claim("VLM", f"{score} − {BLIND_GUESS}", ">", 0.0, differences(runs, name, BLIND_GUESS)),
                make_claim("VLM", f"{score} − image-blind model", ">", 0.0, apart(runs, blind, BLIND_MODEL, name)),
            ]
    return made


def _order(results: Results) -> list[Claim]:
    """The paper's order of the kinds of geometry."""
    made = []
    for better, worse in ORDER:
        runs, others = of_part(results, better), of_part(results, worse)
        made += [
            make_claim(
                "VLM",
                f"{name.removeprefix('answers/')}, {GEOMETRY[better]} − {GEOMETRY[worse]}",
                ">",
                0.0,
                apart(runs, others, worse, name),
            )
            for name in answer_names(runs)
        ]
    return made


def answer_names(runs: Results) -> list[str]:
    """Metrics that are scores of answers."""
    return sorted({name for result in runs.values() for name in result["metrics"] if name.startswith("answers/")})
