"""What one role trains: its model, built without memory for the features and data of the run."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from actors.preflight.encoders import EncoderCost
from actors.preflight.memory import StepCost, step_cost
from actors.recipes import probe
from configs.schema import RunConfig
from services.errors import ModelError


def role_cost(config: RunConfig, features: EncoderCost, classes: int, workers: int) -> StepCost:
    """The cost of one worker's micro-batch of the role ``trainer``. ModelError for a model that cannot be built.

    Args:
        config: The run.
        features: The encoder that feeds the model.
        classes: Semantic classes of the data.
        workers: Workers that a global micro-batch is divided among.
    """
    settings = config.encoders[config.recipe.features]
    samples = config.trainer.micro_batch // workers
    # Fake tensors have shapes and a device, and no memory; unlike those on the meta device, autocast acts on them.
    with FakeTensorMode():
        batch = probe_batch(features, samples, settings.height, settings.width)
        arguments = probe.model_settings(config, batch, classes)
        module, role = probe.build_probe(config.model.name, arguments, config.seed)
        if config.peft.method != "none" and not (config.peft.targets or role.lora_targets):
            raise ModelError(
                f"peft.method={config.peft.method}: {config.model.name} names no modules for it (it is trained whole); "
                "set peft.targets, or peft=none"
            )
        return step_cost(
            module, role, batch, autocast=config.trainer.precision == "bfloat16", ema=config.trainer.ema > 0
        )


def probe_batch(features: EncoderCost, samples: int, height: int, width: int) -> dict[str, Any]:
    """Columns of a collated micro-batch of the probe, on the default device."""
    columns: dict[str, Any] = {
        name: torch.empty((samples, *(axis or 1 for axis in output.shape)), dtype=getattr(torch, output.dtype))
        for name, output in features.outputs.items()
    }
    columns |= {
        "depth": torch.ones(samples, height, width),
        "labels": torch.zeros(samples, height, width, dtype=torch.int64),
        "scene_type": torch.zeros(samples, dtype=torch.int64),
        "weight": torch.ones(samples),
    }
    return columns
