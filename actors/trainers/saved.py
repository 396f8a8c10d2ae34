"""Whether what a backend gathered for a checkpoint is all of it: names, shapes, and no zeros where there are values.

A sharded backend that gathers wrongly gives tensors of no elements, of one rank's part, or zeros, and says nothing;
found when the run is resumed, it is too late.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from actors.trainers.tensors import local, saved_tensors, trainable

WEIGHTS, OPTIMIZER, AVERAGE = "weights.safetensors", "optimizer.safetensors", "ema.safetensors"
_SHOWN = 5


def gathered_problem(module: nn.Module, files: Mapping[str, Mapping[str, Tensor]]) -> str:
    """What is wrong with tensors that were gathered from ``module`` on this rank, by file; "" if nothing.

    Of the optimiser's there are none, or every field for every trained parameter.
    """
    own = saved_tensors(module)
    trained = trainable(module)
    fields = sorted({name.rsplit("/", 1)[1] for name in files.get(OPTIMIZER, {})})
    expected = {
        WEIGHTS: {name: _shape(tensor) for name, tensor in own.items()},
        AVERAGE: {name: _shape(tensor) for name, tensor in trained.items()},
        OPTIMIZER: {f"{name}/{field}": _shape(tensor) for name, tensor in trained.items() for field in fields},
    }
    for file, tensors in files.items():
        problem = _differing(expected[file], {name: tuple(value.shape) for name, value in tensors.items()})
        if problem:
            return f"{file}: {problem}"
    silent = [name for name, value in files[WEIGHTS].items() if not bool(value.any()) and bool(_part(own[name]).any())]
    if silent:
        return f"{WEIGHTS}: zero everywhere, which the rank's own part is not: {_listed(silent)}"
    return ""


def written_problem(folder: Path, files: Mapping[str, Mapping[str, Tensor]]) -> str:
    """What files of ``folder`` lack of the tensors that were written to them; "" if nothing."""
    for file, tensors in files.items():
        try:
            with safe_open(folder / file, framework="pt") as stored:
                found = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            return f"{file} cannot be read again: {error}"
        problem = _differing({name: tuple(value.shape) for name, value in tensors.items()}, found)
        if problem:
            return f"{file}, read again: {problem}"
    return ""


def _differing(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    missing, left = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [
        f"{name} is {found[name]} instead of {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        # Of an optimiser's fields, one number (a step) may stand for a parameter.
        if found[name] != expected[name] and not ("/" in name and found[name] == ())
    ]
    parts = [("missing", missing), ("left over", left), ("of another shape", wrong)]
    return "; ".join(f"{what}: {_listed(names)}" for what, names in parts if names)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    """The whole tensor's, also where stage 3 of ZeRO holds a part."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@torch.no_grad()
def _part(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank."""
    part: Tensor | None = getattr(tensor, "ds_tensor", None)
    return local(tensor) if part is None else part
