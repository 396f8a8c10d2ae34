"""Low-rank updates of a whole role: what stays trained beside them, and the same training on every backend."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import configs
import models
from actors.preflight.fake import building
from actors.recipes import Built
from actors.trainers.backends import make_backend
from actors.trainers.recompute import checkpoint_activations
from actors.trainers.roles import adapt
from actors.trainers.tensors import trainable
from configs import RunConfig
from configs.schema import BackendConfig, TrainerConfig
from models.spec import RoleSpec, StepOutput
from models.uniugg.direct import DIRECT_ROLE
from models.uniugg.objectives import LanguageObjective
from models.uniugg.unified import DIFFUSION_ROLE, LLM_ROLE
from tests.support.backend_ranks import in_ranks
from tests.support.uniugg_batches import conversation, generation, take

TRAINER = TrainerConfig(lr=0.01, weight_decay=0.1)
SAMPLES = 4


def small(name: str) -> nn.Module:
    """A role of size tiny with a smaller language model; the same at every call."""
    torch.manual_seed(0)
    if name == "uniugg-unet-tiny":
        return models.build(name, width=16)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return models.build(name, language={**models.spec("uniugg-llm-tiny").defaults["language"], **size})


def adapted(config: RunConfig, role: RoleSpec, name: str) -> nn.Module:
    return adapt(config, role.name, Built(module=small(name), spec=role, settings={}))


def whole(module: nn.Module) -> set[str]:
    """What is trained beside low-rank updates, by the first part of its name."""
    return {name.split(".")[0] for name in trainable(module) if "lora_" not in name}


@pytest.mark.parametrize(
    ("name", "role", "recipe", "heads"),
    [
        ("uniugg-llm-tiny", LLM_ROLE, "uniugg_joint", {"projector", "queries"}),
        ("uniugg-unet-tiny", DIFFUSION_ROLE, "uniugg_joint", {"conditioning"}),
        ("uniugg-direct-llm-tiny", DIRECT_ROLE, "uniugg_direct", {"projector", "queries", "head"}),
    ],
)
def test_new_layers_stay_trained_whole(name: str, role: RoleSpec, recipe: str, heads: set[str]) -> None:
    module = adapted(configs.load([f"recipe={recipe}", "peft=lora"]), role, name)
    assert whole(module) == heads
    networks = {parameter.split(".")[0] for parameter in trainable(module) if "lora_" in parameter}
    assert networks == {"unet" if role is DIFFUSION_ROLE else "language"}


def test_what_the_recipe_names_is_trained_instead_of_the_new_layers() -> None:
    config = configs.load(["recipe=uniugg_align", "peft=lora", "recipe.train.llm=['projector.*']"])
    assert whole(adapted(config, LLM_ROLE, "uniugg-llm-tiny")) == {"projector"}


def test_a_target_among_the_new_layers_does_not_freeze_them() -> None:
    config = configs.load(["recipe=uniugg_joint", "peft=lora", "peft.targets=[q_proj,projector.fc1]"])
    module = adapted(config, LLM_ROLE, "uniugg-llm-tiny")
    assert {"projector", "queries"} <= whole(module)
    assert "projector.fc1.base_layer.weight" in trainable(module)


def test_one_role_alone_may_have_updates_and_they_follow_the_seed() -> None:
    config = configs.load(["recipe=uniugg_joint", "roles.llm.peft=lora"])
    llm, unet = adapted(config, LLM_ROLE, "uniugg-llm-tiny"), adapted(config, DIFFUSION_ROLE, "uniugg-unet-tiny")
    assert any("lora_" in name for name in trainable(llm))
    assert trainable(unet).keys() == dict(small("uniugg-unet-tiny").named_parameters()).keys()
    name = next(name for name in trainable(llm) if "lora_A" in name)
    again = adapted(config, LLM_ROLE, "uniugg-llm-tiny")
    other = adapted(configs.load(["recipe=uniugg_joint", "roles.llm.peft=lora", "seed=1"]), LLM_ROLE, "uniugg-llm-tiny")
    assert torch.equal(trainable(again)[name], trainable(llm)[name])
    assert not torch.equal(trainable(other)[name], trainable(llm)[name])


def test_a_plan_adapts_networks_without_memory() -> None:
    config = configs.load(["recipe=uniugg_joint", "peft=lora"])
    real = trainable(adapted(config, LLM_ROLE, "uniugg-llm-tiny"))
    with building():
        planned = trainable(adapted(config, LLM_ROLE, "uniugg-llm-tiny"))
    assert {name: p.shape for name, p in planned.items()} == {name: p.shape for name, p in real.items()}
    assert {type(parameter).__name__ for parameter in planned.values()} == {"FakeTensor"}


# -- the role's own steps, on backends ------------------------------------------------------------------------


def train(name: str) -> dict[str, Tensor]:
    """Two steps of both kinds, the condition's gradient coming back late; what a checkpoint would hold."""
    config = configs.load(["recipe=uniugg_joint", "peft=lora", "peft.rank=4"])
    role = LLM_ROLE.bind(objective=LanguageObjective(translation_scale="metres"))
    module = adapted(config, role, "uniugg-llm-tiny")
    checkpoint_activations(module, role)
    backend = make_backend(BackendConfig(name=name, persistence_threshold=0), "cpu")
    module = backend.prepare(module, role, TRAINER).train()
    rows = range(backend.rank * SAMPLES // backend.world_size, (backend.rank + 1) * SAMPLES // backend.world_size)
    for step in range(2):
        imagined = take(generation(SAMPLES, seed=step), *rows)
        asked = take(conversation((1, 2, 1, 2), seed=step), *rows)
        returned = torch.randn(SAMPLES, 6, 32, generator=torch.Generator().manual_seed(step))[list(rows)]
        backend.zero_grad()
        sent = run(role, module, imagined)
        backend.backward(run(role, module, asked).sums["ce"] / 20)
        backend.backward(sent.sums["ce"], [(sent.outputs["condition"], returned)])
        _, norm = backend.reduce(torch.zeros(1, dtype=torch.float64))
        backend.update(TRAINER.lr, norm, TRAINER.clip_norm)
    return backend.weights()


def run(role: RoleSpec, module: nn.Module, batch: Any) -> StepOutput:
    return role.step(module, batch, {})


def train_with(names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    return {name: train(name) for name in names}


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_backends_train_the_language_role_as_plain_autograd_does(tmp_path: Path, world: int) -> None:
    expected = train("single")
    heads = {name.split(".")[0] for name in expected if "lora_" not in name}
    assert heads == {"projector", "queries"}
    fresh = trainable(adapted(configs.load(["recipe=uniugg_joint", "peft=lora", "peft.rank=4"]), LLM_ROLE,
                              "uniugg-llm-tiny"))  # fmt: skip
    assert all(not torch.equal(value, fresh[name]) for name, value in expected.items() if name in fresh)
    found = in_ranks(train_with, tmp_path, world, ("fsdp2", "zero2"))[0]
    for name, weights in found.items():
        assert weights.keys() == expected.keys()
        for parameter, value in expected.items():
            assert torch.allclose(weights[parameter], value, rtol=1e-3, atol=1e-4), f"{name} {parameter}"
