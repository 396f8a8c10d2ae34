"""A trained part's low-rank updates as a folder: what PEFT reads, and beside it what is ours.

``adapter_model.safetensors`` and ``adapter_config.json`` are PEFT's. ``beside.safetensors`` holds what was trained
whole with the updates, by the module's own names; ``base.json`` tells the weights that they belong to, each by a few of
its values. What was written is read again and checked before the save counts.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from actors.trainers.lora import (
    LORA,
    adapted_layers,
    apply_lora,
    merged_state,
    save_adapter,
    stored_config,
    stored_updates,
    updates,
)
from actors.trainers.tensors import assign, trainable
from configs.schema import PeftConfig
from models.errors import WeightsError
from models.pretrained import network_of
from models.spec import RoleSpec

_log = logging.getLogger("loom3d")
_BESIDE, _BASE = "beside.safetensors", "base.json"
_SAMPLED = 256
"""Values of a weight that tell it from another's."""


def save_updates(
    place: Path, module: nn.Module, role: RoleSpec, peft: PeftConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Write the updates of a trained part beside its folder ``place``, as ``<place>-adapter``, and check them.

    Returns what the part's own folder gets: its merged tensors, which others use without knowing of updates, and
    what its config.json says of them under :data:`LORA`.
    """
    network = network_of(module)
    beside = place.with_name(f"{place.name}-adapter")
    save_adapter(beside, module.state_dict(), role, peft, prefix=network)
    kept = {name: p.detach().cpu().contiguous().clone() for name, p in _whole(module).items()}
    save_file(kept, beside / _BESIDE)
    (beside / _BASE).write_text(json.dumps({"network": network, "weights": base_of(module)}, indent=1))
    check_saved(beside, module)
    described = {"role": role.name, "adapter": beside.name, "rank": peft.rank, "alpha": peft.alpha}
    return merged_state(module), {LORA: described}


def check_saved(folder: Path, module: nn.Module) -> None:
    """Compare what lies in ``folder`` with the adapted ``module`` that it was saved from.

    WeightsError names a tensor that is missing, left over, of another shape or value, or not finite; a first factor of
    zeros (what a rank holds of a weight that was not gathered); and second factors that are all zeros, which trained
    nothing.
    """
    expected = {**updates(module), **{name: p.detach() for name, p in _whole(module).items()}}
    stored = {**stored_updates(folder, network_of(module)), **_read(folder / _BESIDE)}
    _compare(f"{folder} was not saved right", expected, stored)
    for name, tensor in stored.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise WeightsError(f"{folder}: {name} has values that are not finite")
        if not torch.equal(tensor, expected[name].to(tensor.device, tensor.dtype)):
            raise WeightsError(f"{folder}: {name} has other values than the module")
        if ".lora_A." in name and not bool(tensor.any()):
            raise WeightsError(f"{folder}: {name} is zero everywhere; it was drawn at random and cannot be")
    second = [name for name in stored if ".lora_B." in name]
    silent = [name for name in second if not bool(stored[name].any())]
    if second and len(silent) == len(second):
        raise WeightsError(f"{folder}: every update is zero ({silent[0]} and {len(silent) - 1} more): none was trained")
    if silent:
        _log.warning("%s: %d of %d updates are zero: %s took no part", folder, len(silent), len(second), silent[0])


def load_updates(module: nn.Module, role: RoleSpec, folder: Path) -> nn.Module:
    """Put the updates of ``folder`` into ``module``, which is in the state they were made for, in place; returns it.

    What was trained whole beside them is loaded too, and is what trains again. WeightsError for another base (with the
    weight that differs), and for tensors that do not fit.
    """
    _check_base(module, folder)
    peft = stored_config(folder)
    apply_lora(module, role, peft)
    stored = {**stored_updates(folder, network_of(module)), **_read(folder / _BESIDE)}
    targets = dict(module.named_parameters())
    own = updates(module)
    for name, parameter in targets.items():
        parameter.requires_grad_(name in stored)
    kept = {name: targets[name] for name in stored.keys() & targets.keys() - own.keys()}
    _compare(f"{folder} does not fit {type(module).__name__}", {**own, **kept}, stored)
    for name, tensor in stored.items():
        assign(targets[name], tensor)
    return module


def base_of(module: nn.Module) -> dict[str, str]:
    """A fingerprint of every adapted weight, by the name that it had before: of its shape and some of its values.

    The values count as bfloat16, so that a base is the same in every precision that it is kept in.
    """
    return {
        f"{name}.weight": _fingerprint(layer.get_parameter("weight")) for name, layer in adapted_layers(module).items()
    }


def _check_base(module: nn.Module, folder: Path) -> None:
    """WeightsError unless ``module`` holds the weights that the updates of ``folder`` belong to."""
    path = folder / _BASE
    try:
        belongs: Mapping[str, str] = json.loads(path.read_text())["weights"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise WeightsError(f"{path} cannot be read, so nobody knows what the updates belong to: {error}") from error
    own = dict(module.named_parameters())
    for name, fingerprint in belongs.items():
        if name not in own:
            raise WeightsError(f"{folder} adapts {name}, which {type(module).__name__} does not have: another base")
        found = _fingerprint(own[name])
        if found != fingerprint:
            raise WeightsError(
                f"{folder} was made for another base: {name} {tuple(own[name].shape)} has fingerprint {found}, the "
                f"updates belong to {fingerprint}; load the weights that they were trained on"
            )


def _fingerprint(weight: Tensor) -> str:
    flat = weight.detach().flatten()
    chosen = torch.linspace(0, flat.numel() - 1, min(_SAMPLED, flat.numel()), dtype=torch.float64).long()
    values = flat[chosen.to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
    return hashlib.sha256(f"{tuple(weight.shape)}".encode() + values).hexdigest()[:16]


def _whole(module: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained beside the updates."""
    changed = updates(module)
    return {name: p for name, p in trainable(module).items() if name not in changed}


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error


def _compare(what: str, expected: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    missing, left = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    wrong = [
        f"{name}: expected {tuple(expected[name].shape)}, got {tuple(stored[name].shape)}"
        for name in sorted(expected.keys() & stored.keys())
        if expected[name].shape != stored[name].shape
    ]
    if missing or left or wrong:
        raise WeightsError(f"{what}: missing {missing[:10]}, left over {left[:10]}, of another shape {wrong[:10]}")
