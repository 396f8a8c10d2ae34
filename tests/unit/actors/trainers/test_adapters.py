"""Low-rank updates in a folder: complete with what is trained beside them, checked, and tied to their base."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actors.trainers.adapters import check_saved, load_updates, save_updates
from actors.trainers.lora import apply_lora, merge_lora, merged_state, updates
from actors.trainers.tensors import trainable
from configs.schema import PeftConfig
from models.errors import WeightsError
from models.spec import RoleSpec, StepOutput

PLAIN = PeftConfig(method="lora", rank=3, alpha=6.0)
VARIANTS = {
    "lora": PLAIN,
    "dora": dataclasses.replace(PLAIN, dora=True),
    "rslora": dataclasses.replace(PLAIN, rslora=True),
}


def _unused(*_: Any, **__: Any) -> StepOutput:
    raise AssertionError("the tests call the module themselves")


ROLE = RoleSpec(name="llm", step=_unused, counts=_unused, lora_targets=("q_proj", "up_proj"), heads=("adapter.*",))


class Network(nn.Module):
    """Two layers with updates in a child that PEFT knows as the network, and a new layer beside it."""

    network = "language"

    def __init__(self) -> None:
        super().__init__()
        self.language = nn.ModuleDict({"q_proj": nn.Linear(6, 8), "up_proj": nn.Linear(8, 5, bias=False)})
        self.adapter = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.language["q_proj"](self.adapter(x))
        out: Tensor = self.language["up_proj"](torch.tanh(hidden))
        return out


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network()


def inputs() -> Tensor:
    return torch.linspace(-1, 1, 12).reshape(3, 4)


def trained(peft: PeftConfig) -> Any:
    """Adapted, with every trained parameter moved by a few steps."""
    module = apply_lora(network(), ROLE, peft)
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        optimiser.zero_grad()
        (module(inputs()) - 1).square().sum().backward()
        optimiser.step()
    return module


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_and_what_is_trained_beside_them_come_back(variant: str, tmp_path: Path) -> None:
    peft = VARIANTS[variant]
    before = network()(inputs())
    torch.testing.assert_close(apply_lora(network(), ROLE, peft)(inputs()), before, rtol=1e-6, atol=1e-6)
    module = trained(peft)
    tensors, described = save_updates(tmp_path / "llm", module, ROLE, peft)
    assert described == {"lora": {"role": "llm", "adapter": "llm-adapter", "rank": 3, "alpha": 6.0}}
    again = load_updates(network(), ROLE, tmp_path / "llm-adapter")
    assert trainable(again).keys() == trainable(module).keys()
    assert {name for name in trainable(again) if "lora_" not in name} == {"adapter.weight", "adapter.bias"}
    assert any("magnitude" in name for name in updates(again)) == peft.dora
    assert torch.equal(again(inputs()), module(inputs()))
    assert float((again(inputs()) - before).detach().abs().max()) > 0.05
    # What other runs use knows of no updates.
    plain = network()
    plain.load_state_dict(tensors)
    torch.testing.assert_close(plain(inputs()), module(inputs()), rtol=1e-5, atol=1e-6)
    assert tensors.keys() == merged_state(module).keys() == network().state_dict().keys()
    torch.testing.assert_close(merge_lora(module)(inputs()), plain(inputs()), rtol=1e-6, atol=1e-6)


def test_peft_reads_the_variants(tmp_path: Path) -> None:
    from peft import PeftModel

    module = trained(VARIANTS["dora"])
    save_updates(tmp_path / "llm", module, ROLE, VARIANTS["dora"])
    fresh: Any = network()
    fresh.adapter.load_state_dict(module.adapter.state_dict())
    loaded: Any = PeftModel.from_pretrained(fresh.language, str(tmp_path / "llm-adapter"))
    assert loaded.peft_config["default"].use_dora
    fresh.language = loaded.base_model.model
    torch.testing.assert_close(fresh.eval()(inputs()), module.eval()(inputs()), rtol=1e-6, atol=1e-6)


def test_a_fresh_process_has_the_same_outputs(tmp_path: Path) -> None:
    module = trained(PLAIN)
    save_updates(tmp_path / "llm", module, ROLE, PLAIN)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:2]; import torch; torch.set_num_threads(1); import test_adapters as t; "
        "from pathlib import Path; from actors.trainers.adapters import load_updates; "
        "out = load_updates(t.network(), t.ROLE, Path(sys.argv[2]))(t.inputs()); print(out.detach().tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "llm-adapter")],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[4],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), module(inputs()).detach(), rtol=1e-6, atol=1e-6)


def test_updates_of_another_base_are_refused(tmp_path: Path) -> None:
    save_updates(tmp_path / "llm", trained(PLAIN), ROLE, PLAIN)
    with pytest.raises(WeightsError, match=r"made for another base: language.q_proj.weight \(8, 6\) has fingerprint"):
        load_updates(network(seed=1), ROLE, tmp_path / "llm-adapter")
    other = network()
    other.language = nn.ModuleDict({"up_proj": nn.Linear(8, 5, bias=False)})
    with pytest.raises(WeightsError, match=r"adapts language.q_proj.weight, which Network does not have: another base"):
        load_updates(other, ROLE, tmp_path / "llm-adapter")
    half = network()
    half.language.bfloat16()  # the same base in another precision
    assert load_updates(half, ROLE, tmp_path / "llm-adapter") is half


FILE, BESIDE = "adapter_model.safetensors", "beside.safetensors"
A = "base_model.model.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (FILE, lambda state: state.pop(A), r"missing \['language.q_proj.lora_A.default.weight'\]"),
        (FILE, lambda state: state.update({A: torch.zeros(3, 6)}), r"q_proj.lora_A.default.weight has other values"),
        (FILE, lambda state: state.update({A: torch.ones(2, 6)}), r"q_proj.lora_A.default.weight: expected \(3, 6\)"),
        (BESIDE, lambda state: state.pop("adapter.bias"), r"missing \['adapter.bias'\]"),
        (BESIDE, lambda state: state.update({"x": torch.ones(1)}), r"left over \['x'\]"),
    ],
)
def test_a_file_that_is_not_what_was_trained_is_found(tmp_path: Path, file: str, change: Any, message: str) -> None:
    module = trained(PLAIN)
    save_updates(tmp_path / "llm", module, ROLE, PLAIN)
    folder = tmp_path / "llm-adapter"
    check_saved(folder, module)
    state = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
    change(state)
    save_file(state, folder / file)
    with pytest.raises(WeightsError, match=message):
        check_saved(folder, module)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("language.q_proj.lora_A.default.weight", 0.0, r"q_proj.lora_A.default.weight is zero everywhere"),
        ("adapter.weight", float("nan"), r"adapter.weight has values that are not finite"),
    ],
)
def test_tensors_that_were_lost_on_the_way_are_not_saved(tmp_path: Path, name: str, value: float, message: str) -> None:
    module = trained(PLAIN)
    with torch.no_grad():
        module.get_parameter(name).fill_(value)
    with pytest.raises(WeightsError, match=message):
        save_updates(tmp_path / "llm", module, ROLE, PLAIN)


def test_updates_that_trained_nothing_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"every update is zero .* none was trained"):
        save_updates(tmp_path / "llm", apply_lora(network(), ROLE, PLAIN), ROLE, PLAIN)
