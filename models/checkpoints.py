"""Published weights into our modules: every name and shape is accounted for, or the load fails with the lists."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.errors import WeightsError
from models.registry import spec


@dataclass(frozen=True)
class Part:
    """One of several equal parts, along the first axis, of a published tensor that we hold as several."""

    name: str
    """Published name of the whole."""
    index: int
    of: int

    def take(self, whole: Tensor) -> Tensor:
        """Cut the part out of the whole."""
        return whole.chunk(self.of)[self.index]


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


def published_names(model: nn.Module) -> dict[str, str | Part]:
    """Our tensor name -> published name (or part of it), for every tensor of the model's state dict.

    A model says so by a method ``reference_names()``, or by ``to_published`` of the spec it was built from; names
    that neither mentions are published as they are.
    """
    ours: dict[str, str | Part] = {name: name for name in model.state_dict()}
    own = getattr(model, "reference_names", None)
    if callable(own):
        return {**ours, **own()}
    built_from = getattr(model, "model_name", None)
    if built_from is not None:
        mapping = spec(built_from).to_published
        if mapping is not None:
            return {**ours, **mapping(model)}
    return ours


def published_gradient(model: nn.Module, published: str) -> Tensor:
    """Gradient of the tensor that is published under this name, in its published shape; call it after a backward.

    Where several of our tensors are one published tensor, their gradients are put together. WeightsError for a name
    that the model does not have, or a tensor without a gradient.
    """
    found: list[tuple[int, str]] = []
    for ours, theirs in published_names(model).items():
        if isinstance(theirs, Part):
            if theirs.name == published:
                found.append((theirs.index, ours))
        elif theirs == published:
            found.append((0, ours))
    if not found:
        raise WeightsError(f"{type(model).__name__} has no tensor that is published as {published!r}")
    gradients = []
    for _, ours in sorted(found):
        gradient = model.get_parameter(ours).grad
        if gradient is None:
            raise WeightsError(f"{published} ({ours}) has no gradient: no backward has reached it")
        gradients.append(gradient)
    return torch.cat(gradients) if len(gradients) > 1 else gradients[0]


def load_reference(
    model: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool = True, skip: Sequence[str] = ()
) -> LoadReport:
    """Load published tensors by their published names.

    ``skip`` holds globs of published names that are neither loaded nor expected; a model adds those it has no use
    for (``reference_ignored``), and may first bring the state dict to one form (``adapt_reference``: second names,
    copies). Works on the meta device: tensors of a meta state dict are checked only, real tensors replace meta
    parameters. With ``strict``, WeightsError lists what is missing, unexpected or of another shape, and nothing has
    been loaded then.
    """
    adapt = getattr(model, "adapt_reference", None)
    given = adapt(state_dict) if callable(adapt) else state_dict
    patterns = (*skip, *getattr(model, "reference_ignored", ()))
    targets = model.state_dict(keep_vars=True)
    names = {ours: theirs for ours, theirs in published_names(model).items() if ours in targets}
    parts = {ours: theirs if isinstance(theirs, Part) else Part(theirs, 0, 1) for ours, theirs in names.items()}
    everywhere = {*given, *(part.name for part in parts.values())}
    skipped = {name for name in everywhere if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    expected = {ours: part for ours, part in parts.items() if part.name not in skipped}
    mismatched, found = set(), {}
    for ours, part in expected.items():
        if part.name in given:
            whole = (targets[ours].shape[0] * part.of, *targets[ours].shape[1:]) if part.of > 1 else targets[ours].shape
            if given[part.name].shape == torch.Size(whole):
                found[ours] = part.take(given[part.name]) if part.of > 1 else given[part.name]
            else:
                got = tuple(given[part.name].shape)
                mismatched.add(f"{part.name}: expected {tuple(whole)}, got {got}")
    wanted = {part.name for part in expected.values()}
    report = LoadReport(
        loaded=tuple(sorted({expected[ours].name for ours in found})),
        missing=tuple(sorted(wanted - set(given))),
        unexpected=tuple(sorted(set(given) - wanted - skipped)),
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
