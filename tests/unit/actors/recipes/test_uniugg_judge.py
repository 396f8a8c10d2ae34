"""UniUGG's third phase on rooms: every number of an evaluation against what it must be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import configs
from actors.recipes import Built, open_recipe, uniugg_answers
from actors.recipes.pictures import Album
from actors.recipes.samples import load_samples, planned, spread
from actors.recipes.uniugg_answers import (
    ASKED,
    BLIND,
    UNTAUGHT,
    TokenReader,
    benchmark_of,
    headline,
    judge_answers,
    questions_of,
)
from actors.recipes.uniugg_judge import BEFORE, Losses, evaluate
from actors.recipes.uniugg_views import COPY, OWN, PLANE, STILL, TRAINED, TrainingViews, ViewJudge, thinned
from actors.trainers.feed import Feed
from configs import RunConfig
from models.geometry.projection import transform, unproject
from models.metrics.images import psnr
from models.uniugg.pipeline import Imagined, Pipeline
from services.contracts import Question, Split
from services.data.pairs import open_pairs
from services.data.sources import open_sources
from services.features.client import FeatureClient
from services.features.sink import open_store
from services.streams.inputs import JUDGE, kind_inputs
from tests.support.uniugg_parts import make_run

ROOMS = [
    "data.rooms.scenes=5", "data.rooms.views=4", "data.rooms.width=80", "data.rooms.height=60", "logger.progress=off",
    "trainer.threads=1", "cluster=inline", "data.sources.questions.options.max_views=2",
]  # fmt: skip
FEW = ["evaluate.samples=4", "generate.steps=2", "generate.max_new_tokens=4"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judge")


@pytest.fixture(scope="module")
def joint(storage: Path) -> tuple[Path, RunConfig]:
    return make_run(storage, "uniugg_joint", *ROOMS, *FEW, "model.init.llm=random")


@pytest.fixture(scope="module")
def feed(joint: tuple[Path, RunConfig]) -> Iterator[Feed]:
    with opened(joint[1]) as found:
        yield found


class opened:  # noqa: N801 - used as a function
    """The feed of a run, closed at the end of the block."""

    def __init__(self, config: RunConfig) -> None:
        manifests, store = open_sources(config), open_store(config)
        open_pairs(config, manifests)
        self.client = FeatureClient(config, store)
        self.feed = Feed.open(config, manifests, self.client, store)

    def __enter__(self) -> Feed:
        return self.feed

    def __exit__(self, *_: object) -> None:
        self.feed.close()
        self.client.close()


def built(feed: Feed) -> dict[str, Built]:
    recipe = open_recipe(feed.config)
    found = {role: recipe.build(role, feed, feed.plan(Split.TRAIN)) for role in recipe.roles}
    return {role: replace(one, module=one.module.eval()) for role, one in found.items()}


@pytest.fixture(scope="module")
def evaluation(joint: tuple[Path, RunConfig], feed: Feed) -> dict[str, Any]:
    recipe = open_recipe(feed.config)
    return evaluate(recipe, built(feed), feed, joint[0], split=Split.TEST, device="cpu")


def test_an_untrained_model_scores_what_it_scored_before_training(evaluation: Mapping[str, Any]):
    metrics = evaluation["metrics"]
    for name in ("text/ce", "diffusion/noise_mse"):
        assert metrics[name]["baseline_name"] == BEFORE
        assert metrics[name]["value"] == metrics[name]["baseline"], "same weights, same draws"
    pictures = [f"{kind}/{score}" for kind in ("rgb", "projected") for score in ("psnr", "ssim")]
    for name in (*pictures, "depth/abs_rel", "depth/delta1", "points/chamfer", "tokens/cosine"):
        assert metrics[name]["value"] == metrics[name]["also"][BEFORE], name
        assert metrics[name]["baseline_name"] == COPY
    # Four tokens drawn out of 268 by a random network answer nothing; guessing from the training split does.
    answers = metrics[f"answers/vsibench, {ASKED}"]
    assert answers["value"] == answers["also"][BEFORE] < answers["baseline"]
    assert answers["baseline_name"] == BLIND
    assert not any("lpips" in name or "fid" in name or "kid" in name for name in metrics), "no weights were given"
    assert evaluation["samples"] == 8, "four pairs and four conversations"


def test_the_report_gets_pictures_and_tables(evaluation: Mapping[str, Any], joint: tuple[Path, RunConfig]):
    assert evaluation["metrics"]
    listed = json.loads((joint[0] / "pictures.json").read_text())
    assert listed
    assert all((joint[0] / entry["file"]).is_file() for entry in listed)
    assert "turned" in listed[0]["title"]
    tables = {table["title"]: table for table in json.loads((joint[0] / "tables.json").read_text())}
    bins = tables["Imagined views by how far the camera moved"]
    for quantity in ("angle", "distance"):
        assert sum(row[1] for row in bins["rows"] if row[0].startswith(quantity)) == 4, "each pair in one bin"
    assert sum(row[1] for row in tables["Answers about questions by type"]["rows"]) == 4
    assert len(tables["Questions about questions"]["rows"]) == 4


def test_copying_is_scored_by_the_pictures_themselves(evaluation: Mapping[str, Any], feed: Feed):
    with closing(feed.for_role(JUDGE)) as judge:
        chosen = spread(planned(judge, Split.TEST, "generation"), 4)
        found = []
        for batch, _ in load_samples(judge, chosen, split=Split.TEST, batch_size=3):
            image = batch["image"].movedim(-1, 2).float() / 255
            found += psnr(image[:, 0], image[:, 1]).tolist()
    assert len(found) == 4
    assert evaluation["metrics"]["rgb/psnr"]["baseline"] == pytest.approx(np.mean(found), abs=1e-6)
    assert evaluation["metrics"]["projected/psnr"]["baseline"] == pytest.approx(np.mean(found), abs=1e-6)


def test_losses_of_the_judge_are_those_of_the_roles(feed: Feed):
    recipe, roles = open_recipe(feed.config), built(feed)
    with closing(feed.for_role(JUDGE)) as judge:
        chosen = planned(judge, Split.TEST, "generation")[:2]
        ((batch, _),) = load_samples(judge, chosen, split=Split.TEST, batch_size=2)
        losses = Losses(recipe, roles)
        losses.update(batch)
        with torch.no_grad():
            sent = roles["llm"].spec.step(roles["llm"].module, batch, {}).outputs
            out = roles["diffusion"].spec.step(roles["diffusion"].module, batch, sent)
    assert losses.compute() == {"noise": pytest.approx(float(out.sums["noise"]) / batch["mean"].numel())}


# -- views ---------------------------------------------------------------------------------------------------


class Seer(Pipeline):
    """Imagines what is really there, at a distance ``stretch`` times the true one."""

    def __init__(self, batch: Mapping[str, Any], stretch: float = 1.0) -> None:
        self.truth, self.stretch = batch, stretch
        self.size, self.vae = tuple(batch["image"].shape[2:4]), None

    def imagine_tokens(self, tokens: torch.Tensor, K: torch.Tensor, pose: torch.Tensor, **_: Any) -> Imagined:
        """Asked as the roles were trained: from the reference's tokens, for the target's camera in its frame."""
        first, second = self.truth["pose"].double().unbind(1)
        torch.testing.assert_close(pose, (torch.linalg.inv(first) @ second).float())
        assert torch.equal(tokens, self.truth["tokens"][:, 0])
        assert torch.equal(K, self.truth["K"][:, 1])
        return self.decode(tokens, self.truth["target_tokens"][:, 0], K, pose)

    def decode(self, reference: torch.Tensor, target: torch.Tensor, K: torch.Tensor, pose: torch.Tensor) -> Imagined:
        depth, cameras, colours = self.truth["depth"], self.truth["K"], self.truth["image"].float() / 255
        sure = torch.ones_like(depth[:, 0]) * 9
        shown, stretch = (0, 1.0) if torch.equal(target, reference) else (1, self.stretch)
        if shown == 0:
            assert torch.equal(pose, torch.eye(4).expand(len(pose), 4, 4)), "the camera that does not move"
        return Imagined(
            tokens=target,
            K=K,
            pose=pose,
            reference_points=unproject(depth[:, 0], cameras[:, 0]),
            target_points=transform(stretch * unproject(depth[:, shown], cameras[:, shown]), pose),
            reference_confidence=sure,
            target_confidence=sure,
            reference_colours=colours[:, 0],
            target_colours=(colours[:, shown] + 0.01).clamp(0, 1),
            depth=stretch * depth[:, shown],
        )


def test_whoever_sees_the_truth_has_the_best_scores(feed: Feed, tmp_path: Path):
    with closing(feed.for_role(JUDGE)) as judge:
        chosen = spread(planned(judge, Split.TEST, "generation"), 3)
        ((batch, _),) = load_samples(judge, chosen, split=Split.TEST, batch_size=3)
        views = ViewJudge(judge, {TRAINED: Seer(batch), "farther": Seer(batch, 1.1)}, device="cpu")
        views.update(batch)
        survey = TrainingViews(judge)
    metrics = views.finish(Album(tmp_path))
    assert metrics["depth/abs_rel"]["value"] == pytest.approx(0, abs=1e-6)
    assert metrics["depth/abs_rel"]["also"]["farther"] == pytest.approx(0.1, abs=1e-4)
    assert metrics["depth/delta1"]["value"] == 1
    assert metrics["points/chamfer"]["value"] == pytest.approx(0, abs=1e-5)
    assert metrics["points/chamfer"]["also"]["farther"] > 0.01
    assert metrics["tokens/cosine"]["value"] == pytest.approx(1)
    assert metrics["rgb/psnr"]["value"] >= 40, "off by a hundredth at most"
    assert metrics["projected/psnr"]["value"] > 35, "its points fall back onto the pixels that they came from"
    assert metrics["projected/coverage"]["value"] > 0.99
    assert metrics["depth/abs_rel"]["also"][OWN] == metrics["depth/abs_rel"]["value"]
    # Baselines by their definitions: the picture and measured depth of the reference, a plane at the mean depth.
    depth = batch["depth"]
    known = (depth > 0).all(1)
    copied = [float(((a[0] - a[1]).abs() / a[1])[k].mean()) for a, k in zip(depth, known, strict=True)]
    assert metrics["depth/abs_rel"]["also"][STILL] == pytest.approx(np.mean(copied), rel=1e-3), "what copying gives"
    assert metrics["tokens/cosine"]["also"][STILL] == pytest.approx(metrics["tokens/cosine"]["baseline"])
    assert metrics["rgb/psnr"]["also"][STILL] == pytest.approx(metrics["rgb/psnr"]["baseline"], abs=0.5)
    plane = [float(((survey.depth - t).abs() / t)[t > 0].mean()) for t in depth[:, 1]]
    assert metrics["depth/abs_rel"]["baseline"] == pytest.approx(np.mean(copied), rel=1e-4)
    assert metrics["depth/abs_rel"]["also"][PLANE] == pytest.approx(np.mean(plane), rel=1e-4)
    assert survey.picture.shape == (112, 112, 3)
    assert 0 < float(survey.picture.mean()) < 1


def test_thinned_maps_keep_a_regular_grid():
    grid = torch.arange(112 * 112).view(1, 112, 112)
    assert thinned(grid).shape == (1, 56, 56)
    assert torch.equal(thinned(grid), grid[:, 1::2, 1::2])
    assert torch.equal(thinned(grid[:, :64, :64]), grid[:, :64, :64])


# -- answers -------------------------------------------------------------------------------------------------


def test_questions_with_their_benchmark(feed: Feed):
    asked = questions_of(feed, Split.TEST)
    assert set(asked) == {"questions"}, "captions ask nothing that has one answer"
    for one in asked["questions"]:
        assert one.prompt[-1].role == "user"
        assert one.question.answer not in [turn.text for turn in one.prompt]
    assert benchmark_of(feed.config, "questions", [one.question for one in asked["questions"]]) == "vsibench"
    colour = Question(id="q", type="colour", text="Which colour?", answer="red")
    assert benchmark_of(feed.config, "questions", [colour]) == "plain"
    blink = configs.load(["recipe=uniugg_align", "data=benchmark", "data.sources.benchmark.root=/b",
                          "data.sources.benchmark.options.name=blink"])  # fmt: skip
    assert benchmark_of(blink, "benchmark", []) == "blink"


def test_the_headline_is_the_benchmarks_own_or_says_what_it_is():
    assert headline("vsibench", {"overall": 0.4, "object_counting": 0.9}, {"object_counting": 0.9}) == ("vsibench", 0.4)
    assert headline("vsibench", {"object_counting": 0.9}, {"object_counting": 0.9, "route_planning": 0.1}) == (
        f"vsibench, {ASKED}",
        pytest.approx(0.5),
    )


def test_every_answer_reaches_its_question(feed: Feed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A model that knows the answers by heart is right everywhere, though it is asked scene by scene."""
    with closing(feed.for_role(JUDGE)) as judge:
        config = replace(judge.config, evaluate=replace(judge.config.evaluate, samples=0))
        judge = replace(judge, config=config)
        tokens = judge.client.outputs("vit")["tokens"].shape
        texts = uniugg_answers.TextColumns(config, int(tokens[1] or 0) * int(tokens[2] or 0))
        asked = questions_of(judge, Split.TEST)["questions"]
        scenes = {one.item.images for one in asked}
        answers: dict[tuple[int, ...], set[str]] = {}
        for one in asked:
            key = tuple(texts.question(one.prompt, len(one.item.images))["input_ids"].data.tolist())
            answers.setdefault(key, set()).add(one.question.answer)
        calls: list[int] = []

        def by_heart(
            llm: object, questions: Sequence[Sequence[int]], tokens: torch.Tensor, **_: object
        ) -> list[list[int]]:
            assert tokens.ndim == 4
            calls.append(len(questions))
            found = [next(iter(answers[tuple(question)])) for question in questions]
            return [texts.tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in found]

        monkeypatch.setattr(uniugg_answers, "generate_text", by_heart)
        llm = built(feed)["llm"].module
        reader = TokenReader(judge)
        metrics = judge_answers({TRAINED: llm}, judge, Album(tmp_path), split=Split.TEST, device="cpu", reader=reader)
    ((name, found),) = metrics.items()
    sure = all(len(true) == 1 for true in answers.values())
    assert name.startswith("answers/vsibench")
    assert found["value"] == 1 if sure else found["value"] > 0.9
    assert found["baseline"] < found["value"]
    assert sum(calls) == len(asked)
    assert len(calls) == len(scenes), "questions about the same pictures go together"


def test_a_question_that_is_too_long_is_not_asked(
    feed: Feed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    with closing(feed.for_role(JUDGE)) as judge:
        asked = questions_of(judge, Split.TEST)["questions"]
        tokens = judge.client.outputs("vit")["tokens"].shape
        texts = uniugg_answers.TextColumns(judge.config, int(tokens[1] or 0) * int(tokens[2] or 0))
        lengths = {
            one.question.id: len(texts.question(one.prompt, len(one.item.images))["input_ids"].data) for one in asked
        }
        limit = int(np.median(list(lengths.values())))
        data = replace(judge.config.data, text=replace(judge.config.data.text, max_length=limit))
        judge = replace(judge, config=replace(judge.config, data=data))
        monkeypatch.setattr(
            uniugg_answers, "generate_text", lambda llm, questions, tokens, **_: [[65] for _ in questions]
        )
        llm, reader = built(feed)["llm"].module, TokenReader(judge)
        found = uniugg_answers.answer(llm, asked, judge, reader, split=Split.TEST, device="cpu")
    assert set(found) == {name for name, length in lengths.items() if length <= limit}
    assert 0 < len(found) < len(asked)
    assert "is not asked" in caplog.text
    assert "data.text.max_length" in caplog.text


def test_without_questions_in_training_the_bar_says_so(feed: Feed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = questions_of(feed, Split.TEST)
    monkeypatch.setattr(uniugg_answers, "questions_of", lambda _, split: known if split == Split.TEST else {})
    monkeypatch.setattr(uniugg_answers, "generate_text", lambda llm, questions, tokens, **_: [[65] for _ in questions])
    with closing(feed.for_role(JUDGE)) as judge:
        llm = built(feed)["llm"].module
        album, reader = Album(tmp_path), TokenReader(judge)
        ((_, found),) = judge_answers(
            {TRAINED: llm}, judge, album, split=Split.TEST, device="cpu", reader=reader
        ).items()
    assert found["baseline_name"] == UNTAUGHT


# -- what is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["uniugg_align", "uniugg_joint", "uniugg_finetune", "uniugg_direct"])
def test_the_judge_reads_original_tokens_and_all_that_is_known_of_views(recipe: str):
    inputs = kind_inputs(configs.load([f"recipe={recipe}"]), JUDGE)
    (vit,) = inputs["conversation"].features
    assert vit.encoders == ("vit",), "no reconstruction in its place"
    if recipe == "uniugg_align":
        assert set(inputs) == {"conversation"}
        return
    generation = inputs["generation"]
    assert set(generation.targets) == {"image", "depth", "camera"}
    columns = {column for feature in generation.features for column in feature.columns.values()}
    latents = set() if recipe == "uniugg_direct" else {"mean", "logvar"}
    assert columns == {"tokens", "target_tokens", *latents}
    assert generation.text


def test_the_direct_variant_and_the_first_stage_are_judged_too(storage: Path):
    for recipe, wanted in (
        ("uniugg_direct", {"text/ce", "tokens/regression", "rgb/psnr", "points/chamfer"}),
        ("uniugg_align", {"text/ce"}),
    ):
        start = ["model.init.llm=random"] if recipe == "uniugg_direct" else []
        folder, config = make_run(storage, recipe, *ROOMS, *FEW, *start)
        with opened(config) as feed:
            found = evaluate(open_recipe(config), built(feed), feed, folder, split=Split.TEST, device="cpu")
        assert wanted <= set(found["metrics"])
        assert ("rgb/psnr" in found["metrics"]) == (recipe == "uniugg_direct")
        assert all(np.isfinite(entry["value"]) for entry in found["metrics"].values())


def test_spread_is_even_and_keeps_the_order():
    assert spread(range(10), 0) == list(range(10))
    assert spread(range(3), 5) == [0, 1, 2]
    assert spread(range(10), 5) == [1, 3, 5, 7, 9]
    assert len(set(spread(range(1000), 37))) == 37


@pytest.mark.parametrize("kind", ["generation", "conversation"])
@pytest.mark.parametrize("split", [Split.TRAIN, Split.TEST])
def test_planned_samples_are_all_of_the_split_or_some_of_them_evenly(feed: Feed, kind: str, split: Split):
    plan = feed.plan(split, complete=True)
    steps = [plan.step(number) for number in range(plan.steps_per_epoch)]
    every = [s for step in steps for b in step.micro_batches if b.kind == kind for s in b.samples if s.weight > 0]
    assert planned(feed, split, kind) == every
    assert planned(feed, split, kind, 3) == spread(every, 3)
    assert len({sample.id for sample in every}) == len(every) > 3
