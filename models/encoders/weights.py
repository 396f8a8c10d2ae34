"""Where an encoder's weights come from, their digest, and strict loading through transformers.

Only safetensors are read: nothing here unpickles. A model is held in the compute dtype. A weight that is missing,
left over or of another shape is an error that lists names: a network with one freshly initialised layer gives
features that look healthy and are worthless.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.errors import ModelError, WeightsError

RANDOM = "random"
_CHUNK = 1 << 20
_MAX_NAMES = 20

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str) -> torch.dtype:
    """The compute dtype called ``name``; ModelError lists the ones there are."""
    if name not in DTYPES:
        raise ModelError(f"unknown dtype {name!r}; an encoder computes in {sorted(DTYPES)}")
    return DTYPES[name]


#: What is fetched of a hub name: weights that unpickle nothing, settings, tokenizers.
FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model")


def resolve_folder(weights: str, files: Sequence[str] = FETCHED) -> Path:
    """A local folder, or the local snapshot of a hub name (downloaded when the hub may be reached).

    ``files`` are globs of what is fetched. WeightsError when it is neither, with the command that fetches it on a
    machine that can; with HF_HUB_OFFLINE=1 nothing is ever downloaded.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        return path
    if _is_path(weights):
        raise WeightsError(f"weights {weights!r}: there is no such folder")
    from huggingface_hub import constants, snapshot_download

    try:
        found = snapshot_download(weights, allow_patterns=list(files))
    except (OSError, ValueError) as error:
        globs = " ".join(f"--include '{glob}'" for glob in files)
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"weights {weights!r} are neither a local folder nor in the cache {constants.HF_HUB_CACHE}, and cannot be "
            f"fetched here ({why}). Run `hf download {weights} {globs}` where the hub can be reached and bring its "
            "cache here (HF_HUB_CACHE says where), or give the path of a folder that holds them, or use weights=random"
        ) from error
    return Path(found)


def _is_path(weights: str) -> bool:
    """Whether ``weights`` cannot be a hub name."""
    return Path(weights).expanduser().is_absolute() or weights.startswith((".", "~"))


def local_folder(weights: str) -> Path | None:
    """The folder, or the snapshot that the cache holds of a hub name (of all its files or some); None without one.

    Nothing is downloaded.
    """
    path = Path(weights).expanduser()
    if path.is_dir():
        return path
    if _is_path(weights):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(weights, local_files_only=True))
    except (OSError, ValueError):
        return None


def is_here(weights: str) -> bool:
    """Whether ``weights`` (a folder, a file, a hub name) are on this machine, or random; nothing is downloaded."""
    return weights == RANDOM or Path(weights).expanduser().exists() or local_folder(weights) is not None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a weights folder. WeightsError names the file that is missing or broken."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise WeightsError(f"{path} is missing; a weights folder holds config.json and model.safetensors") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a weights folder, by its index where it is sharded."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise WeightsError(f"{folder} has no {missing or 'shards in its index'}; only safetensors are read")
    return files


def read_tensors(weights: str | Path) -> dict[str, Tensor]:
    """All tensors of a weights folder (or hub name), or of one safetensors file. WeightsError when unreadable."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(weights).expanduser()
    files = [path] if path.is_file() else weight_files(resolve_folder(str(weights)))
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{file} cannot be read as safetensors: {error}") from error
    return tensors


def _stored_tensors(file: Path) -> Iterator[tuple[str, str, list[int], int, int]]:
    """(name, dtype, shape, first byte, past the last byte) of every tensor of a safetensors file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= 100 << 20:
            raise WeightsError(f"{file} is no safetensors file: its header would have {length} bytes")
        try:
            header = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise WeightsError(f"{file} is no safetensors file: {error}") from error
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, entry["dtype"], entry["shape"], 8 + length + start, 8 + length + end


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Shape of every stored tensor of a folder by name, from the headers alone."""
    return {name: shape for file in weight_files(folder) for name, _, shape, _, _ in _stored_tensors(file)}


def stored_digest(folder: Path, prefixes: Sequence[str] = ("",)) -> str:
    """sha256 over the stored tensors of a folder in order of their names: name, dtype, shape, bytes.

    The same tensors in one file or many give the same digest; the metadata and the order in the file do not count.
    Of a network in several parts only those tensors may count whose names begin with one of ``prefixes``.
    """
    digest = hashlib.sha256()
    tensors = [
        (entry, file)
        for file in weight_files(folder)
        for entry in _stored_tensors(file)
        if entry[0].startswith(tuple(prefixes))
    ]
    for (name, dtype, shape, start, end), file in sorted(tensors, key=lambda item: item[0][0]):
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
        with file.open("rb") as stream:
            stream.seek(start)
            left = end - start
            while left:
                chunk = stream.read(min(_CHUNK, left))
                if not chunk:
                    raise WeightsError(f"{file} is truncated: tensor {name} ends at byte {end}")
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def same_digest(found: str, expected: str, where: object) -> str:
    """``found``, unless another digest was expected: WeightsError, since records would carry the wrong name."""
    if expected and found != expected:
        raise WeightsError(
            f"the weights of {where} have sha256 {found[:16]}..., {expected[:16]}... is expected: they changed after "
            "the run began, or differ between machines; put the old ones back, or start a new run"
        )
    return found


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over tensors in memory in order of their names: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _OwnDraws(TorchDispatchMode):
    """Random operations of this thread draw from a generator of their own instead of the global one.

    Saving, seeding and restoring the global generator would do in a program with one thread. Here encoders are
    built in threads of a running trainer, and two of them at once would mix their draws.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            if not any(argument.name == "generator" for argument in func._schema.arguments):
                func = func.overloadpacket.generator  # randn and its like have it as an overload
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module initialised from ``seed`` alone, in float32 on CPU; the global generator is not touched."""
    with _OwnDraws(seed):
        return build().float()


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more


def load_strict(
    model_class: Any,
    folder: Path,
    dtype: torch.dtype,
    other_tower: Sequence[str] = (),
    may_lack: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """``model_class`` with the weights of ``folder``; WeightsError lists every name that does not fit.

    ``other_tower`` names the prefixes of what a two-tower checkpoint holds beside this model; ``may_lack`` the endings
    of tensors that start with the right values where they are not stored.
    """
    weight_files(folder)  # a clear error before transformers looks for other formats
    try:
        model, info = model_class.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report below lists them all
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{folder} cannot be loaded as {model_class.__name__}: {error}") from error
    unexpected = {n for n in info["unexpected_keys"] if not n.startswith(tuple(other_tower))}
    problems = []
    missing = [name for name in info["missing_keys"] if not name.endswith(tuple(may_lack))]
    if missing:
        problems.append(f"missing: {_listed(missing)}")
    if unexpected:
        problems.append(f"not part of the model: {_listed(unexpected)}")
    if info["mismatched_keys"]:
        shapes = [f"{name} {tuple(stored)} instead of {tuple(want)}" for name, stored, want in info["mismatched_keys"]]
        problems.append(f"of another shape: {_listed(shapes)}")
    problems += info["error_msgs"]
    if problems:
        raise WeightsError(f"{folder} does not fit {model_class.__name__}: " + "; ".join(problems))
    return model
