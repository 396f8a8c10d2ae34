from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.spec import TensorSpec
from services.contracts import PlanSample, Record, Tensor
from services.errors import DataError
from services.streams.collate import TORCH_DTYPES, Collate, Slot


def sample(name: str, kind: str = "view", weight: float = 1.0) -> PlanSample:
    return PlanSample(id=name, source="s", item=name, kind=kind, views=(), seed=0, weight=weight)


def stored(values: torch.Tensor) -> Tensor:
    """As the store holds it: bits of bfloat16 as int16, read-only."""
    name = str(values.dtype).removeprefix("torch.")
    data = (values.view(torch.int16) if name == "bfloat16" else values).numpy()
    data.flags.writeable = False
    return Tensor(data=data, dtype=name)


def test_tokens_keep_their_dtype_and_every_bit() -> None:
    tokens = torch.randn(3, 2, 4, 5, 8).to(torch.bfloat16)
    tokens[0, 0, 0, 0, 0] = float("nan")
    records: list[Record | None] = [
        {"tokens": stored(tokens[i].clone()), "scene_type": stored(torch.tensor(i))} for i in range(3)
    ]
    samples = [sample("a"), sample("b"), sample("c", weight=0.0)]
    batch = Collate()("view", samples, records, Slot())
    assert batch["tokens"].dtype == torch.bfloat16
    assert torch.equal(batch["tokens"].view(torch.int16), tokens.view(torch.int16))
    assert batch["scene_type"].tolist() == [0, 1, 2]
    assert batch["weight"].tolist() == [1.0, 1.0, 0.0]
    assert batch["id"] == ["a", "b", "c"]


@pytest.mark.parametrize("name", sorted(set(TORCH_DTYPES) - {"bfloat16", "float8_e4m3fn"}))
def test_every_dtype(name: str) -> None:
    values = torch.tensor([[0, 1, 1]]).to(TORCH_DTYPES[name])
    batch = Collate()("view", [sample("a")], [{"x": stored(values[0])}], Slot())
    assert batch["x"].dtype == TORCH_DTYPES[name]
    assert torch.equal(batch["x"], values)


def test_a_broken_sample_is_zeros_between_good_neighbours() -> None:
    slot, collate = Slot(), Collate()
    ones = {"x": stored(torch.ones(2, 3))}
    collate("view", [sample(i) for i in "abc"], [ones, ones, ones], slot)
    batch = collate("view", [sample(i) for i in "abc"], [ones, None, ones], slot)
    assert batch["x"][1].abs().sum() == 0, "what the buffer held before must not show"
    assert batch["x"][0].sum() == 6
    assert batch["weight"].tolist() == [1.0, 0.0, 1.0]


def test_all_broken_takes_the_declared_shapes_or_those_seen_before() -> None:
    specs = {"view": {"x": TensorSpec(shape=(2, 3), dtype="bfloat16")}}
    batch = Collate(specs)("view", [sample("a")], [None], Slot())
    assert batch["x"].shape == (1, 2, 3)
    assert batch["x"].dtype == torch.bfloat16
    assert batch["x"].abs().sum() == 0
    collate = Collate()
    with pytest.raises(DataError, match=r"all 1 samples of the first micro-batch.*loom3d data check"):
        collate("view", [sample("a")], [None], Slot())
    collate("view", [sample("a")], [{"y": stored(torch.ones(4))}], Slot())
    assert collate("view", [sample("b")], [None], Slot())["y"].shape == (1, 4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.none() | st.integers(1, 5), min_size=1, max_size=6).filter(lambda x: any(x)))
def test_ragged_sets_are_padded_and_come_with_their_lengths(sizes: list[int | None]) -> None:
    slot = Slot()
    slot.take("views", (6, 5, 2, 2), torch.float32).fill_(7)
    records: list[Record | None] = [
        None if n is None else {"views": stored(torch.arange(4 * n).reshape(n, 2, 2).float() + 1)} for n in sizes
    ]
    batch = Collate()("view_set", [sample(str(i), "view_set") for i in range(len(sizes))], records, slot)
    longest = max(n for n in sizes if n)
    assert batch["views"].shape == (len(sizes), longest, 2, 2)
    assert batch["views_lengths"].tolist() == [[n or 0] for n in sizes]
    for row, n in zip(batch["views"], sizes, strict=True):
        assert torch.equal(row[: n or 0].reshape(-1), torch.arange(4 * (n or 0)).float() + 1)
        assert row[n or 0 :].abs().sum() == 0


def test_a_sample_without_pictures_is_an_empty_set_and_keeps_its_weight() -> None:
    records: list[Record | None] = [{}, {"x": stored(torch.ones(2, 3))}]
    batch = Collate()("item", [sample("text", "item"), sample("image", "item")], records, Slot())
    assert batch["x_lengths"].tolist() == [[0], [2]]
    assert batch["weight"].tolist() == [1.0, 1.0]


def test_disagreeing_records_are_named() -> None:
    one, other = {"x": stored(torch.ones(2))}, {"x": stored(torch.ones(2, dtype=torch.float64))}
    pair = [sample("a"), sample("b")]
    with pytest.raises(DataError, match="x of b is float64"):
        Collate()("view", pair, [one, other], Slot())
    with pytest.raises(DataError, match="b has no tensor 'x'"):
        Collate()("view", pair, [one, {"y": one["x"]}], Slot())
    declared = Collate({"view": {"x": TensorSpec(shape=(3,), dtype="float32")}})
    with pytest.raises(DataError, match=r"x of a is float32.*the encoder declares float32 \(3,\)"):
        declared("view", [sample("a")], [one], Slot())


def test_buffers_are_used_again_and_only_grow() -> None:
    slot = Slot()
    small = slot.take("x", (2, 3), torch.float32)
    address, size = small.data_ptr(), slot.nbytes
    assert slot.take("x", (3, 4), torch.bfloat16).data_ptr() == address
    assert slot.nbytes == size
    assert address % 64 == 0
    slot.take("x", (5, 5), torch.float32)
    assert slot.nbytes == 100
    assert np.shares_memory(slot.take("x", (1,), torch.int32).numpy(), slot.take("x", (1,), torch.int32).numpy())
