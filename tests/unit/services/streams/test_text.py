"""Token columns, and which entries of a manifest are conversations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import configs
from configs.schema import DataConfig, RunConfig, TextConfig
from models.errors import ModelError
from services.contracts import ImageRef, Item, Role, Turn
from services.errors import DataError
from services.streams.sampler import Unit
from services.streams.sampling import sampler
from services.streams.text import SPECS, TextColumns
from tests.unit.services.streams.small_world import SmallEntry


def run(**text: Any) -> RunConfig:
    return RunConfig(data=DataConfig(text=TextConfig(**text)))


def item(*turns: tuple[str, str], images: int = 0) -> Item:
    return Item(
        id="item 7",
        images=tuple(ImageRef(path=f"/{i}.png") for i in range(images)),
        turns=tuple(Turn(role=role, text=text) for role, text in turns),
    )


def test_columns_of_a_conversation() -> None:
    columns = TextColumns(run(), 4)
    record = columns.conversation(item(("user", "<image>Who?"), ("assistant", "Ñandú."), images=1))
    assert set(record) == set(SPECS)
    ids, supervised = record["input_ids"].data, record["supervised"].data
    assert (ids.dtype, supervised.dtype) == (np.int64, np.bool_)
    assert ids.shape == supervised.shape
    assert {name: tensor.dtype for name, tensor in record.items()} == {n: s.dtype for n, s in SPECS.items()}
    assert columns.decode(ids[supervised]) == "Ñandú."
    assert ids[supervised][-1] == columns.end_of_turn
    assert columns.pieces(ids).count("<|image|>") == 4


def test_what_is_supervised_follows_the_run() -> None:
    """Spa3-VLM learns the line break behind an answer's end, as published; UniUGG's recipes do not."""
    spoken = item(("user", "Who?"), ("assistant", "I"))
    found = {}
    for recipe in ("spa3_vlm", "uniugg_align"):
        config = configs.load([f"recipe={recipe}"])
        columns = TextColumns(config, 4)
        record = columns.conversation(spoken)
        ids, supervised = (record[name].data.tolist() for name in SPECS)
        found[config.data.text.supervise] = [token for token, yes in zip(ids, supervised, strict=True) if yes]
        assert found[config.data.text.supervise][1] == columns.end_of_turn
        assert not columns.question(spoken.turns[:1])["supervised"].data.any()
    assert found == {"turn": [ord("I"), columns.end_of_turn, ord("\n")], "answer": [ord("I"), columns.end_of_turn]}


def test_columns_of_a_generation_are_constant() -> None:
    columns = TextColumns(run(system="Imagine."), 9)
    record = columns.generation()
    pieces = columns.pieces(record["input_ids"].data)
    assert (pieces.count("<|image|>"), pieces.count("<|raymap|>")) == (9, 9)
    assert pieces[-11:] == ["<ray>", *["<|raymap|>"] * 9, "</ray>"]
    assert not record["supervised"].data.any()
    assert columns.generation() is record
    assert columns.decode(record["input_ids"].data).endswith("Imagine.\nuser\n")


def test_a_question_ends_where_its_answer_begins() -> None:
    columns = TextColumns(run(), 2)
    asked = (("user", "<image><image>\nWhich?"),)
    prompt = columns.question(item(*asked).turns, 2)["input_ids"].data
    whole = columns.conversation(item(*asked, ("assistant", "B"), images=2))
    assert (whole["input_ids"].data[: len(prompt)] == prompt).all()
    assert whole["supervised"].data[len(prompt)]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (item(("user", "Hi")), "item 'item 7': the conversation has no answer"),
        (item(("user", "Hi"), ("assistant", "  ")), "item 'item 7': the answer in turn 1 of the conversation is empty"),
        (item(("user", "<image>"), ("assistant", "x")), "has 1 marks <image> and 0 images"),
        (
            item(("user", "x" * 43), ("assistant", "x"), images=2),
            r"item 'item 7': 10\d tokens, of them 2 images of 16; ",
        ),
    ],
    ids=["no answer", "empty answer", "marks without images", "too long"],
)
def test_broken_conversations_are_data_errors(broken: Item, message: str) -> None:
    with pytest.raises(DataError, match=message):
        TextColumns(run(max_length=100), 16).conversation(broken)


def test_the_length_that_is_allowed() -> None:
    fits = item(("user", "Hi"), ("assistant", "Ho"))
    length = len(TextColumns(run(), 1).conversation(fits)["input_ids"].data)
    assert len(TextColumns(run(max_length=length), 1).conversation(fits)["input_ids"].data) == length
    with pytest.raises(DataError, match=rf"data\.text\.max_length={length - 1} allows no more"):
        TextColumns(run(max_length=length - 1), 1).conversation(fits)
    with pytest.raises(DataError, match="the prompt for a generated view: "):
        TextColumns(run(max_length=30), 16)


def test_a_model_with_too_few_rows_is_refused() -> None:
    TextColumns(run(), 1, vocab_size=268)
    with pytest.raises(ModelError, match="ids go up to 267 but the language model has 256 embedding rows"):
        TextColumns(run(), 1, vocab_size=256)


def test_conversations_are_the_items_with_text() -> None:
    conversations = sampler("conversation", RunConfig())
    entries = {
        "talk": SmallEntry("talk", 3, ("a", "b", "c"), None, kind="item", length=12),
        "text": SmallEntry("text", 0, (), None, kind="item", length=12),
        "picture": SmallEntry("picture", 1, ("a",), None, kind="item"),
        "scene": SmallEntry("scene", 3, ("a", "b", "c"), None),
    }
    assert {name: conversations.units(entry) for name, entry in entries.items()} == {
        "talk": 1, "text": 1, "picture": 0, "scene": 0,
    }  # fmt: skip
    draw = conversations.draw(Unit(n_views=3), np.random.default_rng(0))
    assert [(view.index, view.role) for view in draw.views] == [(i, Role.CONTEXT) for i in range(3)]
    assert list(conversations.spoiled(entries["talk"], frozenset({1}))) == [0]
    assert list(conversations.spoiled(entries["talk"], frozenset({5}))) == []
