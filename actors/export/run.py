"""The story of an export: which parts a run has, each written in the layout of who loads it, and loaded again."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import configs
from actors.evaluate import check_unchanged
from actors.export.card import model_card
from actors.export.forward import core, outputs, random_inputs
from actors.export.networks import FILES, NOT_VISUAL, QWEN, complete, is_qwen, load_network
from actors.export.origin import Weights, base_weights, versions
from actors.export.proof import Adapted, Proof, prove
from actors.outputs import check_folder
from actors.parts import ANSWERING, FRAMES, open_run
from actors.recipes import open_recipe
from actors.trainers.lora import LORA, load_adapter
from configs import ConfigError, RunConfig
from models.checkpoints import load_reference
from models.encoders.hf import quiet_transformers
from models.encoders.weights import read_tensors, stored_digest
from models.errors import WeightsError
from models.pretrained import (
    ADAPTERS,
    CONFIG,
    LAYOUTS,
    NETWORKS,
    describe_pretrained,
    load_pretrained,
    network_of,
    save_pretrained,
)
from models.registry import build
from models.spa3r.model import Spa3R
from models.spa3r.vlm.qwen import take_tower
from services.errors import ResumeError

_OURS: Mapping[str, str] = {
    "uniugg_vit": "encoder", "uniugg_vae": "vae", "uniugg_reconstruction": "vae", "spa3r": "spa3r",
}  # fmt: skip
"""Family of an encoder that is a part of ours -> name of that part."""
_ONE_FILE = "1000GB"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote."""

    folder: Path
    contents: Mapping[str, str]
    """Folder -> what it holds and who loads it."""
    proofs: Mapping[str, Proof] = field(default_factory=dict)
    """Of low-rank updates, by the folder of the weights that they belong to."""
    weights: Sequence[Weights] = ()
    """What the run stands on."""


def run(args: argparse.Namespace) -> Exported:
    """What ``loom3d export`` does."""
    folder, config = open_run(args.run, args.overrides, args.config)
    _, saved = open_run(str(folder))
    check_unchanged(saved, config)  # keys describe which run; its card says what it was trained with
    licences: dict[str, str] = {}
    for text in args.licence:
        name, _, licence = text.partition("=")
        if not name or not licence:
            raise ConfigError(f"--licence {text}: write NAME=TEXT, as in model.init.language=apache-2.0")
        licences[name] = licence
    out = check_folder(Path(args.out).expanduser().absolute())
    if not torch.cuda.is_available():
        # Saving a network imports DeepSpeed where it is installed, which would tell the terminal that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return export_run(folder, saved, out, merge=args.merge, licences=licences)


def export_run(
    folder: Path, config: RunConfig, out: Path, *, merge: bool = False, licences: Mapping[str, str] | None = None
) -> Exported:
    """Write the trained parts of a run, and the parts of ours that it stands on, into ``out``.

    Whatever is written is loaded again and compared before ``out`` appears; without that it does not.

    Args:
        folder: of the run.
        config: of the run.
        out: a folder that is not there yet, or is empty.
        merge: low-rank updates become part of the weights; otherwise they lie beside the base that they belong to.
        licences: of the weights that the run stands on, by the names of :func:`base_weights`.

    Raises:
        ConfigError: ``out`` is taken, a licence is of nothing, or there is nothing to merge.
        ResumeError: the run has not trained, or was not evaluated yet.
        WeightsError: weights are gone, were replaced, or the merged ones do not agree with base and updates.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already and not empty; choose another folder, or empty it")
    own = trained_parts(config, folder)
    if merge and not any(LORA in describe_pretrained(place) for place in own.values()):
        raise ConfigError(f"--merge: run {folder.name} has no low-rank updates (peft=none); leave --merge out")
    weights = base_weights(config, licences or {})
    draft = out.with_name(f".writing-{out.name}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        writer = _Writer(config, folder, draft, merge=merge)
        with quiet_transformers():
            for name, place in {**frozen_parts(config), **own}.items():
                writer.write(name, place)
        exported = Exported(folder=out, contents=writer.contents, proofs=writer.proofs, weights=weights)
        _describe(exported, config, folder, own, draft, merge=merge)
        if out.exists():
            out.rmdir()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return exported


def trained_parts(config: RunConfig, folder: Path) -> dict[str, Path]:
    """Name -> folder of the parts that a run has written below ``weights/``. ResumeError when there are none."""
    found = {path.parent.name: path.parent for path in sorted((folder / "weights").glob(f"*/{CONFIG}"))}
    if not found:
        trained = any((folder / "checkpoints").glob("**/manifest.json"))
        state = "its parts are saved when it is evaluated, and it was not yet" if trained else "it holds no checkpoint"
        raise ResumeError(
            f"{folder} has nothing to export: {state}. Carry it to its end with `loom3d train "
            f"recipe={config.recipe.name} size={config.size} name={folder.name}` and the settings that it began with"
        )
    return found


def frozen_parts(config: RunConfig) -> dict[str, Path]:
    """Name -> folder of the parts of ours that the run reads features from, with the spatial decoder beside them.

    WeightsError when one was trained again since.
    """
    found: dict[str, Path] = {}
    for name, encoder in config.encoders.items():
        place = Path(encoder.weights)
        if encoder.family not in _OURS or not _is_part(place):
            continue
        digest = stored_digest(place)
        if encoder.digest not in ("", digest):
            raise WeightsError(
                f"encoders.{name}.weights={place} has sha256 {digest[:16]}..., the run was trained with "
                f"{encoder.digest[:16]}...: that part was trained again since; train this run again too"
            )
        found[_OURS[encoder.family]] = place
    beside = found.get("vae", found.get("encoder"))
    if beside is not None and (beside.with_name("spatial_decoder") / CONFIG).is_file():
        found["spatial_decoder"] = beside.with_name("spatial_decoder")
    return found


def _is_part(place: Path) -> bool:
    """Whether a folder is one of ours; a published one may have a config of its own."""
    return (place / CONFIG).is_file() and "model" in describe_pretrained(place, any_format=True)


class _Writer:
    """Writes parts into a folder, each checked by what is read back from there."""

    def __init__(self, config: RunConfig, folder: Path, out: Path, *, merge: bool) -> None:
        self._config, self._folder, self._out, self._merge = config, folder, out, merge
        self.contents: dict[str, str] = {}
        self.proofs: dict[str, Proof] = {}

    def write(self, name: str, place: Path) -> None:
        """One part: its network in the library's layout, the rest as a part of ours."""
        described, module = describe_pretrained(place), load_pretrained(place)
        child, adapted = network_of(module), None
        holder = child or name
        if LORA in described:
            adapted = prove(open_recipe(self._config), self._folder, place, module)
            self.proofs[holder] = adapted.proof
            if self._merge:
                adapted = None
            else:
                module = adapted.base
        extra = {key: described[key] for key in described.keys() - {"format", "model", "settings", LORA}}
        tensors = module.state_dict()
        if child:
            self._write_network(child, module.get_submodule(child))
            extra[NETWORKS] = {child: f"../{child}/{FILES[child]}"}
            if is_qwen(module.get_submodule(child)):
                extra[LAYOUTS] = {child: QWEN}
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{child}.")}
        if adapted is not None:
            extra[ADAPTERS] = {holder: f"../{self._write_adapter(holder, adapted)}"}
        save_pretrained(
            module, self._out / name, described["model"], described["settings"], tensors=tensors, extra=extra
        )
        self.contents[name] = f"part {described['model']}" + (f", with its network in {child}/" if child else "")
        if adapted is None:
            again = load_pretrained(self._out / name)
            _check_same(core(module), core(again), name)
            _check_state(module, again, name)
        if isinstance(module, Spa3R):
            _check_published(module, described, self._out / name)
            self.contents[name] += ", by its published names"

    def _write_network(self, child: str, network: Any) -> None:
        """A network of transformers or diffusers, with the tokenizer of a language model.

        One that was trained without its vision tower has it again in the folder.
        """
        place = self._out / child
        if is_qwen(network):
            complete(network, self._config)
        network.save_pretrained(place, max_shard_size=_ONE_FILE)
        library = "transformers" if child == "language" else "diffusers"
        self.contents[child] = f"{type(network).__name__} of {library}"
        if self._config.recipe.name in (*ANSWERING, *FRAMES) and child == "language":
            from models.text.tokenizer import load_tokenizer

            load_tokenizer(self._config.data.text.tokenizer).save_pretrained(place)
        again: Any = load_network(place, child)
        _check_same(network, again, child)
        if is_qwen(network):
            _check_same(network.model.visual, again.model.visual, f"{child} (vision tower)")
            take_tower(network)

    def _write_adapter(self, holder: str, adapted: Adapted) -> str:
        """The updates, in PEFT's layout; returns the name of their folder."""
        name = f"{holder}-adapter"
        shutil.copytree(adapted.adapter, self._out / name)
        file = self._out / name / "adapter_config.json"
        settings = {**json.loads(file.read_text()), "base_model_name_or_path": holder}
        if is_qwen(adapted.base.get_submodule(network_of(adapted.base))):
            settings["exclude_modules"] = NOT_VISUAL
        file.write_text(json.dumps(settings, indent=1))
        self.contents[name] = f"low-rank updates of {holder}/, for PEFT"
        if holder in FILES:
            base = load_network(self._out / holder, holder)
            found = outputs(load_adapter(base, self._out / name), random_inputs(adapted.base.get_submodule(holder)))
            _check_equal(adapted.outputs, found, name)
        return name


def _check_same(ours: nn.Module, again: nn.Module, name: str) -> None:
    """WeightsError unless both give the same outputs to the bit."""
    inputs = random_inputs(ours)
    _check_equal(outputs(ours.eval(), inputs), outputs(again, inputs), name)


def _check_equal(ours: Tensor, again: Tensor, name: str) -> None:
    if not torch.equal(ours, again):
        worst = float((ours - again).abs().max()) if ours.shape == again.shape else float("nan")
        raise WeightsError(
            f"{name}: what was written gives other outputs when it is loaded again (largest difference {worst:.2e}); "
            "nothing was exported. The disk, or a version of transformers, diffusers or PEFT, is at fault"
        )


def _check_state(ours: nn.Module, again: nn.Module, name: str) -> None:
    """WeightsError unless both hold the same tensors."""
    there = again.state_dict()
    differing = [key for key, tensor in ours.state_dict().items() if not torch.equal(tensor, there[key])]
    if differing:
        raise WeightsError(f"{name}: {differing[:5]} differ when they are loaded again; nothing was exported")


def _check_published(ours: Spa3R, described: Mapping[str, Any], place: Path) -> None:
    """WeightsError unless a model that is built anew takes the folder as a published checkpoint."""
    again = build(described["model"], **described["settings"]).eval()
    load_reference(again, read_tensors(place))
    _check_same(ours, again, f"{place.name} (by its published names)")


def _describe(
    exported: Exported, config: RunConfig, folder: Path, own: Mapping[str, Path], draft: Path, *, merge: bool
) -> None:
    """README.md, config.yaml, evaluation.json and export.json."""
    evaluation: dict[str, Any] = {}
    if (folder / "evaluation.json").is_file():
        evaluation = json.loads((folder / "evaluation.json").read_text())
        shutil.copy(folder / "evaluation.json", draft)
    trained = {name: describe_pretrained(place).get("trained_by", {}) for name, place in own.items()}
    (draft / "config.yaml").write_text(configs.to_yaml(config))
    described = {
        "format": 1,
        "run": folder.name,
        "recipe": config.recipe.name,
        "trained": trained,
        "merged": merge,
        "contents": dict(exported.contents),
        "proofs": {name: proof.as_dict() for name, proof in exported.proofs.items()},
        "weights": [asdict(weights) for weights in exported.weights],
        "versions": versions(),
    }
    (draft / "export.json").write_text(json.dumps(described, indent=1))
    (draft / "README.md").write_text(model_card(config, described, evaluation))
