"""How Spa3R is judged: the curve over context views, whose latents stand for no scene, and the scores."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from actors.recipes.pictures import Album
from actors.recipes.spa3r_judge import (
    CONTEXT_DEPTH,
    COPY,
    MODEL,
    PATCH_DEPTH,
    SCENE,
    STRANGER,
    TYPICAL,
    FieldScores,
    Seen,
    Typical,
    curve_rows,
    draw_curve,
    look,
    nested_sets,
    strangers_of,
)
from models.registry import build
from models.spa3r.model import GEO, Spa3R
from services.contracts import PlanSample, Role, ViewRole

GRID, CHANNELS = (2, 3), 16


def view_set(item: str, roles: str) -> PlanSample:
    views = tuple(
        ViewRole(index=2 * place, role=Role.TARGET if role == "t" else Role.CONTEXT) for place, role in enumerate(roles)
    )
    return PlanSample(id=f"rooms/{item}#view_set0", source="rooms", item=item, kind="view_set", views=views, seed=0)


def test_context_views_join_one_by_one_before_the_same_targets() -> None:
    sample = view_set("a", "ctcctct")
    sets = nested_sets(sample)
    targets = {view.index for view in sample.views if view.role == Role.TARGET}
    contexts = []
    for made in sets:
        assert made.id == sample.id
        assert {view.index for view in made.views if view.role == Role.TARGET} == targets
        assert [view.index for view in made.views] == sorted(view.index for view in made.views)
        assert made.views[0] == sample.views[0]
        contexts.append({view.index for view in made.views if view.role == Role.CONTEXT})
    assert [len(context) for context in contexts] == [1, 2, 3, 4]
    assert all(fewer < more for fewer, more in pairwise(contexts))
    assert sets[-1] == sample
    assert nested_sets(sample) == sets
    joined = [next(iter(nested_sets(view_set(name, "cccccc"))[1].views[1:])).index for name in "abcdefgh"]
    assert len(set(joined)) > 1


def test_a_stranger_is_of_another_scene() -> None:
    samples = [view_set(name, "ct") for name in ("a", "a", "b", "a")]
    assert strangers_of(samples) == [2, 2, 3, 2]
    assert strangers_of(samples[:2]) == [None, None]


@pytest.fixture(scope="module")
def module() -> Spa3R:
    torch.manual_seed(0)
    made = build("spa3r-tiny", channels=CHANNELS, targets={GEO: CHANNELS}, queries=4)
    assert isinstance(made, Spa3R)
    return made.eval()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    pose = torch.zeros(2, 3, 9)
    pose[..., :3] = torch.rand(2, 3, 3, generator=draw)
    pose[..., 6:] = 1.0
    return {
        "tokens": torch.randn(2, 3, 1, *GRID, CHANNELS, generator=draw),
        "pose": pose,
        "depth": 1 + torch.rand(2, 3, *GRID, generator=draw),
        "roles": torch.tensor([[False, True, False], [False, False, True]]),
        "size": torch.tensor([[28, 42], [28, 42]]),
        "weight": torch.ones(2),
    }


def test_latents_of_another_scene_and_training_means_stand_beside_the_model(module: Spa3R) -> None:
    given = batch()
    typical = Typical(features={GEO: torch.ones(6, CHANNELS)}, depth=torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 2.0]))
    seen = look(module, given, [GEO], typical=typical, strangers=[1, None])
    plain = look(module, given, [GEO])
    assert set(plain.guesses[GEO]) == {MODEL, COPY, SCENE}
    assert torch.equal(seen.guesses[GEO][MODEL], plain.guesses[GEO][MODEL])
    stranger = seen.guesses[GEO][STRANGER]
    assert bool(stranger[1].isnan().all())
    swapped = {name: column.clone() for name, column in given.items()}
    swapped["tokens"][0, [0, 2]] = given["tokens"][1, [0, 1]]  # the context of the other set, before its own camera
    expected = look(module, swapped, [GEO]).guesses[GEO][MODEL]
    torch.testing.assert_close(stranger[0], expected[0])
    assert not torch.allclose(stranger[0], seen.guesses[GEO][MODEL][0])
    scores = FieldScores()
    scores.update(seen)
    row = scores.rows()["geo/cosine"]
    assert list(row["also"]) == [SCENE, TYPICAL, STRANGER]
    assert scores.means.count(f"geo/{STRANGER}") == 1
    depth = scores.rows()["depth_probe/abs_rel"]
    assert (depth["baseline_name"], list(depth["also"])) == ("mean depth", [PATCH_DEPTH, CONTEXT_DEPTH])
    true = torch.stack([given["depth"][0, 1], given["depth"][1, 2]]).flatten(1)
    assert depth["baseline"] == pytest.approx(float(((true - 1.5).abs() / true).mean()))
    assert typical.depth is not None
    assert depth["also"][PATCH_DEPTH] == pytest.approx(float(((true - typical.depth).abs() / true).mean()))


def scored(*values: float) -> FieldScores:
    scores = FieldScores()
    for cosine in values:
        true = torch.tensor([1.0, 0.0]).expand(1, 1, 1, 2)
        guess = torch.tensor([cosine, (1 - cosine**2) ** 0.5]).expand(1, 1, 1, 2)
        guesses = {GEO: {MODEL: guess, COPY: true, SCENE: true}}
        at = torch.zeros(1, 1, dtype=torch.long)
        scores.update(Seen(truth={GEO: true}, guesses=guesses, depth=None, depths={}, contexts=1, targets=at))
    return scores


def test_the_curve_is_a_table_and_what_all_views_are_worth_a_metric(tmp_path: Path) -> None:
    curve = {2: scored(0.8, 0.6), 1: scored(0.5, 0.3)}
    (metric,) = curve_rows(curve, [GEO]).items()
    assert metric[0] == "geo/cosine with 2 context views"
    assert (metric[1]["value"], metric[1]["baseline"]) == (pytest.approx(0.7), pytest.approx(0.4))
    album = Album(tmp_path)
    draw_curve(album, curve)
    album.save()
    (table,) = json.loads((tmp_path / "tables.json").read_text())
    assert table["columns"] == ["context views", "view sets", "geo/model", f"geo/{COPY}", f"geo/{SCENE}"]
    assert [row[:2] for row in table["rows"]] == [[1, 2], [2, 2]]
    assert curve_rows({1: scored(0.5)}, [GEO]) == {}
