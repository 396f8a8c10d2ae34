"""The network of a part as its own library keeps it: what is put beside it so that it is whole, and how it loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs import RunConfig
from models.encoders.weights import load_strict, read_json

FILES: Mapping[str, str] = {"language": "model.safetensors", "unet": "diffusion_pytorch_model.safetensors"}
"""Network -> file of its weights in its library's layout."""
QWEN = "qwen2_5_vl"
NOT_VISUAL = r".*\bvisual\..*"
"""What low-rank updates of Qwen2.5-VL leave out: the tower has layers of the same names, and was not there."""
VISUAL = "visual"
"""The encoder (key under ``encoders``) that is Qwen2.5-VL's vision tower."""


def load_network(place: Path, child: str) -> nn.Module:
    """A network as its own library loads it from a local folder; float32, in eval mode."""
    network: nn.Module
    if child == "language":
        import transformers

        qwen = read_json(place / "config.json").get("model_type") == QWEN
        kind: Any = transformers.AutoModelForImageTextToText if qwen else transformers.AutoModelForCausalLM
        network = load_strict(kind, place, torch.float32)
    else:
        from diffusers import UNet2DConditionModel

        network = UNet2DConditionModel.from_pretrained(place, local_files_only=True)
    for parameter in network.parameters():
        # The libraries leave weights where the file is mapped, at odd addresses, and kernels then sum in another order.
        parameter.data = parameter.data.clone()
    return network.eval()


def is_qwen(network: Any) -> bool:
    """Whether a network is Qwen2.5-VL, which a run trains without its vision tower."""
    return getattr(getattr(network, "config", None), "model_type", "") == QWEN


def complete(network: Any, config: RunConfig) -> None:
    """Put the run's frozen vision tower into a Qwen2.5-VL, in place, and say in its config which tokens are which.

    WeightsError when the tower is gone, or is another than the run was trained behind.
    """
    from models.spa3r.vlm.qwen import put_tower
    from models.text.tokenizer import VISION_TOKENS, load_tokenizer, token_id
    from services.features.encode import build_encoder
    from services.streams.frames import FrameColumns

    settings = dataclasses.replace(config.encoders[VISUAL], dtype="float32")
    encoder: Any = build_encoder(VISUAL, dataclasses.replace(config, encoders={**config.encoders, VISUAL: settings}))
    put_tower(network, encoder.load().model)
    tokenizer = load_tokenizer(config.data.text.tokenizer)
    start, _, end = (token_id(tokenizer, name) for name in VISION_TOKENS)
    for module in (network, network.model):
        module.config.vision_start_token_id, module.config.vision_end_token_id = start, end
    network.generation_config.eos_token_id = FrameColumns(config).end_of_turn
