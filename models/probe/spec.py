"""The probe as a trainer sees it: one role, three independent loss terms."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from models.probe.losses import counts, cross_entropy, log_depth_l1
from models.probe.model import Probe
from models.spec import Batch, ModelSpec, RoleSpec, StepOutput


def step(module: nn.Module, batch: Batch, received: Mapping[str, Tensor]) -> StepOutput:
    """Forward and loss sums of one micro-batch. Nothing is received or sent: there is one role."""
    assert not received, "the probe has no edges"
    height, width = batch["depth"].shape[-2:]
    predicted = module(batch["tokens"], batch["summary"], (height, width))
    return StepOutput(
        sums={
            "depth_linear": log_depth_l1(predicted["depth_linear"], batch),
            "depth_dpt": log_depth_l1(predicted["depth_dpt"], batch),
            "segmentation": cross_entropy(predicted["segmentation"], batch),
        }
    )


TRAINER = RoleSpec(name="trainer", step=step, counts=counts, checkpointed=("DPTHead",))


def _size(name: str, **defaults: object) -> ModelSpec:
    return ModelSpec(
        name=name,
        build=Probe,
        defaults=defaults,
        roles=(TRAINER,),
        doc="Depth (linear, DPT) and segmentation (linear) heads on frozen features.",
    )


# channels, layers, summaries, summary_channels and classes follow from the encoder and the data of a run; what stands
# here is the encoder that the size is meant for, so that `models.build(name)` works by itself.
PROBE_TINY = _size(
    "probe-tiny",
    channels=64,
    layers=4,
    summaries=1,
    summary_channels=0,
    classes=20,
    dpt_levels=(16, 32, 32, 32),
    dpt_width=32,
    dpt_hidden=16,
)
PROBE_SMALL = _size(
    "probe-small",
    channels=384,
    layers=4,
    summaries=1,
    summary_channels=0,
    classes=20,
    dpt_levels=(48, 96, 192, 384),
    dpt_width=64,
    dpt_hidden=32,
)
PROBE_BASE = _size(
    "probe-base",
    channels=768,
    layers=4,
    summaries=1,
    summary_channels=0,
    classes=20,
    dpt_levels=(96, 192, 384, 768),
    dpt_width=256,
    dpt_hidden=32,
)
