"""Trained parts of a model as folders: ``config.json`` says what to build, ``model.safetensors`` holds the weights.

What a run has trained is saved so, and is read again as a frozen encoder, as the start of another run, or to
generate. Nothing is unpickled.

A part may hold a *network* of transformers or diffusers: the child that its class names as ``network``. An export
writes that one in its library's layout, and ``networks`` in the part's config.json says in which file it lies:
``{"language": "../language/model.safetensors"}``. Where the names in that file are not ours, ``layouts`` says which
layout it has: ``{"language": "qwen2_5_vl"}``. ``adapters`` names low-rank updates of it that lie in another folder
still; such a part is not whole, and is refused here.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.errors import WeightsError
from models.registry import build

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
NETWORKS, LAYOUTS, ADAPTERS = "networks", "layouts", "adapters"
FORMAT = 1

Rename = Callable[[str], str]
"""Name in a file -> name in a module; "" for a tensor that the module has no place for."""
_RENAMES: Mapping[str, str] = {"qwen2_5_vl": "models.spa3r.vlm.qwen:text_name"}
"""Layout of a network's file -> "module:function" that renames what it holds."""


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


def describe_pretrained(folder: str | Path, *, any_format: bool = False) -> dict[str, Any]:
    """The content of config.json. WeightsError when there is none, or (unless ``any_format``) of another format."""
    path = Path(folder).expanduser() / CONFIG
    try:
        described = json.loads(path.read_text())
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error}); train that part first, or give its folder") from error
    except ValueError as error:  # no JSON, or no text
        raise WeightsError(f"{path} is not JSON ({error}); save that part again, or give another folder") from error
    if isinstance(described, dict) and any_format:
        return described
    whole = isinstance(described, dict) and "model" in described and isinstance(described.get("settings"), dict)
    if not whole or described.get("format") != FORMAT:
        raise WeightsError(f"{path} does not describe a part of ours (format {FORMAT}, model, settings)")
    return described


def read_pretrained(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved part by name. WeightsError when they cannot be read."""
    path = Path(folder).expanduser()
    tensors = _read(path / WEIGHTS)
    for file, rename in _networks(path).items():
        tensors |= {ours: tensor for name, tensor in _read(path / file).items() if (ours := rename(name))}
    return tensors


class StoredTensors(Mapping[str, Tensor]):
    """Tensors of safetensors files by name, each read when it is asked for.

    They are views of the mapped files, which the system may drop from memory: whoever holds them holds no copy, and
    must not write to them.
    """

    def __init__(self, files: Mapping[str, tuple[Path, str]]) -> None:
        """``files``: name -> the file, and the tensor's name in it."""
        self._files = dict(files)
        self._open: dict[Path, Any] = {}

    @classmethod
    def of(cls, folder: str | Path) -> StoredTensors:
        """Those of a part of ours, or of a folder as transformers writes it (one file, or several and an index).

        WeightsError when there are none.
        """
        path = Path(folder).expanduser()
        sources: dict[str, Rename] = {WEIGHTS: str}
        if (path / INDEX).is_file():
            listed = json.loads((path / INDEX).read_text())["weight_map"]
            sources = dict.fromkeys(sorted(set(listed.values())), str)
        else:
            sources |= _networks(path)
        return cls(
            {
                ours: (path / file, name)
                for file, rename in sources.items()
                for name in _names(path / file)
                if (ours := rename(name))
            }
        )

    def renamed(self, rename: Rename) -> StoredTensors:
        """The same tensors under other names; those for which ``rename`` gives "" are left out."""
        return StoredTensors({new: where for name, where in self._files.items() if (new := rename(name))})

    def __getitem__(self, name: str) -> Tensor:
        path, stored = self._files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        tensor: Tensor = self._open[path].get_tensor(stored)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as stored:
            return list(stored.keys())
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error


@contextmanager
def empty_weights() -> Iterator[None]:
    """Within it modules are built with parameters on the meta device; buffers, which no file holds, are real.

    Not for several threads at a time: it changes how every module takes a parameter.
    """
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = empty

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def network_of(module: nn.Module) -> str:
    """Name of the child that is a network of transformers or diffusers; "" without one."""
    return str(getattr(module, "network", ""))


def _networks(folder: Path) -> dict[str, Rename]:
    """File -> our names of what it holds, of networks that lie elsewhere.

    WeightsError for a part that lacks its low-rank updates, and for a layout that nobody knows.
    """
    if not (folder / CONFIG).is_file():
        return {}
    described = describe_pretrained(folder, any_format=True)
    if described.get(ADAPTERS):
        raise WeightsError(
            f"{folder} is a part without its low-rank updates, which lie in {list(described[ADAPTERS].values())}: "
            "export the run with --merge to use it as it is, or load the updates with PEFT"
        )
    layouts = described.get(LAYOUTS, {})
    return {
        file: _renaming(folder, child, layouts.get(child, "")) for child, file in described.get(NETWORKS, {}).items()
    }


def _renaming(folder: Path, child: str, layout: str) -> Rename:
    """Name in a network's file -> name in the part."""
    if layout not in ("", *_RENAMES):
        raise WeightsError(
            f"{folder / CONFIG}: {child!r} has the layout {layout!r}; known are {', '.join(_RENAMES)}, or none"
        )
    module, _, function = _RENAMES.get(layout, "").partition(":")
    inner: Rename = getattr(import_module(module), function) if module else str

    def rename(name: str) -> str:
        ours = inner(name)
        return f"{child}.{ours}" if ours else ""

    return rename


def _read(path: Path) -> dict[str, Tensor]:
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
    # Transformers stores a weight that has two names (tied embeddings) under one.
    tied = {(t.data_ptr(), t.shape) for n, t in own.items() if n in tensors}
    missing = [
        n
        for n in sorted(own.keys() - tensors.keys())
        if (own[n].data_ptr(), own[n].shape) not in tied and not any(fnmatch.fnmatchcase(n, g) for g in new)
    ]
    left = sorted(tensors.keys() - own.keys())
    if missing or left or wrong:
        shapes = [f"{n}: expected {tuple(own[n].shape)}, got {tuple(tensors[n].shape)}" for n in wrong[:10]]
        raise WeightsError(
            f"{folder} does not fit {type(module).__name__}: missing {missing[:10]}, left over {left[:10]}, "
            f"of another shape {shapes}"
        )
    module.load_state_dict(tensors, strict=False)
