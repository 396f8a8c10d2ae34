"""Low-rank updates of a pretrained module, through PEFT: put in, merged, and saved in PEFT's own layout.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". The only place that knows PEFT. Adapters are put
into the role's module in place, so that what the role's step calls stays the same object: an adapted layer
``q_proj`` holds its frozen ``base_layer`` and the trained ``lora_A.default`` and ``lora_B.default``.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from configs import ConfigError
from configs.schema import PeftConfig
from models.errors import WeightsError
from models.spec import RoleSpec

_ADAPTER = "default"
_PREFIX = "base_model.model."
"""What PEFT's wrapper puts before a network's names."""
_WEIGHTS = "adapter_model.safetensors"
LORA = "lora"
"""Key of a part's config.json: the low-rank updates that are merged into it, and the folder where they lie alone."""


def apply_lora(
    module: nn.Module,
    role: RoleSpec,
    peft: PeftConfig,
    *,
    keep: Sequence[str] = (),
    seed: int = 0,
    weights: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Put low-rank updates into ``module``, in place, and freeze what they adapt; returns it.

    The updates begin at zero: the outputs stay what they were.

    Args:
        module: of one role.
        role: names the modules that get an update where ``peft.targets`` does not.
        peft: rank, alpha, dropout, targets. A target is the last part, or last parts, of a module's name.
        keep: globs of parameters that are trained whole beside the updates, as ``recipe.train`` names them. () are the
            role's ``heads``; where it names none, the children of ``module`` that hold no update.
        seed: of the updates' first factor.
        weights: values of what ``module`` holds on the meta device, of which DoRA needs the rows' lengths. The updates
            are real then.

    ConfigError for a target or a glob that matches nothing, or a layer that cannot have an update.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = peft.targets or list(role.lora_targets)
    _check_targets(module, role, targets)
    kept = _kept(module, keep or role.heads, targets)
    config = LoraConfig(**_settings(peft, targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with unset_fake_temporarily():
                inject_adapter_in_model(config, module, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
        except ValueError as error:
            raise ConfigError(f"peft.targets={list(targets)}: {error}") from error
        _materialise(module, weights or {})
    # PEFT has frozen everything but the updates. A kept parameter is the same object, perhaps under a longer name.
    for parameter in kept:
        parameter.requires_grad_(True)
    return module


def cast_base(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Keep the frozen weights of an adapted module's networks in ``dtype``, in place; returns the module.

    Those of the children that hold updates: what else is frozen may not stand being mixed with float32. What lies on
    meta will be read in that dtype.
    """
    adapted = {name.split(".")[0] for name in adapted_layers(module)}
    seen: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for path, owner in module.named_modules():
        if path.split(".")[0] not in adapted:
            continue
        for name, parameter in list(owner._parameters.items()):
            if parameter is None or parameter.requires_grad or not parameter.is_floating_point():
                continue
            if id(parameter) not in seen:
                seen[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            owner._parameters[name] = seen[id(parameter)]
    return module


def _settings(peft: PeftConfig, targets: Sequence[str]) -> dict[str, Any]:
    """PEFT's own names of what ``peft`` says."""
    return {
        "r": peft.rank,
        "lora_alpha": _alpha(peft.alpha),
        "lora_dropout": peft.dropout,
        "use_dora": peft.dora,
        "use_rslora": peft.rslora,
        "target_modules": list(targets),
    }


def _materialise(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the updates memory, where their layers have theirs, and PEFT's first values.

    A layer that has none yet gets them on CPU. PEFT moves updates after it has made them, which fake tensors (of a
    plan) refuse; so it makes them on meta, outside of the mode that makes tensors fake, and they are made anew here,
    within it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, child in list(module.named_modules()):
        if not isinstance(child, BaseTunerLayer):
            continue
        layer: Any = child  # the base class does not declare all
        like = layer.get_base_layer().weight
        device = torch.device("cpu") if like.is_meta else like.device
        for name, update in list(layer.named_parameters()):
            if _is_update(name):
                parent, _, last = name.rpartition(".")
                made = nn.Parameter(torch.empty(update.shape, dtype=like.dtype, device=device))
                holder = layer.get_submodule(parent)
                if isinstance(holder, nn.ParameterDict):
                    holder[last] = made
                else:
                    setattr(holder, last, made)
        layer.reset_lora_parameters(_ADAPTER, True)
        if layer.use_dora[_ADAPTER]:
            _measure_rows(layer, path, weights)


def _measure_rows(layer: Any, path: str, weights: Mapping[str, Tensor]) -> None:
    """DoRA's lengths begin as those of the weight's rows, so that its outputs stay (Liu et al. 2024, equation 5)."""
    base, magnitude = layer.get_base_layer(), layer.lora_magnitude_vector[_ADAPTER]
    if not base.weight.is_meta:
        a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        magnitude.update_layer(base_layer=base, lora_A=a, lora_B=b, scaling=layer.scaling[_ADAPTER])
    elif isinstance(base, nn.Linear) and f"{path}.weight" in weights:
        with torch.no_grad():
            magnitude.weight.copy_(torch.linalg.vector_norm(weights[f"{path}.weight"].float(), dim=1))
    else:
        raise ConfigError(
            f"peft.dora=true: the rows of {path}.weight cannot be measured before it is loaded; DoRA of a network that "
            "is loaded in parts adapts linear layers alone; set peft.targets to such, or peft.dora=false"
        )


def merge_lora(module: nn.Module) -> nn.Module:
    """Add the updates to the weights that they adapt and take the adapters out, in place; returns the module.

    Its names are those from before :func:`apply_lora`. A module without adapters stays as it is.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, child) for name, child in module.named_modules() if isinstance(child, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge(safe_merge=True)
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config
    return module


@torch.no_grad()
def merged_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that :func:`merge_lora` would leave; the module stays as it is, and so do its tensors."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    state = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in module.state_dict().items()
        if not _is_update(name)
    }
    for name, child in module.named_modules():
        if isinstance(child, BaseTunerLayer):
            layer: Any = child  # the base class does not declare it
            alone = copy.deepcopy(layer)
            alone.merge(safe_merge=True)
            state[f"{name}.weight"] = alone.get_base_layer().weight.detach()
    return state


def updates(module: nn.Module) -> dict[str, Tensor]:
    """The updates of an adapted module by its own names."""
    return {name: tensor for name, tensor in module.state_dict().items() if _is_update(name)}


def adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that updates adapt, by the names that they had before."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: child.get_base_layer() for name, child in module.named_modules() if isinstance(child, BaseTunerLayer)}


def stored_config(folder: Path) -> PeftConfig:
    """With what settings the updates of a folder were made. WeightsError when it holds no low-rank updates."""
    from peft import LoraConfig

    try:
        found: Any = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{folder}/adapter_config.json cannot be read: {error}") from error
    return PeftConfig(
        method="lora",
        rank=found.r,
        alpha=float(found.lora_alpha),
        dropout=found.lora_dropout,
        dora=found.use_dora,
        rslora=found.use_rslora,
        targets=sorted(found.target_modules),
    )


def stored_updates(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The updates of a folder under the names of the adapted module, whose network is at ``prefix``.

    WeightsError when they cannot be read.
    """
    file, begin = folder / _WEIGHTS, f"{prefix}." if prefix else ""
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error
    return {begin + _own_name(name.removeprefix(_PREFIX)): tensor for name, tensor in stored.items()}


def _own_name(stored: str) -> str:
    """The inverse of :func:`_stored_name`."""
    layer, _, update = stored.partition(".lora_")
    kind, _, field = update.partition(".")
    return f"{layer}.lora_{kind}.{_ADAPTER}" + (f".{field}" if field else ".weight" if "magnitude" in kind else "")


def has_lora(module: nn.Module) -> bool:
    """Whether the module holds adapters."""
    return any(_is_update(name) for name, _ in module.named_parameters())


def adapter_state(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The updates among ``tensors`` (a state dict, or what ``Backend.weights`` gave) under PEFT's names.

    ``prefix`` is the path of the adapted network in the role's module ("language"): the names are then those that
    ``peft.PeftModel.from_pretrained(network, folder)`` looks for.
    """
    begin = f"{prefix}." if prefix else ""
    return {
        _PREFIX + _stored_name(name.removeprefix(begin)): tensor
        for name, tensor in tensors.items()
        if name.startswith(begin) and _is_update(name)
    }


def _stored_name(name: str) -> str:
    """PEFT's name of an update in a file: without the adapter's, and DoRA's lengths without the name of their field."""
    stored = f"{name}.".replace(f".{_ADAPTER}.", ".").removesuffix(".")
    return stored.removesuffix(".weight") if ".lora_magnitude_vector." in stored else stored


def save_adapter(
    folder: Path, tensors: Mapping[str, Tensor], role: RoleSpec, peft: PeftConfig, *, prefix: str = "", base: str = ""
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT reads them.

    Args:
        folder: is made.
        tensors: hold the updates, see :func:`adapter_state`.
        role: that has been trained.
        peft: with which the updates were made.
        prefix: see :func:`adapter_state`.
        base: what the updates belong to (a hub name or a folder), for whoever loads them.

    ConfigError when there are no updates among the tensors.
    """
    from peft import LoraConfig

    state = adapter_state(tensors, prefix)
    if not state:
        raise ConfigError(
            f"role {role.name!r} has no low-rank updates below {prefix or 'its module'!r}: it was trained with "
            f"peft.method={peft.method}; adapters exist with peft=lora only"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / _WEIGHTS)
    config = LoraConfig(
        **_settings(peft, peft.targets or role.lora_targets), base_model_name_or_path=base or None, inference_mode=True
    )
    config.save_pretrained(str(folder))


def load_adapter(network: nn.Module, folder: Path) -> nn.Module:
    """``network`` with the updates of a folder that :func:`save_adapter` wrote, in PEFT's wrapper and eval mode.

    The network is adapted in place. WeightsError when the updates do not fit it.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what is to be renamed
            return PeftModel.from_pretrained(network, str(folder)).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"{folder}: these low-rank updates do not fit {type(network).__name__}: {error}") from error


def adapted_weights(folder: Path) -> set[str]:
    """Names, in the network, of the weights that the updates of a folder belong to. WeightsError when unreadable."""
    file = folder / _WEIGHTS
    try:
        with safe_open(file, framework="pt") as stored:
            names = list(stored.keys())
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file} cannot be read: {error}") from error
    return {name.removeprefix(_PREFIX).split(".lora_")[0] + ".weight" for name in names}


def _alpha(alpha: float) -> Any:
    """PEFT declares alpha as an integer and computes with what it gets; whole numbers are written as such."""
    return int(alpha) if alpha == int(alpha) else alpha


def _is_update(name: str) -> bool:
    return f".{_ADAPTER}." in f"{name}." and ".lora_" in f".{name}"


def _fits(name: str, target: str) -> bool:
    """PEFT's rule: the whole name of a module, or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def _check_targets(module: nn.Module, role: RoleSpec, targets: Sequence[str]) -> None:
    names = [name for name, _ in module.named_modules() if name]
    if not targets:
        raise ConfigError(
            f"peft.method=lora: role {role.name!r} names no modules for it; set peft.targets (or "
            f"roles.{role.name}.targets), or train it whole with peft=none"
        )
    for target in targets:
        if any(_fits(name, target) for name in names):
            continue
        ends = sorted({name.rsplit(".", 1)[-1] for name, child in module.named_modules() if _can_have_update(child)})
        near = difflib.get_close_matches(target, {*ends, *names}, n=5, cutoff=0.5)
        raise ConfigError(
            f"peft.targets has {target!r}, which matches no module of role {role.name!r}; "
            + (f"near it: {', '.join(near)}; " if near else "")
            + f"layers that can have an update end in {', '.join(ends[:20])}"
        )


def _can_have_update(child: nn.Module) -> bool:
    return isinstance(child, nn.Linear | nn.Conv2d | nn.Embedding)


def _kept(module: nn.Module, keep: Sequence[str], targets: Sequence[str]) -> list[nn.Parameter]:
    """Parameters that stay trained whole."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    unused = [glob for glob in keep if not fnmatch.filter(parameters, glob)]
    if unused:
        heads = sorted({name.split(".")[0] for name in parameters})
        raise ConfigError(f"recipe.train has {unused}, which matches no trainable parameter; names begin with {heads}")
    if keep:
        return [p for name, p in parameters.items() if any(fnmatch.fnmatchcase(name, glob) for glob in keep)]
    adapted = {
        name.split(".")[0] for name, _ in module.named_modules() if any(_fits(name, target) for target in targets)
    }
    return [p for name, p in parameters.items() if name.split(".")[0] not in adapted]
