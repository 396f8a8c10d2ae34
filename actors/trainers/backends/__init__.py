"""How one role's weights, gradients and optimiser are spread over its ranks; :func:`make_backend` chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs import ConfigError
from configs.schema import BackendConfig

if TYPE_CHECKING:
    import torch

    from actors.trainers.backends.base import Backend

NAMES = ("single", "ddp", "fsdp2", "zero2", "zero3")


def make_backend(config: BackendConfig, device: torch.device | str) -> Backend:
    """The backend that ``config`` names, for this process.

    All but ``single`` work over torch's default process group; where there is none, one of this process alone is made.
    ConfigError for an unknown name.
    """
    if config.name not in NAMES:
        raise ConfigError(f"backend.name={config.name!r} is unknown; choose one of {', '.join(NAMES)}")
    if config.name == "single":
        from actors.trainers.backends.single import SingleBackend

        return SingleBackend(device)
    _ensure_group(device)
    if config.name == "ddp":
        from actors.trainers.backends.ddp import DdpBackend

        return DdpBackend(device)
    if config.name == "fsdp2":
        from actors.trainers.backends.fsdp2 import Fsdp2Backend

        return Fsdp2Backend(device, reshard_after_forward=config.reshard_after_forward)
    from actors.trainers.backends.zero import ZeroBackend

    return ZeroBackend(
        device,
        stage=int(config.name.removeprefix("zero")),
        persistence_threshold=config.persistence_threshold,
        offload=config.offload,
    )


def _ensure_group(device: torch.device | str) -> None:
    """A process group of one where nobody has made one, as in a run without Ray."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
