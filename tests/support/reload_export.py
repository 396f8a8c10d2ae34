"""What somebody else's process gets from exported folders: ``python reload_export.py RESULT EXPORT ...``.

Outputs on fixed inputs go into the safetensors file RESULT, under ``EXPORT's name/what``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from models import _torchvision  # noqa: F401  transformers imports torchvision

PROMPT = "What stands beside the door?"


@torch.no_grad()
def outputs(folder: Path) -> dict[str, Tensor]:
    """Logits at a prompt, the UNet's noise, the VAE's tokens: by the libraries that the folders are for."""
    from diffusers import UNet2DConditionModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from models.pretrained import load_pretrained

    torch.set_num_threads(1)
    language = AutoModelForCausalLM.from_pretrained(folder / "language").eval()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    for parameter in (*language.parameters(), *unet.parameters()):
        parameter.data = (
            parameter.data.clone()
        )  # aligned: at the odd addresses of a mapped file kernels round otherwise
    if (folder / "language-adapter").is_dir():
        from peft import PeftModel

        language = PeftModel.from_pretrained(language, folder / "language-adapter").eval()
        unet = PeftModel.from_pretrained(unet, folder / "unet-adapter").eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder / "language")(PROMPT)["input_ids"]])
    found = {"logits": language(input_ids=ids).logits, "noise": unet(**noise_inputs()).sample}
    for name in ("vae", "llm", "diffusion"):
        try:
            part = load_pretrained(folder / name)
        except ValueError as error:
            found[f"{name} refused"] = torch.tensor(list(str(error).encode()), dtype=torch.uint8)
            continue
        if name == "vae":
            found["tokens"] = part.decode(latent())  # type: ignore[operator]
        else:
            found[f"{name} state"] = torch.cat([t.float().flatten() for t in part.state_dict().values()])
    return {name: tensor.contiguous() for name, tensor in found.items()}


def noise_inputs() -> dict[str, Tensor]:
    """Inputs of the tiny UNet."""
    draw = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(1, 4, 8, 8, generator=draw),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 64, generator=draw),
    }


def latent() -> Tensor:
    """A latent of the tiny VAE."""
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))


if __name__ == "__main__":
    result, *exports = sys.argv[1:]
    everything: dict[str, Tensor] = {}
    for export in map(Path, exports):
        everything |= {f"{export.name}/{name}": tensor for name, tensor in outputs(export).items()}
    save_file(everything, result)
