"""What somebody else's process gets from exported folders: ``python -m tests.support.reload_spa3_export RESULT EXPORT
...``.

Outputs on fixed inputs go into the safetensors file RESULT, under ``EXPORT's name/what``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import _torchvision  # noqa: F401  transformers imports torchvision

PROMPT = "What stands beside the door?"
ROWS, QUERIES = 2, 5


def pixels() -> Tensor:
    """Patches of one picture, which merge to 2x2 tokens."""
    return torch.randn((2 * ROWS) ** 2, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(3))


GRID = torch.tensor([[1, 2 * ROWS, 2 * ROWS]])


def prompt(config: Any) -> Tensor:
    """The picture, and the question in bytes."""
    image = [config.vision_start_token_id, *[config.image_token_id] * ROWS**2, config.vision_end_token_id]
    return torch.tensor([[*image, *PROMPT.encode()]])


@torch.no_grad()
def grounded(llm: Any, visual: Tensor) -> Tensor:
    """Logits of a part with its adapter, behind merged tokens (1, 4, C) and fixed latents."""
    draw = torch.Generator().manual_seed(4)
    latents = torch.randn(1, QUERIES, llm.latent_channels, generator=draw)
    places = ROWS**2
    ids = torch.tensor([[*[llm.image_token_id] * places, *PROMPT.encode()]])
    batch = {"input_ids": ids, "visual": visual, "grids": torch.tensor([[[ROWS, ROWS]]])}
    return llm.logits(llm.hidden(batch if llm.adapter is None else batch | {"latents": latents}))


@torch.no_grad()
def field(model: Any) -> Tensor:
    """What a Spa3R makes of fixed features."""
    draw = torch.Generator().manual_seed(5)
    return model.encode(torch.randn(1, 2, 6, model.channels, generator=draw), (2, 3))


@torch.no_grad()
def outputs(folder: Path) -> dict[str, Tensor]:
    """By transformers' own class, by PEFT, and by this project."""
    import models
    from models.checkpoints import load_reference
    from models.pretrained import describe_pretrained, load_pretrained

    torch.set_num_threads(1)
    found: dict[str, Tensor] = {}
    if (folder / "spa3r").is_dir():
        described = describe_pretrained(folder / "spa3r")
        spa3r = models.build(described["model"], **described["settings"]).eval()
        assert load_reference(spa3r, load_file(folder / "spa3r" / "model.safetensors")).complete
        found["field"] = field(spa3r)
    if not (folder / "language").is_dir():
        return found
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    language: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "language").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "language")
    assert tokenizer(PROMPT)["input_ids"] == list(PROMPT.encode())
    for parameter in language.parameters():  # aligned: at the odd addresses of a mapped file kernels round otherwise
        parameter.data = parameter.data.clone()
    visual = language.model.visual(pixels(), grid_thw=GRID).pooler_output[None]
    found["visual"] = visual
    if (folder / "language-adapter").is_dir():
        from peft import PeftModel

        language = PeftModel.from_pretrained(language, folder / "language-adapter").eval()
    ids = prompt(language.config)
    types = (ids == language.config.image_token_id).int()
    found["logits"] = language(
        input_ids=ids, pixel_values=pixels(), image_grid_thw=GRID, mm_token_type_ids=types
    ).logits
    try:
        llm = load_pretrained(folder / "llm")
    except ValueError as error:
        found["refused"] = torch.tensor(list(str(error).encode()), dtype=torch.uint8)
    else:
        found["grounded"] = grounded(llm, visual)
    return {name: tensor.contiguous() for name, tensor in found.items()}


if __name__ == "__main__":
    result, *exports = sys.argv[1:]
    everything: dict[str, Tensor] = {}
    for export in map(Path, exports):
        everything |= {f"{export.name}/{name}": tensor for name, tensor in outputs(export).items()}
    save_file(everything, result)
