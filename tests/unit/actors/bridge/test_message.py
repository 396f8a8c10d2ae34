"""Headers, packing, and slicing between groups of unequal size."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from actors.bridge.link import check_edges
from actors.bridge.message import (
    Header,
    TensorHeader,
    check_shape,
    digest,
    from_bytes,
    merge,
    pack,
    ragged_axes,
    routes,
)
from configs import ConfigError
from models.spec import EdgeSpec, EdgeTensor, TensorSpec
from services.errors import BridgeError


def an_edge(shape: tuple[int | None, ...], dtype: str = "float32", *, gradient: bool = True) -> EdgeSpec:
    tensor = EdgeTensor(name="h", spec=TensorSpec(shape=shape, dtype=dtype), gradient=gradient)
    return EdgeSpec(source="llm", target="diffusion", tensors=(tensor,), kinds=("generation",))


def round_trip(edge: EdgeSpec, tensors: dict[str, Tensor], begin: int, end: int) -> Tensor:
    packed = pack(edge, tensors, begin, end, sender="rank 0 of llm")
    (header,), (part,) = packed.tensors, packed.parts
    assert part.dtype == torch.uint8
    return from_bytes(part.clone(), header, ragged_axes(edge.tensors[0]), end - begin)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64", "bool", "uint8"])
def test_a_dense_tensor_round_trips(dtype: str) -> None:
    values = torch.arange(24).view(4, 3, 2).to(getattr(torch, dtype))
    edge = an_edge((3, 2), dtype, gradient=False)
    assert torch.equal(round_trip(edge, {"h": values}, 1, 3), values[1:3])


def test_a_contiguous_tensor_is_sent_from_its_own_memory() -> None:
    values = torch.randn(4, 8, requires_grad=True)
    (part,) = pack(an_edge((8,)), {"h": values}, 2, 4, sender="x").parts
    assert part.data_ptr() == values[2:].data_ptr()
    assert not part.requires_grad


def test_a_ragged_tensor_travels_without_its_padding() -> None:
    values = torch.randn(3, 5, 2, 4)
    lengths = torch.tensor([[5, 1], [0, 4], [2, 3]])
    edge = an_edge((None, 2, None))
    packed = pack(edge, {"h": values, "h_lengths": lengths}, 0, 3, sender="x")
    assert packed.parts[0].numel() == 4 * (5 * 2 * 1 + 0 + 2 * 2 * 3)
    whole = round_trip(edge, {"h": values, "h_lengths": lengths}, 0, 3)
    assert whole.shape == (3, 5, 2, 4)
    for i, (a, b) in enumerate(lengths.tolist()):
        assert torch.equal(whole[i, :a, :, :b], values[i, :a, :, :b])
        assert not whole[i, a:].any()
        assert not whole[i, :, :, b:].any()
    tail = round_trip(edge, {"h": values, "h_lengths": lengths}, 1, 3)
    assert tail.shape == (2, 2, 2, 4), "as long as the longest of the samples that are sent"


def test_senders_that_pad_differently_are_joined() -> None:
    joined = merge([torch.ones(2, 3, 2), 2 * torch.ones(1, 1, 4)])
    assert joined.shape == (3, 3, 4)
    assert joined.sum() == 2 * 6 + 8
    assert joined[2, 0].tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"g": torch.zeros(2, 3)}, r"rank 0 of llm gives no tensor 'h'.*\['g'\]"),
        ({"h": torch.zeros(2, 4)}, r"'h' of shape \(2, 4\).*\(samples, 3\)"),
    ],
)
def test_a_tensor_that_does_not_fit_the_edge_is_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        pack(an_edge((3,)), tensors, 0, 2, sender="rank 0 of llm")


@pytest.mark.parametrize(
    ("lengths", "message"),
    [(None, "must give 'h_lengths'"), (torch.tensor([[9]]), r"h_lengths\[0\]=\[9\]"), (torch.zeros(2, 1), "must give")],
)
def test_lengths_of_a_ragged_tensor_are_checked(lengths: Tensor | None, message: str) -> None:
    tensors = {"h": torch.zeros(1, 3)} | ({} if lengths is None else {"h_lengths": lengths})
    with pytest.raises(BridgeError, match=message):
        pack(an_edge((None,)), tensors, 0, 1, sender="rank 0 of llm")


@pytest.mark.parametrize("batch", [4, 12])
@pytest.mark.parametrize("sources", [1, 2, 4])
@pytest.mark.parametrize("targets", [1, 2, 4])
def test_routes_cover_every_sample_once(batch: int, sources: int, targets: int) -> None:
    every = routes(batch, sources, targets)
    assert [sample for route in every for sample in range(route.begin, route.end)] == list(range(batch))
    for route in every:
        for sample in range(route.begin, route.end):
            assert route.source == sample * sources // batch
            assert route.target == sample * targets // batch
    assert len(every) == max(sources, targets), "sizes that divide each other need no more messages than ranks"


def test_a_size_that_does_not_divide_is_refused() -> None:
    assert [(r.begin, r.end) for r in routes(6, 2, 3)] == [(0, 2), (2, 3), (3, 4), (4, 6)]
    with pytest.raises(ConfigError, match="4 samples cannot be spread over 3 ranks"):
        routes(4, 3, 1)


def a_header(**changes: object) -> Header:
    header = Header(
        generation=2, step=7, micro=1, edge="llm -> diffusion", samples=2, first="a", digest=digest(["a", "b"]),
        zero=(1,), tensors=(TensorHeader(name="h", dtype="float32", shape=(3,), lengths=((2,), (3,))),),
    )  # fmt: skip
    return dataclasses.replace(header, **changes)  # type: ignore[arg-type]


def test_a_header_round_trips() -> None:
    assert Header.decode(a_header().encode()) == a_header()
    for wrong in (b"", b"{}", b"[1]", b"\xff\xfe", b'{"what": "vote"}'):
        with pytest.raises(BridgeError, match="no header of an edge"):
            Header.decode(wrong)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"generation": 1}, "generation: rank 0 of llm sent 1, rank 3 of diffusion expects 2"),
        ({"step": 8}, "step: rank 0 of llm sent 8"),
        ({"micro": 0}, "micro: rank 0 of llm sent 0"),
        ({"digest": digest(["b", "a"])}, "digest: rank 0 of llm sent"),
        ({"zero": ()}, r"zero: rank 0 of llm sent \(\), rank 3 of diffusion expects \(1,\)"),
        ({"samples": 3}, "samples: rank 0 of llm sent 3"),
        ({"edge": "llm -> diffusion back"}, "edge: rank 0 of llm sent 'llm -> diffusion back'"),
        (
            {"tensors": ()},
            r"tensors .*: rank 0 of llm sent \[\], rank 3 of diffusion expects \[\('h', 'float32', True\)\]",
        ),
    ],
)
def test_a_mismatch_names_both_sides(changes: dict[str, object], named: str) -> None:
    a_header().check(a_header(), sender="rank 0 of llm", receiver="rank 3 of diffusion")
    with pytest.raises(BridgeError, match=named):
        a_header(**changes).check(a_header(), sender="rank 0 of llm", receiver="rank 3 of diffusion")


def test_a_shape_that_the_receiver_does_not_expect_names_both_sides() -> None:
    header = TensorHeader(name="h", dtype="float32", shape=(5, 8))
    check_shape(an_edge((None, 8)), header, sender="rank 0 of llm", receiver="rank 1 of diffusion")
    with pytest.raises(BridgeError, match=r"rank 0 of llm sent 'h' of shape \(5, 8\).*rank 1 of diffusion expects"):
        check_shape(an_edge((None, 16)), header, sender="rank 0 of llm", receiver="rank 1 of diffusion")
    with pytest.raises(BridgeError, match="came with 12 bytes, its header says 160"):
        from_bytes(torch.zeros(12, dtype=torch.uint8), header, (), 1)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([dataclasses.replace(an_edge((3,)), target="llm")], "both sends and receives"),
        ([dataclasses.replace(an_edge((3,)), target="painter")], "the run has the roles llm, diffusion"),
        ([an_edge((3,)), an_edge((3,))], "two edges llm -> diffusion"),
        ([an_edge((3,), "int64")], "no gradient of it can return"),
        ([an_edge((3,), "complex64")], "an edge carries"),
    ],
)
def test_edges_that_cannot_be_are_refused(edges: list[EdgeSpec], message: str) -> None:
    check_edges([an_edge((3,))], {"llm": 1, "diffusion": 1})
    with pytest.raises(ConfigError, match=message):
        check_edges(edges, {"llm": 1, "diffusion": 1})


def test_a_ragged_tensor_without_padding_is_not_copied() -> None:
    values = torch.randn(3, 5, 4)
    edge = an_edge((None, None))
    packed = pack(edge, {"h": values, "h_lengths": torch.tensor([[5, 4]] * 3)}, 1, 3, sender="x")
    (header,), (part,) = packed.tensors, packed.parts
    assert part.data_ptr() == values[1:].data_ptr()
    came = from_bytes(part, header, ragged_axes(edge.tensors[0]), 2)
    assert came.data_ptr() == part.data_ptr()
    assert torch.equal(came, values[1:])
    shorter = pack(edge, {"h": values, "h_lengths": torch.tensor([[5, 3]] * 3)}, 1, 3, sender="x")
    assert shorter.tensors[0].shape == (5, 3)
    assert torch.equal(from_bytes(shorter.parts[0], shorter.tensors[0], (0, 1), 2), values[1:, :, :3])
