"""What each role of a run trains: its model, built without memory, on batches of the kinds that it takes part in."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from actors.preflight.batches import Lengths, fake_batch
from actors.preflight.encoders import EncoderCost
from actors.preflight.fake import building
from actors.preflight.memory import StepCost, spread, step_and_outputs
from actors.recipes import Recipe, open_recipe
from actors.recipes.base import Facts
from configs.roles import role_config
from configs.schema import BackendConfig, RunConfig
from models.spec import RoleSpec, TensorSpec
from models.uniugg.losses_rgb import colour_terms
from services.errors import ModelError
from services.streams.columns import column_specs
from services.streams.inputs import kind_inputs, wanted_kinds
from services.streams.plan import micro_batch_kinds
from services.streams.targets import Targets

_LPIPS_SIDE = 64
"""Pixels of a picture that is large enough for its trunk."""


@dataclass(frozen=True, kw_only=True)
class RoleCost:
    """One worker of a role: a micro-batch of every kind, and how many of each a step has."""

    kinds: Mapping[str, StepCost]
    micro_batches: Mapping[str, int]
    """Of a step, by kind, those that the role takes part in."""
    samples: int
    """Of one worker in a micro-batch."""
    sends: Mapping[str, int] = field(default_factory=dict)
    """Role -> bytes of activations that leave for it in a step, from one worker."""
    receives: Mapping[str, int] = field(default_factory=dict)
    """Role -> bytes of gradients that come back, in a step, to one worker."""

    @property
    def trainable(self) -> int:
        """Parameters that are trained."""
        return next(iter(self.kinds.values())).trainable

    @property
    def frozen(self) -> int:
        """Parameters that are not."""
        return next(iter(self.kinds.values())).frozen

    @property
    def flops(self) -> int:
        """Forward and backward of all micro-batches of a step."""
        return sum(self.micro_batches[kind] * cost.flops for kind, cost in self.kinds.items())

    @property
    def model_flops(self) -> int:
        """The same without what activation checkpointing computes again."""
        return self.flops - sum(self.micro_batches[kind] * cost.recomputed for kind, cost in self.kinds.items())

    @property
    def sample_flops(self) -> float:
        """Of one sample, on average over the kinds."""
        return self.flops / (self.samples * sum(self.micro_batches.values()))

    @property
    def batch(self) -> int:
        """Bytes of the collated tensors of a step."""
        return sum(self.micro_batches[kind] * cost.batch for kind, cost in self.kinds.items())

    @property
    def peak(self) -> int:
        """Peak bytes of tensors, over the kinds."""
        return max(cost.peak(sum(self.micro_batches.values())) for cost in self.kinds.values())

    @property
    def host(self) -> int:
        """Bytes that are kept for the device in the host's memory."""
        return max(cost.host for cost in self.kinds.values())


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One worker's micro-batches of a role as a process alone has them, before a backend divides anything."""

    module: nn.Module
    spec: RoleSpec
    kinds: Mapping[str, StepCost]
    micro_batches: Mapping[str, int]
    samples: int
    sends: Mapping[str, int]
    receives: Mapping[str, int]
    arrives: Mapping[str, Mapping[str, Tensor]]
    """Kind -> what it gets from other roles with a micro-batch, as fake tensors."""

    def on(self, backend: BackendConfig, workers: int, *, accelerated: bool) -> RoleCost:
        """The cost of one of ``workers``; ``accelerated``: on a GPU."""
        return RoleCost(
            kinds={
                kind: spread(cost, self.module, self.spec, backend, workers, accelerated=accelerated)
                for kind, cost in self.kinds.items()
            },
            micro_batches=self.micro_batches,
            samples=self.samples,
            sends=self.sends,
            receives=self.receives,
        )


def role_costs(
    config: RunConfig, encoders: Mapping[str, EncoderCost], classes: int, lengths: Lengths
) -> dict[str, RoleCost]:
    """The cost of every role of the recipe. ConfigError or ModelError for a model that cannot be built.

    Args:
        config: The run.
        encoders: Those that the run uses.
        classes: Semantic classes of the data.
        lengths: Of ragged columns.
    """
    found = {}
    for role, traced in trace_roles(config, encoders, classes, lengths).items():
        asked = config.cluster.roles[role]
        backend = role_config(config, role).backend
        found[role] = traced.on(backend, min(asked.workers), accelerated=asked.num_gpus > 0)
    return found


def trace_roles(
    config: RunConfig, encoders: Mapping[str, EncoderCost], classes: int, lengths: Lengths
) -> dict[str, Traced]:
    """Every role of the recipe, stepped without memory; arguments and errors as of :func:`role_costs`."""
    recipe = open_recipe(config)
    facts = Facts(outputs=lambda name: encoders[name].outputs, classes=classes, assume=True)
    counts = Counter(micro_batch_kinds(config.recipe.quotas, config.trainer.accumulation))
    crossing: dict[tuple[str, str, str], Tensor] = {}
    return {role: _trace(recipe, role, facts, counts, lengths, crossing) for role in _sources_first(recipe)}


def _sources_first(recipe: Recipe) -> Sequence[str]:
    """The recipe's roles, each after those that send to it."""
    left, ordered = list(recipe.roles), []
    while left:
        free = [role for role in left if not any(e.target == role and e.source in left for e in recipe.edges)]
        assert free, "edges of a model make no circle"
        ordered += free
        left = [role for role in left if role not in free]
    return ordered


def _trace(
    recipe: Recipe,
    role: str,
    facts: Facts,
    counts: Mapping[str, int],
    lengths: Lengths,
    crossing: dict[tuple[str, str, str], Tensor],
) -> Traced:
    """One role; ``crossing`` holds by (role, kind, tensor) what the roles before it send, and gets what it sends."""
    config = role_config(recipe.config, role)
    samples = config.trainer.micro_batch // min(config.cluster.roles[role].workers)
    specs = role_columns(config, role, facts)
    module, spec = _described(recipe, role, facts)
    kinds, taken, arrives, sends, receives = {}, {}, {}, Counter[str](), Counter[str]()
    for kind, count in counts.items():
        if kind not in specs or not spec.takes_part(kind):
            continue
        batch = fake_batch(kind, specs[kind], samples, lengths, module)
        incoming = [e for e in recipe.edges if e.target == role and kind in e.kinds]
        received = {
            t.name: _arriving(crossing[e.source, kind, t.name], samples, t.gradient)
            for e in incoming
            for t in e.tensors
        }
        cost, outputs = step_and_outputs(
            module,
            spec,
            batch,
            received,
            autocast=config.trainer.precision == "bfloat16",
            ema=config.trainer.ema > 0,
            checkpointing=config.trainer.activation_checkpointing,
        )
        crossing |= {(role, kind, name): tensor for name, tensor in outputs.items()}
        for edge in (e for e in recipe.edges if e.source == role and kind in e.kinds):
            sizes = {t.name: outputs[t.name].numel() * outputs[t.name].element_size() for t in edge.tensors}
            sends[edge.target] += count * sum(sizes.values())
            receives[edge.target] += count * sum(sizes[t.name] for t in edge.tensors if t.gradient)
        kinds[kind], taken[kind], arrives[kind] = cost, count, received
    return Traced(
        module=module, spec=spec, kinds=kinds, micro_batches=taken, samples=samples, sends=dict(sends),
        receives=dict(receives), arrives=arrives,
    )  # fmt: skip


def _described(recipe: Recipe, role: str, facts: Facts) -> tuple[nn.Module, RoleSpec]:
    """A role's module as it is trained, without memory. ModelError where it cannot be adapted as the run asks."""
    from actors.trainers.roles import adapt, base_dtype

    config = role_config(recipe.config, role)
    settings, bare = recipe.describe(role, facts), without_weights(recipe)
    with building():
        built = bare.rebuild(role, settings)
        if config.peft.method != "none" and not (config.peft.targets or built.spec.lora_targets):
            raise ModelError(
                f"peft.method={config.peft.method}: {config.model.name} names no modules for it (it is trained whole); "
                "set peft.targets, or peft=none"
            )
        gpu = config.cluster.roles[role].num_gpus > 0
        return adapt(recipe.config, role, built, base=base_dtype(recipe, role, accelerated=gpu)), built.spec


def without_weights(recipe: Recipe) -> Recipe:
    """The recipe of the same run with nothing to start from: its modules have no memory that weights could fill.

    The network that LPIPS looks through is read here, where it is there, and left out of the loss where it is not: the
    first step would read it, but fake tensors cannot be filled.
    """
    config = recipe.config
    model, uniugg = dataclasses.replace(config.model, init={}), config.recipe.uniugg
    if uniugg.lpips_weights and not Path(uniugg.lpips_weights).expanduser().exists():
        uniugg = dataclasses.replace(uniugg, lpips_weights="")
    elif uniugg.lpips_weights:
        colour_terms(
            torch.zeros(1, _LPIPS_SIDE, _LPIPS_SIDE, 3),
            torch.zeros(1, _LPIPS_SIDE, _LPIPS_SIDE, 3, dtype=torch.uint8),
            lpips=uniugg.rgb_lpips,
            ssim_weight=0.0,
            lpips_weights=uniugg.lpips_weights,
        )
    return open_recipe(
        dataclasses.replace(config, model=model, recipe=dataclasses.replace(config.recipe, uniugg=uniugg))
    )


def _arriving(sent: Tensor, samples: int, gradient: bool) -> Tensor:
    """What a worker with ``samples`` samples receives of a tensor that another role's worker sends."""
    with sent.fake_mode:  # type: ignore[attr-defined]  # outputs of a step on fake tensors are fake
        return torch.empty((samples, *sent.shape[1:]), dtype=sent.dtype, requires_grad=gradient)


def role_columns(config: RunConfig, role: str, facts: Facts) -> dict[str, dict[str, TensorSpec]]:
    """Columns of the kinds that ``role`` reads, text left out: see :mod:`actors.preflight.batches`."""
    inputs = {kind: made for kind, made in kind_inputs(config, role).items() if kind in wanted_kinds(config)}
    targets = Targets(config, {}, inputs=inputs)
    try:
        columns = column_specs(config, inputs, facts.outputs, targets=targets)
    finally:
        targets.close()
    return {
        kind: columns[kind] | ({"input_ids": TEXT, "supervised": TEXT} if inputs[kind].text else {}) for kind in columns
    }


TEXT = TensorSpec(shape=(None,), dtype="int64")
