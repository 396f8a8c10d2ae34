"""README.md of an export: the model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import configs
from actors.export.origin import UNKNOWN
from actors.report.units import with_unit
from configs import RunConfig
from configs.roles import role_config

_TITLES: Mapping[str, str] = {
    "probe": "Heads on frozen features",
    "uniugg_encoder": "UniUGG: encoder and spatial decoder",
    "uniugg_vae": "UniUGG: Spatial-VAE and spatial decoder",
    "uniugg_align": "UniUGG: language model with an aligned projector",
    "uniugg_joint": "UniUGG: language model and diffusion, trained together",
    "uniugg_finetune": "UniUGG: language model and diffusion, finetuned on spatial questions",
    "uniugg_direct": "UniUGG: language model that regresses the tokens of unseen views",
    "spa3r_pretrain": "Spa3R: a scene's spatial field from a few views",
    "spa3_vlm": "Spa3-VLM: Qwen2.5-VL grounded in spatial latents",
}


def model_card(config: RunConfig, described: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """The card, Markdown with a YAML head.

    Args:
        config: of the run.
        described: content of export.json.
        evaluation: content of evaluation.json; {} where the run was not judged.
    """
    recipe = config.recipe.name
    lines = [
        "---",
        "library_name: loom3d",
        f"tags: [3d, {recipe.replace('_', '-')}]",
        f"license: {_licence(described)}",
        "---",
        "",
        f"# {_TITLES.get(recipe, recipe)}",
        "",
        f"Run `{described['run']}` of recipe `{recipe}`, size `{config.size}`, model `{config.model.name}`, written "
        "by `loom3d export`.",
        "",
        *_contents(described),
        *_training(config, described),
        *_weights(described),
        *_metrics(evaluation),
        *_proofs(described),
        "## Versions",
        "",
        *(f"- {name} {number}" for name, number in described["versions"].items()),
        "",
        "## Configuration",
        "",
        "```yaml",
        configs.to_yaml(config).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _licence(described: Mapping[str, Any]) -> str:
    """The licence that all trained weights below share, else ``other`` or ``unknown``."""
    named = {w["licence"] for w in described["weights"] if w["place"] != "random"} or {UNKNOWN}
    return named.pop() if len(named) == 1 else "other"


def _contents(described: Mapping[str, Any]) -> Iterator[str]:
    contents = described["contents"]
    yield from ("## What is here", "", "| folder | what |", "| --- | --- |")
    yield from (f"| `{folder}/` | {what} |" for folder, what in contents.items())
    yield from ("", "In this folder:", "", "```python", *_loading(described), "```", "")


def _loading(described: Mapping[str, Any]) -> Iterator[str]:
    """Python that loads every folder."""
    contents = described["contents"]
    parts = [folder for folder, what in contents.items() if what.startswith("part ")]
    whole = [
        part for part in parts if f"{part}-adapter" not in contents and not _lacks_updates(contents[part], contents)
    ]
    if whole:  # first: beside a CPU build of torch it makes torchvision importable, which transformers wants
        yield "from models.pretrained import load_pretrained  # of Loom3D"
    if "language" in contents:
        kind = (
            "AutoModelForImageTextToText" if contents["language"].startswith("Qwen2_5_VL") else "AutoModelForCausalLM"
        )
        yield f"from transformers import {kind}, AutoTokenizer"
        yield f'language = {kind}.from_pretrained("./language")'
        yield 'tokenizer = AutoTokenizer.from_pretrained("./language")'
    if "unet" in contents:
        yield "from diffusers import UNet2DConditionModel"
        yield 'unet = UNet2DConditionModel.from_pretrained("./unet")'
    adapters = [folder for folder in ("language", "unet") if f"{folder}-adapter" in contents]
    if adapters:
        yield "from peft import PeftModel"
    for folder in adapters:
        yield f'{folder} = PeftModel.from_pretrained({folder}, "./{folder}-adapter")'
    for folder in whole:
        yield f'{folder} = load_pretrained("{folder}")'


def _lacks_updates(what: str, contents: Mapping[str, str]) -> bool:
    """Whether a part's network has updates that lie beside it."""
    return any(f"network in {folder}/" in what and f"{folder}-adapter" in contents for folder in contents)


def _training(config: RunConfig, described: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Training", "")
    for name, by in described["trained"].items():
        yield f"- `{name}` was trained by run `{by.get('run', described['run'])}`" + (
            f", taken at step {by['step']} of {config.trainer.steps}" if "step" in by else ""
        )
    for role in config.cluster.roles:
        peft = role_config(config, role).peft
        if peft.method == "lora":
            yield f"- role `{role}`: low-rank updates of rank {peft.rank}, alpha {peft.alpha:g}"
        elif config.recipe.train.get(role):
            yield f"- role `{role}`: only {', '.join(f'`{glob}`' for glob in config.recipe.train[role])} were trained"
    yield from ("", "Data:", "", "| source | format | place |", "| --- | --- | --- |")
    for name, source in config.data.sources.items():
        yield f"| {name} | {source.format} | {source.root or '-'} |"
    yield ""


def _weights(described: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Weights that it stands on", "")
    if not described["weights"]:
        yield from ("None: everything began at random.", "")
        return
    yield from ("| in the configuration | weights | sha256 | licence |", "| --- | --- | --- | --- |")
    for weights in described["weights"]:
        digest = f"`{weights['digest'][:16]}`" if weights["digest"] else "-"
        yield f"| `{weights['name']}` | {weights['place']} | {digest} | {weights['licence']} |"
    yield ""


def _metrics(evaluation: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Evaluation", "")
    if not evaluation:
        yield from ("It was not evaluated.", "")
        return
    yield f"On {evaluation.get('samples', 0)} samples of the {evaluation['split']} split, step {evaluation['step']}."
    yield from ("", "| metric | value | better | baseline |", "| --- | --- | --- | --- |")
    for name, row in evaluation["metrics"].items():
        rivals = [] if row["baseline"] is None else [f"{row['baseline']:.4g} ({row['baseline_name']})"]
        rivals += [f"{value:.4g} ({rival})" for rival, value in row.get("also", {}).items()]
        yield f"| {with_unit(name)} | {row['value']:.4g} | {row['better']} | {', '.join(rivals) or '-'} |"
    yield ""


def _proofs(described: Mapping[str, Any]) -> Iterator[str]:
    if not described["proofs"]:
        return
    done = "were merged" if described["merged"] else "lie beside their base, and were merged for this check"
    yield from (
        "## Low-rank updates",
        "",
        f"The updates {done}. One forward pass on a random input, largest differences",
    )
    yield "by the root mean square of the outputs:"
    yield from ("", "| weights | merged from adapted | merged from base |", "| --- | --- | --- |")
    for name, proof in described["proofs"].items():
        yield f"| `{name}/` | {proof['merged_from_adapted']:.1e} | {proof['merged_from_base']:.1e} |"
    yield ""
