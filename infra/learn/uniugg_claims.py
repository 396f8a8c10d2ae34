"""What the results of :mod:`infra.learn.uniugg` say of each claim: the figure of every seed, and whether it holds."""

from __future__ import annotations

from infra.learn.claims import Claim, Results, apart, differences, make_claim, metric, of_part, ratio, ratios, values

UNTRAINED, ORIGINALS, MEAN_PICTURE = "untrained network", "originals, first decoder", "mean training picture"
COPY, STILL = "copying the reference", "the reference's own features"
PLANE, POSED_PLANE = "mean-depth plane", "mean-depth plane, true pose given"
BLIND = "best image-blind baseline"
BINS = "Imagined views by how far the camera moved"
TYPES, SCORES = "Answers about", ("score", "guessing")
"""Tables of answers by type, and what is compared in them."""

#: A match must be this many times likelier than chance to beat it by a wide margin.
WIDE = 10.0


def claims(results: Results) -> list[Claim]:
    """Every claim of which there are results, in order. A claim has the runs, figures, mean, spread, and verdict.

    A claim holds when it does for every seed.
    """
    made = [*_first(results), *_second(results), *_answers(results), *_views(results), *_compared(results)]
    return [claim for claim in made if claim["figures"]]


# -- the first two phases ------------------------------------------------------------------------------------


def _first(results: Results) -> list[Claim]:
    return [*_pairs(of_part(results, "encoder")), *_pairs(of_part(results, "encoder-long"), ", longer")]


def _pairs(runs: Results, which: str = "") -> list[Claim]:
    """Pointmaps, matches, tokens and colours of the first phase; ``which`` ends each claim."""
    errors = [
        (f"pointmap error of {view} / {beside}", "<", 1.0, ratios(runs, f"points/{view}_error", beside))
        for view in ("view1", "view2")
        for beside in (PLANE, *((POSED_PLANE,) if view == "view2" else ()), UNTRAINED)
    ]
    found = [
        *errors,
        ("match accuracy / chance", ">=", WIDE, ratios(runs, "matches/accuracy", "chance")),
        ("token cosine to the teacher", ">=", 0.9, values(runs, "tokens/cosine")),
        (f"token cosine to the teacher − {UNTRAINED}", ">", 0.0, differences(runs, "tokens/cosine", UNTRAINED)),
        ("PSNR of the RGB head − mean colour, dB", ">", 0.0, differences(runs, "rgb/psnr", "mean colour")),
    ]
    return [make_claim("P1", text + which, op, limit, figures) for text, op, limit, figures in found]


def _second(results: Results) -> list[Claim]:
    runs, frozen = of_part(results, "vae"), of_part(results, "vae-c")
    depth = ratios(runs, "depth/abs_rel", ORIGINALS)
    worse = {
        name: ratio(metric(result, "depth/abs_rel"), metric(runs[f"vae-{seed}"], "depth/abs_rel"))
        for name, result in frozen.items()
        if f"vae-{(seed := name.rpartition('-')[2])}" in runs
    }
    return [
        make_claim("P2", "cosine of reconstructed tokens", ">=", 0.9, values(runs, "tokens/cosine")),
        make_claim("P2", "depth AbsRel from reconstructions / from originals by P1's decoder", "<=", 1.3, depth),
        make_claim("P2", "(c) depth AbsRel without decoder finetuning / with it", ">", 1.0, worse),
    ]


# -- the third phase -----------------------------------------------------------------------------------------


def _answers(results: Results) -> list[Claim]:
    """Answers beside the best blind strategy, over all types and by type."""
    made = []
    for part in ("joint", "finetune"):
        runs = of_part(results, part)
        found = {
            f"answers, {name.removeprefix('answers/')}, after {part}": differences(runs, name, BLIND)
            for name in _answer_names(runs)
        }
        found |= {f"answers, {kind}, after {part}": rows for kind, rows in _in_tables(runs, TYPES, *SCORES).items()}
        made += [make_claim("P3", f"{text} − {BLIND}", ">", 0.0, figures) for text, figures in found.items()]
    return made


def _answer_names(runs: Results) -> list[str]:
    return sorted({name for result in runs.values() for name in result["metrics"] if name.startswith("answers/")})


def _views(results: Results) -> list[Claim]:
    """Imagined views against copying the reference and against what is known without looking, also by bins."""
    runs, score = of_part(results, "joint"), _score(results)
    made = [
        make_claim("P3", f"imagined views, {name} − {other}", _better(runs, name), 0.0, differences(runs, name, other))
        for name, last in ((score, MEAN_PICTURE), ("depth/abs_rel", PLANE), ("points/chamfer", PLANE))
        for other in (COPY, STILL, last)
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
    op = ">" if column.startswith("psnr") else "<"
    return [
        make_claim("P3", f"imagined views, {column} − {COPY}, {where}", op, 0.0, figures)
        for where, figures in _in_tables(runs, BINS, column, other).items()
    ]


def _in_tables(runs: Results, title: str, column: str, other: str) -> dict[str, dict[str, float | None]]:
    """First field of each row of the tables of a title -> run -> one column less another, where both are numbers."""
    found: dict[str, dict[str, float | None]] = {}
    for name, result in runs.items():
        for table in result.get("tables", ()):
            if not table["title"].startswith(title) or not {column, other} <= set(table["columns"]):
                continue
            mine, theirs = table["columns"].index(column), table["columns"].index(other)
            for row in table["rows"]:
                if isinstance(row[mine], float | int) and isinstance(row[theirs], float | int):
                    found.setdefault(str(row[0]), {})[name] = row[mine] - row[theirs]
    return found


def _compared(results: Results) -> list[Claim]:
    """Diffusion against the direct variant, and our encoder against (a) the teacher and (b) geometry alone."""
    made, joint = [], of_part(results, "joint")
    views = (_score(results), "depth/abs_rel", "points/chamfer")
    for part, label, names in (
        ("direct", "diffusion − direct variant (d)", views),
        ("joint-a", "our encoder − teacher's features (a)", (*views, *_answer_names(joint))),
        ("joint-b", "our encoder − geometry alone, as MASt3R's (b)", (*views, *_answer_names(joint))),
    ):
        others = of_part(results, part)
        made += [
            make_claim("P3", f"{label}, {name}", _better(joint, name), 0.0, apart(joint, others, part, name))
            for name in names
        ]
    return made


def _better(runs: Results, name: str) -> str:
    """The sign of an improvement."""
    rows = [result["metrics"][name] for result in runs.values() if name in result["metrics"]]
    return ">" if rows and rows[0]["better"] == "higher" else "<"


def _score(results: Results) -> str:
    """The score of pictures: LPIPS where it was measured."""
    there = any("rgb/lpips" in result["metrics"] for result in of_part(results, "joint").values())
    return "rgb/lpips" if there else "rgb/psnr"
