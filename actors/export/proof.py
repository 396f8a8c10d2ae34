"""Low-rank updates of a part: the network before them, and the proof that merged weights are what PEFT computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from actors.export.forward import core, outputs, random_inputs
from actors.recipes import Recipe
from actors.trainers.lora import LORA, adapted_weights, load_adapter
from actors.trainers.roles import read_settings
from actors.trainers.tensors import fill
from models.errors import WeightsError
from models.pretrained import describe_pretrained, network_of
from services.errors import ResumeError

TOLERANCE = 1e-4
"""Largest difference between merged and adapted outputs, by the root mean square of the latter."""
SHARE = 0.01
"""Largest part of what the updates change that this difference may be."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Of one forward pass on a random input: largest differences, by the root mean square of the adapted outputs."""

    error: float
    """Merged weights against the base with its updates, through PEFT."""
    change: float
    """Merged weights against the base."""

    @property
    def holds(self) -> bool:
        """Merged equals adapted, and the updates change something that could be seen."""
        return self.error <= TOLERANCE and self.change > 0 and self.error <= SHARE * self.change

    def as_dict(self) -> dict[str, float]:
        """JSON, with the limits."""
        return {"merged_from_adapted": self.error, "merged_from_base": self.change, "tolerance": TOLERANCE}

    def __str__(self) -> str:
        return f"merged differs from adapted by {self.error:.1e} and from the base by {self.change:.1e} (of the rms)"


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A part as it was before its updates, and what it gives with them."""

    base: nn.Module
    """Its weights beside the adapted ones are the trained ones."""
    adapter: Path
    outputs: Tensor
    """Of the part's network on :func:`actors.export.forward.random_inputs`, with the updates."""
    proof: Proof


def prove(recipe: Recipe, folder: Path, place: Path, merged: nn.Module) -> Adapted:
    """Compare a part with the base and the updates that it was merged from.

    Args:
        recipe: of the run.
        folder: of the run.
        place: folder of the part below it.
        merged: the part as it lies there.

    WeightsError with the figures where they do not agree, or the updates change nothing.
    """
    described = describe_pretrained(place)[LORA]
    base = _before(recipe, folder, described["role"], place.name)
    adapter = place.with_name(described["adapter"])
    child = network_of(base)
    updated = {f"{child}.{name}" if child else name for name in adapted_weights(adapter)}
    # What was trained whole, inside the network and beside it, is the same with and without updates.
    rest = {name: tensor for name, tensor in merged.state_dict().items() if name not in updated}
    base.load_state_dict(rest, strict=False)
    inputs = random_inputs(core(base))
    before, after = outputs(core(base), inputs), outputs(core(merged), inputs)
    network = base.get_submodule(child)
    alone = random_inputs(network)
    wrapped = load_adapter(network, adapter)  # in place: what holds the network goes through the updates too
    through, of_network = outputs(core(base), inputs), outputs(wrapped, alone)
    wrapped.unload()  # type: ignore[operator]
    scale = through.square().mean().sqrt()
    proof = Proof(
        error=float((after - through).abs().max() / scale), change=float((after - before).abs().max() / scale)
    )
    if not proof.holds:
        raise WeightsError(
            f"{place} is not what its base and {adapter.name} give: on a random input {proof}; allowed are "
            f"{TOLERANCE:.0e} from adapted, and {SHARE:.0%} of what the updates change. Either the base weights "
            "(model.init) are not those that the run began with, or it has hardly trained: train it again"
        )
    return Adapted(base=base, adapter=adapter, outputs=of_network, proof=proof)


def _before(recipe: Recipe, folder: Path, role: str, part: str) -> nn.Module:
    """A part as the run began with it: from the seed and ``model.init``."""
    settings = read_settings(folder, role)
    if settings is None:
        raise ResumeError(f"{folder}/models/{role}.json is missing: what role {role} was built from is not known")
    built = recipe.rebuild(role, settings)
    fill(built.module, built.weights or {})
    return recipe.parts(role, built.module, settings)[part].module.eval()
