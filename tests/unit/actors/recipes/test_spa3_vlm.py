"""Spa3-VLM from conversation files to a role's step: columns, packing, what it starts from and leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import configs
from actors.evaluate import save_parts
from actors.recipes import Built, open_recipe
from actors.recipes.base import every_batch
from actors.recipes.samples import load_samples
from actors.recipes.spa3_vlm import GrownTables
from actors.recipes.spa3_vlm_judge import FrameReader
from actors.recipes.uniugg_answers import answer, questions_of
from actors.trainers.feed import Feed
from actors.trainers.tensors import fill, on_meta
from configs import ConfigError, RunConfig
from models.errors import ModelError, WeightsError
from models.pretrained import CONFIG, describe_pretrained, load_pretrained
from models.text.tokenizer import VISION_TOKENS
from services.contracts import Split
from services.data.sources import open_sources
from services.errors import DataError
from services.features.client import FeatureClient
from services.features.encode import pin_weights
from services.features.maintain import chosen_encoders, warm
from services.features.sink import open_store
from services.features.why import why
from services.streams.frames import FrameTexts
from services.streams.ledger import Ledger
from tests.support.encoders import Counting

TINY = [
    "recipe=spa3_vlm", "size=tiny", "data=corpus", "cluster=inline", "logger.progress=off",
    "encoders.spa3r.weights=random", "encoders.spa3r.arch={model: spa3r-tiny}", "encoders.visual.side=56",
    "encoders.visual.height=28", "encoders.visual.width=56", "encoders.patches.height=28", "encoders.patches.width=42",
    "trainer.micro_batch=2", "trainer.accumulation=1", "generate.max_new_tokens=3", "data.max_broken=1.0",
]  # fmt: skip
LATENTS = 16


def write_talks(folder: Path) -> Path:
    """Five questions about two pictures of 4:3, two about a portrait, one without pictures, one without an answer."""
    draw = np.random.default_rng(0)
    for name, size in (("a", (30, 40)), ("b", (30, 40)), ("tall", (60, 30))):
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{name}.png")

    def record(name: str, images: list[str], split: str, question: str, answer: str) -> dict[str, Any]:
        said = [{"from": "human", "value": question}] + ([{"from": "gpt", "value": answer}] if answer else [])
        found = {"id": name, "conversations": said, "split": split}
        return found | ({"images": images} if images else {})

    ask, pair = "How many chairs are there?", ["a.png", "b.png"]
    records = [
        record(f"q{n}", pair, "train", f"<image><image>Question {n}: " + "x" * n, "y" * (n + 1)) for n in range(5)
    ]
    records += [record(f"t{n}", ["tall.png"], "train", f"Tall {n}?", "yes") for n in range(2)]
    records += [record("text", [], "train", "What is red?", "A colour.")]
    records += [record("mute", pair, "val", "<image><image>And?", ""), record("told", pair, "val", "And?", "So.")]
    scored = {"question_type": "object_counting", "question": ask, "answer": "4"}
    records += [record(f"s{n}", pair, "test", f"<image><image>{ask}" + "!" * n, "4") | scored for n in range(2)]
    path = folder / "talks.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    write_talks(folder / "data")
    return folder


def config_of(root: Path, *overrides: str) -> RunConfig:
    talks = f"data.sources.corpus.root={root / 'data' / 'talks.jsonl'}"
    return configs.load([*TINY, talks, f"storage.root={root / 'storage'}", *overrides])


class opened:  # noqa: N801 - used as a function
    """The feed of a run, closed at the end of the block."""

    def __init__(self, config: RunConfig) -> None:
        config = pin_weights(config)
        store = open_store(config)
        self.client = FeatureClient(config, store)
        self.feed = Feed.open(config, open_sources(config), self.client, store)

    def __enter__(self) -> Feed:
        return self.feed

    def __exit__(self, *_: object) -> None:
        self.feed.close()
        self.client.close()


@pytest.fixture(scope="module")
def feed(root: Path) -> Iterator[Feed]:
    with opened(config_of(root, "recipe.spa3_vlm.questions_per_sample=4")) as found:
        yield found


def built_of(feed: Feed, *, awake: bool = True) -> Built:
    """The role as the run begins with it; ``awake`` gives the adapter's last layer values, so that latents matter."""
    recipe = open_recipe(feed.config)
    built = recipe.build(recipe.roles[0], feed, feed.plan(Split.TRAIN))
    adapter: Any = built.module.adapter
    if awake and hasattr(adapter, "mlp"):
        torch.manual_seed(1)
        torch.nn.init.normal_(adapter.mlp.fc2.weight, std=0.2)
    return built


def batches(feed: Feed, split: Split = Split.TRAIN) -> list[dict[str, Any]]:
    return [
        {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        for batch, _ in every_batch(feed, split)
    ]


def sums_and_gradients(built: Built, found: list[dict[str, Any]]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Sum and count of the cross-entropy over batches, and gradients of the sum."""
    built.module.zero_grad()
    total, count = 0.0, 0.0
    for batch in found:
        value = built.spec.step(built.module, batch, {}).sums["ce"]
        value.backward()
        total += float(value.detach())
        count += built.spec.counts(batch)["ce"]
    grads = {name: p.grad.clone() for name, p in built.module.named_parameters() if p.grad is not None}
    return total, count, grads


def test_columns_are_of_the_frames_as_they_are(feed: Feed) -> None:
    (batch,) = [batch for batch in batches(feed) if any("/t" in name and "text" not in name for name in batch["id"])]
    place = next(n for n, name in enumerate(batch["id"]) if "/t0" in name or "/t1" in name)
    placeholder = feed.texts.columns.image_token_id  # type: ignore[union-attr]
    # 60x30 is brought to 112x56, of which the middle 56 rows are seen: 2x2 merged tokens.
    assert batch["grids"][place, 0].tolist() == [2, 2]
    assert batch["visual_lengths"][place].tolist() == [4]
    assert int((batch["input_ids"][place] == placeholder).sum()) == 4
    first = batches(feed)[0]
    # 40x30 becomes 42x56, of which 28x56 is seen.
    assert first["grids"][0].tolist() == [[1, 2], [1, 2]]
    assert (first["visual"].shape[0], first["visual"].shape[2]) == (2, 128)
    assert first["latents"].shape == (2, LATENTS, 96)
    assert first["segments"].max() == 3
    assert first["segments"].shape == first["input_ids"].shape
    start, pad, end = (feed.texts.columns.tokenizer.convert_tokens_to_ids(name) for name in VISION_TOKENS)  # type: ignore[union-attr]
    ids = first["input_ids"][0].tolist()
    place = ids.index(start)
    assert ids[place : place + 8] == [start, pad, pad, end, start, pad, pad, end]
    assert set(first["segments"][0, : place + 8].tolist()) == {0}


@pytest.mark.parametrize("geometry", ["cross", "append", "vggt"])
def test_packed_samples_train_what_separate_ones_do(root: Path, geometry: str) -> None:
    chosen = f"recipe.spa3_vlm.geometry={geometry}"
    with opened(config_of(root, chosen, "recipe.spa3_vlm.questions_per_sample=4")) as packed:
        built, together = built_of(packed), batches(packed)
    with opened(config_of(root, chosen, "recipe.spa3_vlm.questions_per_sample=1")) as separate:
        alone = batches(separate)
    assert sum(len(batch["id"]) for batch in together) < sum(len(batch["id"]) for batch in alone)
    assert not any(bool((batch["segments"] > 0).any()) for batch in alone)
    total, count, grads = sums_and_gradients(built, together)
    expected, number, wanted = sums_and_gradients(built, alone)
    assert count == number > 0
    assert total == pytest.approx(expected, rel=1e-5)
    assert grads.keys() == wanted.keys()
    for name, gradient in grads.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-3, atol=1e-5 * float(wanted[name].abs().max() + 1)), name


def test_a_micro_batch_without_pictures_trains_every_parameter(feed: Feed) -> None:
    plan = feed.plan(Split.TRAIN, complete=True)
    planned = [s for n in range(plan.steps_per_epoch) for b in plan.step(n).micro_batches for s in b.samples]
    text = next(sample for sample in planned if sample.item == "text")
    ((batch, _),) = [*load_samples(feed, [text], split=Split.TRAIN, batch_size=1)]
    assert batch["visual_lengths"].tolist() == [[0]]
    assert batch["grids_lengths"].tolist() == [[0]]
    total, count, grads = sums_and_gradients(built_of(feed), [batch])
    assert total > 0
    assert count > 0
    assert any(name.startswith("adapter.") for name in grads)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in grads.values())


def test_a_question_without_an_answer_breaks_its_sample_and_is_named(feed: Feed, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "quarantine.jsonl", max_broken=1.0, total=10)
    plan = feed.plan(Split.VAL)
    with closing(feed.load(plan, ledger=ledger)) as loader:
        (step,) = [*loader]
    # The filler that completes the batch is the same pack.
    assert set(step.broken) == {"corpus/mute#conversation0", "corpus/mute#conversation0+1"}
    why = step.broken["corpus/mute#conversation0"]
    assert "the conversation has no answer" in why
    assert "'mute'" in why
    assert ledger.broken == {"corpus/mute#conversation0"}
    again = replace(feed, quarantine=ledger.broken)
    (sample,) = [s for b in again.plan(Split.VAL).step(0).micro_batches for s in b.samples if s.weight]
    assert (sample.item, sample.questions) == ("told", ("told",))


def test_texts_that_do_not_match_the_frames_are_refused(feed: Feed) -> None:
    assert isinstance(feed.texts, FrameTexts)
    (sample, *_) = feed.plan(Split.TRAIN, complete=True).step(0).micro_batches[0].samples
    (answered,) = feed.texts.get([sample], [{}])
    assert isinstance(answered, DataError)
    assert "has 2 images" in str(answered)
    batch = batches(feed)[0]
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == feed.texts.columns.image_token_id, 7)
    with pytest.raises(ModelError, match=r"the text has 0 image tokens for 4 visual tokens"):
        built_of(feed).module(batch)


@pytest.mark.parametrize(("geometry", "sets"), [("cross", "spa3r"), ("vggt", "views")])
def test_what_was_warmed_is_all_that_training_reads(geometry: str, sets: str, root: Path, tmp_path: Path) -> None:
    """Merged visual tokens picture by picture, and what is made of all frames together: once a set of frames."""
    config = config_of(root, f"recipe.spa3_vlm.geometry={geometry}", f"cache.root={tmp_path}")
    config = pin_weights(config)
    manifests, store = open_sources(config), open_store(config)
    assert store is not None
    found = {name: warm(config, store, "corpus", manifests["corpus"], encoder=name) for name in chosen_encoders(config)}
    assert {name: (report.inputs, report.encoded, report.broken) for name, report in found.items()} == {
        "visual": (3, 3, {}),  # a.png, b.png and tall.png
        sets: (2, found[sets].encoded, {}),  # the pair and tall.png, whatever is asked about them
    }
    before = warm(config, store, "corpus", manifests["corpus"], encoder="views", splits=["train"])
    assert (before.inputs, before.stored, before.encoded) == (2, 2, 0), "VGGT's features are there, behind the latents"
    counting = Counting()
    with closing(FeatureClient(config, store, make_encoder=counting)) as client:
        feed = Feed.open(config, manifests, client, store)
        try:
            plan = feed.plan(Split.TRAIN, complete=True)
            with closing(feed.load(plan, ledger=Ledger(tmp_path / "broken.jsonl", max_broken=1.0, total=10))) as loader:
                steps = [*loader]
        finally:
            feed.close()
        assert [step.hit_rate for step in steps] == [1.0] * len(steps)
        assert client.stats.encoded == client.stats.misses == 0
        assert client.stats.hits > 0
    assert not counting.counts


def test_views_of_a_conversation_explain_themselves(root: Path, tmp_path: Path) -> None:
    config = config_of(root, f"cache.root={tmp_path}")
    manifests, store = open_sources(config), open_store(config)
    assert store is not None
    assert not why(config, store, manifests, "corpus/q0", encoder="spa3r").stored
    warm(config, store, "corpus", manifests["corpus"], encoder="spa3r", splits=["train"])
    found = why(config, store, manifests, "corpus/q0", encoder="spa3r")
    assert found.stored
    assert "view set 0" in str(found)


def test_answers_read_the_frames_once_for_all_questions(feed: Feed) -> None:
    with closing(feed.for_role("judge")) as judge:
        asked = questions_of(judge, Split.TEST)["corpus"]
        module = built_of(judge).module.eval()
        given = answer(module, asked, judge, FrameReader(judge), split=Split.TEST, device="cpu")
    assert set(given) == {"s0", "s1"}
    assert all(isinstance(text, str) for text in given.values())


def test_parts_are_saved_and_start_another_run(feed: Feed, root: Path, tmp_path: Path) -> None:
    recipe, built = open_recipe(feed.config), built_of(feed)
    save_parts(recipe, {"vlm": built}, tmp_path, 1)
    weights = tmp_path / "weights"
    assert describe_pretrained(weights / "adapter")["reads"] == feed.config.encoders["spa3r"].digest
    whole, alone = load_pretrained(weights / "llm"), load_pretrained(weights / "adapter")
    own = built.module.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in whole.state_dict().items())
    assert all(torch.equal(value, own[f"adapter.{name}"]) for name, value in alone.state_dict().items())

    def started(*overrides: str, encoders: Any = None) -> Built:
        config = config_of(root, *overrides)
        return open_recipe(replace(config, encoders=encoders or feed.config.encoders)).rebuild("vlm", built.settings)

    again = started(f"model.init.llm={weights / 'llm'}", "seed=3").module.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.items())
    adapted = started(f"model.init.adapter={weights / 'adapter'}").module.state_dict()
    assert torch.equal(adapted["adapter.mlp.fc2.weight"], own["adapter.mlp.fc2.weight"])
    with pytest.raises(WeightsError, match=r"is an adapter for another base: it was trained behind random \(seed 0\)"):
        started(f"model.init.adapter={weights / 'adapter'}", "seed=3")
    # Latents of other weights.
    encoders = dict(feed.config.encoders)
    encoders["spa3r"] = replace(encoders["spa3r"], digest="f" * 64)
    for part in ("llm", "adapter"):
        with pytest.raises(WeightsError, match=rf"model\.init\.{part}=.*to its adapter these latents mean nothing"):
            started(f"model.init.{part}={weights / part}", encoders=encoders)
    # Another base.
    described = json.loads((weights / "adapter" / CONFIG).read_text())
    described["settings"]["width"] = 64
    (weights / "adapter" / CONFIG).write_text(json.dumps(described))
    with pytest.raises(WeightsError, match=r"is an adapter for another base: it has {'width': 64}.*{'width': 128}"):
        started(f"model.init.adapter={weights / 'adapter'}")


def test_a_published_language_model_is_read_without_a_copy(feed: Feed, root: Path, tmp_path: Path) -> None:
    built = built_of(feed)
    language: Any = built.module.language
    language.save_pretrained(tmp_path / "qwen")
    config = config_of(root, f"model.init.language={tmp_path / 'qwen'}", "seed=5")
    recipe = open_recipe(replace(config, encoders=feed.config.encoders))
    settings = recipe.build("vlm", feed, feed.plan(Split.TRAIN)).settings
    assert settings["language"]["text_config"]["hidden_size"] == 128
    made = recipe.rebuild("vlm", settings)
    assert made.weights is not None
    waiting = {found.name for found in on_meta(made.module)}
    assert waiting
    assert all(name.startswith("language.") for name in waiting), "the adapter starts by itself"
    fill(made.module, made.weights)
    own = built.module.state_dict()
    found = {name: value for name, value in made.module.state_dict().items() if name.startswith("language.")}
    assert all(torch.equal(value, own[name]) for name, value in found.items())
    assert not made.module.adapter.mlp.fc2.weight.any()  # type: ignore[union-attr]
    stored = {"table": torch.tensor([[1.0, 3.0], [3.0, 5.0]]), "other": torch.zeros(2, 2)}
    grown = GrownTables(stored, {"table"}, 4)
    assert grown["table"].tolist() == [[1.0, 3.0], [3.0, 5.0], [2.0, 4.0], [2.0, 4.0]]
    assert grown["other"].shape == (2, 2)
    assert set(grown) == set(stored)


def test_settings_that_do_not_belong_together(feed: Feed, root: Path) -> None:
    def describe(*overrides: str) -> Any:
        recipe = open_recipe(replace(config_of(root, *overrides), encoders=feed.config.encoders))
        return recipe.build("vlm", feed, feed.plan(Split.TRAIN))

    with pytest.raises(ConfigError, match=r"tokens of 128 channels, the language model of spa3-vlm-small is 512 wide"):
        describe("model.name=spa3-vlm-small")
    for name in ("spa3r-tiny", "spa3-vlm-adapter-tiny"):
        with pytest.raises(ConfigError, match=rf"model\.name={name}: recipe spa3_vlm trains a spa3-vlm-\* model"):
            describe(f"model.name={name}")
    with pytest.raises(ConfigError, match=r"model\.init has 'vae'; recipe spa3_vlm starts from llm, adapter, language"):
        describe("model.init.vae=random")
    with pytest.raises(ConfigError, match=r"recipe\.spa3_vlm\.geometry=none has none"):
        describe("recipe.spa3_vlm.geometry=none", "model.init.adapter=random")
