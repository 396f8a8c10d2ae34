"""Weights that are read by parts: no rank holds the whole model, and the step is the one of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from actors.trainers.backends import make_backend
from actors.trainers.lora import apply_lora
from configs import ConfigError
from configs.schema import BackendConfig, PeftConfig, TrainerConfig
from models.errors import WeightsError
from models.pretrained import StoredTensors, empty_weights
from tests.support.backend_ranks import in_ranks
from tests.support.sharded_load import ROLE, SIZES, alone, language, load_each

RANKS = 2
#: Of the largest tensor a rank holds so much beside its part, for a moment: DeepSpeed sends it whole before it cuts it,
#: FSDP2 copies its part out of the file.
WHOLE = {"zero3": 1.0, "fsdp2": 1 / RANKS}
#: Whatever the weights: the low-rank updates and what trains them, buffers of collectives, and Python's objects, which
#: are 2 MiB a layer on ZeRO-3 with updates.
CONSTANT = 24 * 2**20


@pytest.mark.timeout(900)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_a_rank_holds_its_part_and_one_tensor_at_most(tmp_path: Path) -> None:
    sizes = {}
    for size, settings in SIZES.items():
        torch.manual_seed(0)
        tensors = {name: t.clone() for name, t in language(**settings).state_dict().items()}
        (tmp_path / size).mkdir()
        save_file(tensors, tmp_path / size / "model.safetensors")
        sizes[size] = (sum(t.nbytes for t in tensors.values()), max(t.nbytes for t in tensors.values()))
    cases = [("fsdp2", False, "deep"), *((name, True, size) for size in SIZES for name in WHOLE)]
    ranks = in_ranks(load_each, tmp_path / "ranks", RANKS, cases, str(tmp_path), timeout=800)
    expected = {(lora, size): alone(str(tmp_path), size, lora=lora) for _, lora, size in cases}
    for name, lora, size in cases:
        model, largest = sizes[size]
        limit = min(model / RANKS + WHOLE[name] * largest + CONSTANT, 0.9 * model)
        for rank in ranks:
            found = rank[f"{name} {lora} {size}"]
            said = f"{name}, {size}: {found['peak'] / 2**20:.1f} of {model / 2**20:.1f} MiB, limit {limit / 2**20:.1f}"
            assert 0.75 * model / RANKS < found["peak"] < limit, said
            assert found["loss"] == pytest.approx(expected[lora, size][0], rel=1e-5)
            if not lora:  # the norm of updates depends on what was drawn for them
                assert found["norm"] == pytest.approx(expected[lora, size][1], rel=1e-4)


def test_an_index_of_several_files_is_followed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'
    )
    found = StoredTensors.of(tmp_path)
    assert sorted(found) == ["a", "b"]
    assert len(found) == 2
    assert torch.equal(found["b"], torch.zeros(3))
    assert list(found.renamed(lambda name: f"x.{name}" if name == "a" else "")) == ["x.a"]
    with pytest.raises(WeightsError, match=r"elsewhere/model.safetensors cannot be read"):
        StoredTensors.of(tmp_path / "elsewhere")


class Tied(nn.Module):
    """Two names of one weight, and a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.tensor([2.0]), persistent=False)


def test_tied_weights_stay_tied_and_buffers_are_real() -> None:
    with empty_weights():
        module = Tied()
    assert module.head.weight is module.embed.weight
    assert module.embed.weight.is_meta
    assert module.scale.tolist() == [2.0]
    make_backend(BackendConfig(name="single"), "cpu").prepare(
        module, ROLE, TrainerConfig(), {"embed.weight": torch.arange(15.0).reshape(5, 3)}
    )
    assert module.head.weight is module.embed.weight
    assert module.head.weight.flatten().tolist() == list(range(15))
    assert module.head.weight.requires_grad


def test_what_the_weights_lack_is_named() -> None:
    def prepare(weights: dict[str, torch.Tensor]) -> None:
        with empty_weights():
            module = nn.Linear(2, 3)
        make_backend(BackendConfig(name="single"), "cpu").prepare(module, ROLE, TrainerConfig(), weights)

    with pytest.raises(WeightsError, match=r"bias was built without memory, and the weights .* do not hold it"):
        prepare({"weight": torch.zeros(3, 2)})
    with pytest.raises(WeightsError, match=r"weight: expected \(3, 2\), got \(2, 2\)"):
        prepare({"weight": torch.zeros(2, 2), "bias": torch.zeros(3)})


def test_dora_measures_rows_that_are_not_loaded_yet() -> None:
    torch.manual_seed(0)
    real = nn.ModuleDict({"q_proj": nn.Linear(4, 6)})
    state = real.state_dict()
    peft = PeftConfig(method="lora", rank=2, dora=True, targets=["q_proj"])

    def empty() -> nn.ModuleDict:
        with empty_weights():
            return nn.ModuleDict({"q_proj": nn.Linear(4, 6)})

    module = apply_lora(empty(), ROLE, peft, keep=["q_proj.bias"], weights=state)
    lengths = module.get_parameter("q_proj.lora_magnitude_vector.default.weight")
    torch.testing.assert_close(lengths.detach(), state["q_proj.weight"].norm(dim=1))
    make_backend(BackendConfig(name="single"), "cpu").prepare(module, ROLE, TrainerConfig(), state)
    x = torch.ones(1, 4)
    torch.testing.assert_close(module.get_submodule("q_proj")(x), real["q_proj"](x))
    with pytest.raises(ConfigError, match=r"rows of q_proj.weight cannot be measured before it is loaded"):
        apply_lora(empty(), ROLE, peft, keep=["q_proj.bias"])
