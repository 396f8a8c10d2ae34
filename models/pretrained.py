"""Trained parts of a model as folders: ``config.json`` says what to build, ``model.safetensors`` holds the weights.

What a run has trained is saved so, and is read again as a frozen encoder, as the start of another run, or to
generate. Nothing is unpickled.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.errors import WeightsError
from models.registry import build

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = 1


def save_pretrained(
    module: nn.Module,
    folder: Path,
    name: str,
    settings: Mapping[str, Any],
    *,
    tensors: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write ``module`` so that :func:`load_pretrained` builds it again as ``models.build(name, **settings)``.

    ``tensors`` replaces the module's own state dict (gathered or averaged weights); ``extra`` goes into config.json
    (provenance). The weights are written first and config.json last, each under a temporary name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = module.state_dict() if tensors is None else tensors
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(kept, folder / f"{WEIGHTS}.tmp")
    (folder / f"{WEIGHTS}.tmp").replace(folder / WEIGHTS)
    described = {"format": FORMAT, "model": name, "settings": dict(settings), **(extra or {})}
    (folder / f"{CONFIG}.tmp").write_text(json.dumps(described, indent=1))
    (folder / f"{CONFIG}.tmp").replace(folder / CONFIG)


def describe_pretrained(folder: str | Path) -> dict[str, Any]:
    """The content of config.json. WeightsError when there is none, or of another format."""
    path = Path(folder).expanduser() / CONFIG
    try:
        described = json.loads(path.read_text())
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error}); train that part first, or give its folder") from error
    except json.JSONDecodeError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT or "model" not in described:
        raise WeightsError(f"{path} does not describe a part of ours (format {FORMAT}, model, settings)")
    return described


def read_pretrained(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved part by name. WeightsError when they cannot be read."""
    path = Path(folder).expanduser() / WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


def load_pretrained(folder: str | Path, **overrides: object) -> nn.Module:
    """Build the part that ``folder`` describes and load its weights, strictly; in eval mode.

    ``overrides`` replace settings that do not change the weights. WeightsError lists what does not fit.
    """
    described = describe_pretrained(folder)
    module = build(described["model"], **{**described["settings"], **overrides})
    load_part(module, folder)
    return module.eval()


def load_part(module: nn.Module, folder: str | Path, *, new: Sequence[str] = ()) -> None:
    """Load the weights of a saved part into ``module``, which must have exactly its tensors. WeightsError otherwise.

    ``new`` holds globs of tensors that the part may lack; they stay as they are.
    """
    tensors, own = read_pretrained(folder), module.state_dict()
    wrong = sorted(n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape)
    missing = [n for n in sorted(own.keys() - tensors.keys()) if not any(fnmatch.fnmatchcase(n, g) for g in new)]
    left = sorted(tensors.keys() - own.keys())
    if missing or left or wrong:
        shapes = [f"{n}: expected {tuple(own[n].shape)}, got {tuple(tensors[n].shape)}" for n in wrong[:10]]
        raise WeightsError(
            f"{folder} does not fit {type(module).__name__}: missing {missing[:10]}, left over {left[:10]}, "
            f"of another shape {shapes}"
        )
    module.load_state_dict(tensors, strict=False)
