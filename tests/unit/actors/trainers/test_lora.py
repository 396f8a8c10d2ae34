"""Low-rank updates of the language model and of the UNet: merged, saved, trained by sharding backends."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from actors.trainers.backends import make_backend
from actors.trainers.lora import adapter_state, apply_lora, has_lora, merge_lora, save_adapter
from actors.trainers.recompute import checkpoint_activations
from actors.trainers.tensors import assign, saved_tensors, trainable
from configs import ConfigError
from configs.schema import BackendConfig, PeftConfig, TrainerConfig
from models.uniugg.unified import DIFFUSION_ROLE, LLM_ROLE
from tests.support.backend_ranks import in_ranks

PEFT = PeftConfig(method="lora", rank=4, alpha=6.0)
TRAINER = TrainerConfig(lr=0.01, weight_decay=0.1)


def language_role() -> nn.Module:
    """A small UniUGG LLM with its projector and queries."""
    torch.manual_seed(0)
    small = {**models.spec("uniugg-llm-tiny").defaults["language"], "hidden_size": 32, "intermediate_size": 48}
    return models.build("uniugg-llm-tiny", channels=12, language={**small, "num_hidden_layers": 2})


def unet_role() -> nn.Module:
    torch.manual_seed(0)
    return models.build("uniugg-unet-tiny", width=16)


def conversation(rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Text alone; the second half of each sequence is supervised."""
    ids = torch.randint(0, 250, (4, 10), generator=torch.Generator().manual_seed(1))
    rows = slice(rank * 4 // world, (rank + 1) * 4 // world)
    supervised = torch.arange(10).expand(4, 10) >= 5
    return {
        "kind": "conversation",
        "input_ids": ids[rows],
        "supervised": supervised[rows],
        "weight": torch.ones(4)[rows],
    }


def speak(module: Any) -> Tensor:
    """Logits of the language model on fixed tokens."""
    with torch.no_grad():
        return module.eval().language(input_ids=conversation()["input_ids"]).logits


def denoise(module: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    condition = torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return module.eval().denoise(noisy, torch.tensor([10, 500]), condition, torch.tensor([False, False]))


def shake(module: nn.Module) -> None:
    """Updates begin at zero; give them values."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


CASES = [(language_role, LLM_ROLE, speak, "language"), (unet_role, DIFFUSION_ROLE, denoise, "unet")]


@pytest.mark.parametrize(("build", "role", "run", "network"), CASES, ids=["llm", "diffusion"])
def test_updates_begin_at_zero_and_merge_into_the_weights(build: Any, role: Any, run: Any, network: str) -> None:
    module = build()
    names, before = list(module.state_dict()), run(module)
    assert apply_lora(module, role, PEFT) is module
    assert has_lora(module)
    torch.testing.assert_close(run(module), before, rtol=0, atol=0)
    trained = set(trainable(module))
    assert all("lora_" in name for name in trained if name.startswith(network))
    # New layers beside the network stay trained, the network's own weights do not.
    assert {name.split(".")[0] for name in trained} == {name.split(".")[0] for name, _ in build().named_parameters()}
    shake(module)
    adapted = run(module)
    assert float((adapted - before).abs().max()) > 1e-2
    merged = merge_lora(module)
    assert not has_lora(merged)
    assert list(merged.state_dict()) == names
    torch.testing.assert_close(run(merged), adapted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run(merge_lora(merged)), run(merged), rtol=0, atol=0)


@pytest.mark.parametrize(("build", "role", "run", "network"), CASES, ids=["llm", "diffusion"])
def test_peft_itself_reads_what_is_saved(tmp_path: Path, build: Any, role: Any, run: Any, network: str) -> None:
    from peft import PeftModel

    module = apply_lora(build(), role, PEFT)
    shake(module)
    weights = {name: tensor.detach() for name, tensor in saved_tensors(module).items()}
    save_adapter(tmp_path, weights, role, PEFT, prefix=network, base="somewhere")
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    fresh = build()
    loaded = PeftModel.from_pretrained(getattr(fresh, network), str(tmp_path))
    assert loaded.peft_config["default"].r == 4
    assert loaded.peft_config["default"].lora_alpha == 6
    setattr(fresh, network, loaded.merge_and_unload())
    torch.testing.assert_close(run(fresh), run(module), rtol=1e-4, atol=1e-5)


def test_kept_parameters_are_trained_whole_and_the_first_factor_follows_the_seed() -> None:
    keep = ["projector.fc1.*", "language.model.norm.weight"]
    module = apply_lora(language_role(), LLM_ROLE, PEFT, keep=keep, seed=1)
    whole = {name for name in trainable(module) if "lora_" not in name}
    assert whole == {"projector.fc1.weight", "projector.fc1.bias", "language.model.norm.weight"}
    same, other = (apply_lora(language_role(), LLM_ROLE, PEFT, seed=seed) for seed in (1, 2))
    name = "language.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(trainable(same)[name], trainable(module)[name])
    assert not torch.equal(trainable(other)[name], trainable(module)[name])
    kept_target = apply_lora(language_role(), LLM_ROLE, PEFT, keep=["language.model.layers.1.mlp.up_proj.weight"])
    assert "language.model.layers.1.mlp.up_proj.base_layer.weight" in trainable(kept_target)


@pytest.mark.parametrize(
    ("settings", "keep", "messages"),
    [
        ({"targets": ["q_prog"]}, (), ["'q_prog', which matches no module of role 'llm'", "near it: q_proj"]),
        ({"targets": ["layers"]}, (), ["peft.targets=['layers']", "not supported"]),
        ({}, ["projektor.*"], ["['projektor.*'], which matches no trainable parameter", "'projector'"]),
    ],
)
def test_names_that_match_nothing_are_refused(
    settings: dict[str, Any], keep: Sequence[str], messages: list[str]
) -> None:
    with pytest.raises(ConfigError) as failure:
        apply_lora(language_role(), LLM_ROLE, dataclasses.replace(PEFT, **settings), keep=keep)
    for message in messages:
        assert message in str(failure.value)


def test_a_role_without_targets_or_updates_is_refused(tmp_path: Path) -> None:
    bare = dataclasses.replace(LLM_ROLE, lora_targets=())
    with pytest.raises(ConfigError, match=r"role 'llm' names no modules for it; set peft.targets"):
        apply_lora(language_role(), bare, PEFT)
    with pytest.raises(ConfigError, match=r"role 'llm' has no low-rank updates"):
        save_adapter(tmp_path, saved_tensors(language_role()), LLM_ROLE, PEFT)


def train(name: str) -> dict[str, Tensor]:
    """Three steps of the LLM's updates, with recomputed blocks, on a backend; what a checkpoint would hold."""
    torch.manual_seed(0)
    module = apply_lora(language_role(), LLM_ROLE, PEFT)
    checkpoint_activations(module, LLM_ROLE)
    backend = make_backend(BackendConfig(name=name, persistence_threshold=0), "cpu")
    module = backend.prepare(module, LLM_ROLE, TRAINER).train()
    for _ in range(3):
        backend.zero_grad()
        backend.backward(module(conversation(backend.rank, backend.world_size), translation_scale="metres")["ce"] / 20)
        _, norm = backend.reduce(torch.zeros(1, dtype=torch.float64))
        backend.update(TRAINER.lr, norm, TRAINER.clip_norm)
    return backend.weights()


def train_with(names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    return {name: train(name) for name in names}


def test_sharding_backends_train_updates_as_one_process_does(tmp_path: Path) -> None:
    """The frozen network is in no checkpoint; what is, gives the adapted model, and merged the same one."""
    expected = train("single")
    assert not any("base_layer" in name or "embed_tokens" in name for name in expected)
    base = language_role()
    trained, _ = in_ranks(train_with, tmp_path, 2, ("fsdp2", "zero2", "zero3"))
    for name, weights in trained.items():
        assert weights.keys() == expected.keys()
        for parameter, value in expected.items():
            torch.testing.assert_close(
                weights[parameter],
                value,
                rtol=1e-3,
                atol=1e-4,
                msg=lambda text, at=(name, parameter): f"{at} {text}",
            )
        module = apply_lora(copy.deepcopy(base), LLM_ROLE, PEFT)
        for parameter, target in saved_tensors(module).items():
            assign(target, weights[parameter])
        adapted = speak(module)
        assert float((adapted - speak(base)).abs().max()) > 1e-2
        torch.testing.assert_close(speak(merge_lora(module)), adapted, rtol=1e-4, atol=1e-4)
    assert adapter_state(expected, "language").keys() == {
        "base_model.model." + name.removeprefix("language.").replace(".default", "")
        for name in expected
        if "lora_" in name
    }
