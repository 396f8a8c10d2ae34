"""Published weights into our modules: every name and shape is accounted for, or the load fails with the lists."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.errors import WeightsError
from models.registry import spec


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What a load did. Names are published ones, as in the given state dict."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    """Expected by the model, absent from the state dict."""
    unexpected: tuple[str, ...]
    """In the state dict, but no tensor of the model has that name."""
    mismatched: tuple[str, ...]
    """``name: expected (...), got (...)`` for tensors of another shape; they were not loaded."""
    skipped: tuple[str, ...]
    """Left out because they match a pattern of ``skip``."""

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, left over or of the wrong shape."""
        return not (self.missing or self.unexpected or self.mismatched)


def published_names(model: nn.Module) -> dict[str, str]:
    """Our tensor name -> published name, for every tensor of the model's state dict.

    A model says so by a method ``reference_names()``, or by ``to_published`` of the spec it was built from; names
    that neither mentions are published as they are.
    """
    ours = {name: name for name in model.state_dict()}
    own = getattr(model, "reference_names", None)
    if callable(own):
        return {**ours, **own()}
    built_from = getattr(model, "model_name", None)
    if built_from is not None:
        mapping = spec(built_from).to_published
        if mapping is not None:
            return {**ours, **mapping(model)}
    return ours


def load_reference(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool = True, skip: Sequence[str] = ()
) -> LoadReport:
    """Load published tensors by their published names.

    ``skip`` holds globs of published names that are neither loaded nor expected. Works on the meta device: tensors
    of a meta state dict are checked only, real tensors replace meta parameters. With ``strict``, WeightsError lists
    what is missing, unexpected or of another shape, and nothing has been loaded then.
    """

    def is_skipped(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in skip)

    targets = model.state_dict(keep_vars=True)
    names = {ours: published for ours, published in published_names(model).items() if ours in targets}
    skipped = {name for name in [*state_dict, *names.values()] if is_skipped(name)}
    expected = {ours: published for ours, published in names.items() if published not in skipped}
    missing, mismatched, found = [], [], {}
    for ours, published in expected.items():
        if published not in state_dict:
            missing.append(published)
        elif state_dict[published].shape != targets[ours].shape:
            want, got = tuple(targets[ours].shape), tuple(state_dict[published].shape)
            mismatched.append(f"{published}: expected {want}, got {got}")
        else:
            found[ours] = state_dict[published]
    report = LoadReport(
        loaded=tuple(sorted(expected[ours] for ours in found)),
        missing=tuple(sorted(missing)),
        unexpected=tuple(sorted(set(state_dict) - set(expected.values()) - skipped)),
        mismatched=tuple(sorted(mismatched)),
        skipped=tuple(sorted(skipped)),
    )
    if strict and not report.complete:
        raise WeightsError(_describe(type(model).__name__, report))
    _copy(model, found)
    return report


def _copy(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy real tensors in; where the parameter is on meta, the tensor takes its place."""
    real = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    targets = model.state_dict(keep_vars=True)
    materialised = {name: tensor for name, tensor in real.items() if targets[name].is_meta}
    model.load_state_dict(materialised, strict=False, assign=True)
    with torch.no_grad():
        for name in real.keys() - materialised.keys():
            targets[name].copy_(real[name])


def _describe(model: str, report: LoadReport) -> str:
    """The message of a failed load: every list, each cut after twenty names."""
    lines = [f"weights do not fit {model}:"]
    for title in ("missing", "unexpected", "mismatched"):
        names: tuple[str, ...] = getattr(report, title)
        if names:
            rest = f" ... and {len(names) - 20} more" if len(names) > 20 else ""
            lines.append(f"  {title} ({len(names)}): {', '.join(names[:20])}{rest}")
    lines.append("  pass strict=False to load what fits, or skip=[...] with globs of names to leave out")
    return "\n".join(lines)
