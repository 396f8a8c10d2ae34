"""Architectures of published encoders by hub name, so that a run can be planned before its weights are there.

Taken from the ``config.json`` of each; only what differs from the defaults of the transformers class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SMALL: Mapping[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
_BASE: Mapping[str, Any] = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_LARGE: Mapping[str, Any] = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
#: A class token for each of four teachers, of which three have summaries.
_RADIO: Mapping[str, Any] = {"patch_size": 16, "num_cls_tokens": 4, "num_registers": 4, "summary_idxs": [0, 1, 2]}

#: The vision tower of Qwen2.5-VL, the same in all sizes but for the width of what it gives.
_QWEN: Mapping[str, Any] = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {**_QWEN, "out_hidden_size": 2048},
    "Qwen/Qwen2.5-VL-7B-Instruct": {**_QWEN, "out_hidden_size": 3584},
    "facebook/dinov2-small": {**_SMALL, "patch_size": 14, "image_size": 518},
    "facebook/dinov2-base": {**_BASE, "patch_size": 14, "image_size": 518},
    "facebook/dinov2-large": {**_LARGE, "patch_size": 14, "image_size": 518},
    "facebook/dinov2-giant": {
        "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True,
        "patch_size": 14, "image_size": 518,
    },
    "facebook/dinov3-vits16-pretrain-lvd1689m": {**_SMALL, "intermediate_size": 1536, "num_register_tokens": 4},
    "facebook/dinov3-vitb16-pretrain-lvd1689m": {**_BASE, "intermediate_size": 3072, "num_register_tokens": 4},
    "facebook/dinov3-vitl16-pretrain-lvd1689m": {**_LARGE, "intermediate_size": 4096, "num_register_tokens": 4},
    "google/siglip2-base-patch16-224": {**_BASE, "intermediate_size": 3072, "patch_size": 16, "image_size": 224},
    "google/siglip2-large-patch16-256": {**_LARGE, "intermediate_size": 4096, "patch_size": 16, "image_size": 256},
    "google/siglip2-so400m-patch14-384": {
        "hidden_size": 1152, "num_hidden_layers": 27, "num_attention_heads": 16, "intermediate_size": 4304,
        "patch_size": 14, "image_size": 384,
    },
    "nvidia/C-RADIOv3-B": {**_BASE, **_RADIO},
    "nvidia/C-RADIOv3-L": {**_LARGE, **_RADIO},
    "nvidia/RADIO-L": {**_LARGE, **_RADIO},
    "openai/clip-vit-base-patch16": {
        **_BASE, "intermediate_size": 3072, "patch_size": 16, "image_size": 224, "projection_dim": 512,
    },
    "openai/clip-vit-large-patch14": {
        **_LARGE, "intermediate_size": 4096, "patch_size": 14, "image_size": 224, "projection_dim": 768,
    },
}  # fmt: skip
