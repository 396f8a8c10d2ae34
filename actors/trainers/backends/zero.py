"""ZeRO stages 2 and 3 by DeepSpeed: gradients and moments, with stage 3 the weights too, lie in parts on the ranks.

The only place that knows DeepSpeed. Its engine makes the optimiser and the hooks; the loop calls the module itself, and
this class brackets each backward pass. Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models".

Pitfalls that were measured, and what is done about them here:

* Forwards that run ahead of backwards let gradients be overwritten, because DeepSpeed counts a new micro-batch at a
  forward pass: it is counted before each backward instead (:meth:`ZeroBackend.backward`).
* Stage 3 adds onto the last step's gradient of a parameter that takes no part in a step's first micro-batch: the
  buffers are emptied at the start of each step (:meth:`ZeroBackend.zero_grad`).
* It averages over ranks and micro-batches: the loss is multiplied by the number of ranks, and nothing is divided by the
  number of micro-batches.
* Gradients that lie on the host are not emptied between steps either (:meth:`ZeroBackend.zero_grad`).
* It clips all parameters by one norm, to 1 unless told otherwise: it is told not to, and :meth:`ZeroBackend.update`
  clips, for a role may leave parameters unclipped.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.trainers.backends.base import Edge, combine
from actors.trainers.backends.ddp import DdpBackend
from actors.trainers.optim import build_optimizer, set_rate
from actors.trainers.tensors import (
    assign,
    bucket_elements,
    count,
    filled,
    give_back,
    on_meta,
    saved_tensors,
    trainable,
    whole,
)
from configs import ConfigError
from configs.schema import TrainerConfig
from models.spec import RoleSpec

_VERSIONS = ("0.19.",)
"""Releases of DeepSpeed whose inside this module was written against; it needs more than the public interface."""


class ZeroBackend(DdpBackend):
    """ZeRO over the default process group, which must be initialised."""

    sharded = True

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        stage: int = 2,
        persistence_threshold: int = 100_000,
        offload: str = "none",
    ) -> None:
        super().__init__(device)
        self.stage = stage
        self.offload = offload
        self.loss_scale = float(self.world_size)
        self._persistence_threshold = persistence_threshold
        self._backwards = 0

    def prepare(
        self, module: nn.Module, role: RoleSpec, config: TrainerConfig, weights: Mapping[str, Tensor] | None = None
    ) -> nn.Module:
        """Give every rank the weights of rank 0 and hand them to DeepSpeed, with an AdamW as other backends have it.

        ConfigError for what stage 3 cannot do.
        """
        if self.stage == 3 and config.ema:
            raise ConfigError(
                f"trainer.ema={config.ema}: no rank of backend.name=zero3 holds the weights that would be averaged; "
                "set trainer.ema=0, or choose backend=zero2 or backend=fsdp2"
            )
        deepspeed = _import(self.device)
        self._module = self._place(module, role, weights or {})
        self._parameters = trainable(self._module)
        engine, self._zero, *_ = deepspeed.initialize(
            model=self._module,
            optimizer=build_optimizer(self._module, config, role.no_decay, role.unclipped),
            config=self._settings(self._module),
        )
        self._engine: Any = engine
        self._optimizer = self._zero.optimizer
        return self._module

    def _place(self, module: nn.Module, role: RoleSpec, weights: Mapping[str, Tensor]) -> nn.Module:
        """As others do; with stage 3 what lies on meta is made, filled and cut one by one."""
        if self.stage != 3:
            return super()._place(module, role, weights)
        from deepspeed.runtime.zero import Init

        self._share(module)
        cut: Any = None
        for found in on_meta(module):
            made = filled(found, weights, self.device)
            if not isinstance(made, nn.Parameter):
                continue
            if cut is None:
                Init(module=nn.ParameterList([made]), config_dict_or_path=self._settings(module), dtype=made.dtype)
                cut = made
            else:
                cut.convert_to_zero_parameters(param_list=[made])
            give_back(found.tensor.nbytes)
        return module

    def _settings(self, module: nn.Module) -> dict[str, Any]:
        # Gradients are read between the last backward and the step, where an overlapped reduction may still run.
        zero: dict[str, Any] = {"stage": self.stage, "overlap_comm": False}
        # The buffer is there all the time; DeepSpeed would take 2 GB of float32 for it.
        zero["reduce_bucket_size"] = bucket_elements(count(trainable(module).values()))
        if self.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self.offload == "parameters":
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self.stage == 3:
            zero |= {
                "stage3_param_persistence_threshold": self._persistence_threshold,
                # A module used by one kind of micro-batch only would break the order that prefetching learnt.
                "stage3_prefetch_bucket_size": 0,
            }
        return {
            "train_micro_batch_size_per_gpu": 1,  # required, of no effect: the loss is ours
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # a step may have any number of backward passes
            "gradient_clipping": 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # AdamW as the others have it, whose moments may lie on the host
            "steps_per_print": 10**12,
            "wall_clock_breakdown": False,
        }

    def zero_grad(self) -> None:
        """Forget the gradients, also of parameters that will take no part in the first micro-batch."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        self._backwards = 0
        if self.offload != "none":
            # On the host too they stay where a parameter takes no part in a step, or not in its first micro-batch.
            host = [partition.grad for partition in self._partitions() if partition.grad is not None]
            for gradient in (*host, *getattr(zero, "accumulated_grads_in_cpu", {}).values()):
                gradient.zero_()
        if self.stage == 3:
            zero.grad_partitions_flat_buffer.zero_()
        else:
            zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
            zero.all_grad_tensors = dict.fromkeys(zero.all_grad_tensors)

    def backward(self, loss: Tensor | None, edges: Sequence[Edge] = ()) -> None:
        """Accumulate one micro-batch, whatever forward passes were made since the last."""
        scalar = combine(loss, edges)
        if scalar is None:
            return
        self._zero.clear_backward_seen_flag()
        self._engine._backward_prologue()
        self._engine.backward(scalar * self.loss_scale, scale_wrt_gas=False)
        self._backwards += 1

    def reduce(self, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Complete the gradients, which were summed by every backward; returns the sum of ``extra``, and the norm."""
        zero = self._zero
        if not self._backwards:
            zero.independent_gradient_partition_epilogue()  # makes gradients of zero
        zero.finalize_gradient_accumulation_boundary()
        sums = [
            torch.stack([part.double().square().sum() for part in parts]).sum() if parts else extra.new_zeros(())
            for parts in self._gradients()
        ]
        message = torch.cat([torch.stack(sums).to(self.device), extra.to(self.device)])
        if self.world_size > 1:
            dist.all_reduce(message, group=self.group)
        clipped, others = message[:2]
        # Where a gradient that does not count is not finite, the norm is not either.
        return message[2:].cpu(), (clipped.sqrt() + 0 * others).float()

    def update(self, rate: float, norm: Tensor, limit: float) -> None:
        """Clip and step."""
        set_rate(self._optimizer, rate)
        if limit > 0:
            torch._foreach_mul_(self._gradients()[0], torch.clamp(limit / (norm + 1e-6), max=1.0))
        self._zero.clip_grad = 0.0
        self._zero.step()

    def close(self) -> None:
        """As others do; DeepSpeed's engine, and its own view of the group, end too."""
        if "_engine" in self.__dict__:
            from deepspeed.comm import comm

            self._engine.destroy()
            del self._engine, self._zero
            comm.cdb = None
        super().close()

    def _gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parts of the gradients on this rank: of those that are clipped, and of the others."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        # Stage 3 may cut a group of the optimiser in several.
        groups: Mapping[int, int] = self._zero.sub_group_to_group_id if self.stage == 3 else {}
        whole: Mapping[int, list[Tensor | None]] = self._zero.averaged_gradients
        if self.offload != "none":
            whole = {index: [partition.grad] for index, partition in enumerate(self._partitions())}
        for index, parts in whole.items():
            clipped = self._optimizer.param_groups[groups.get(index, index)]["clipped"]
            found[0 if clipped else 1].extend(part for part in parts if part is not None)
        return found

    # -- what a checkpoint holds -----------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters and buffers, whole, on CPU of rank 0."""
        state: dict[str, Tensor] = {}
        for name, tensor in saved_tensors(self._module).items():
            with self._gathered(tensor):
                state |= whole({name: tensor}, keep=self.rank == 0)
        return state

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`weights` gave, into the optimiser's own copy too."""
        for name, target in saved_tensors(self._module).items():
            with self._gathered(target, write=True):
                assign(target, tensors[name])
        self._zero.refresh_fp32_params()

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimiser's moments as ``<parameter>/<field>``, whole, on CPU of rank 0."""
        from deepspeed.utils import safe_get_full_optimizer_state

        fields = self._fields()
        if fields:
            self._link_moments()
        state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for field, value in fields.items():
                moment = value if value.ndim == 0 else safe_get_full_optimizer_state(parameter, field)
                state |= whole({f"{name}/{field}": moment}, keep=self.rank == 0)
        return state

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`optimizer_state` gave."""
        self._optimizer.state.clear()
        if not tensors:
            return
        # All parameters have made as many steps, so one counter serves a whole partition.
        steps = {key.rsplit("/", 1)[1]: value for key, value in tensors.items() if value.ndim == 0}
        moments = {key.rsplit("/", 1)[1] for key, value in tensors.items() if value.ndim}
        for partition in self._partitions():
            self._optimizer.state[partition] = {field: value.clone() for field, value in steps.items()} | {
                field: torch.zeros_like(partition) for field in sorted(moments)
            }
        self._link_moments()
        for name, parameter in self._parameters.items():
            for field in sorted(moments):
                self._set_moment(parameter, field, tensors[f"{name}/{field}"].to(self.device))

    def _link_moments(self) -> None:
        """Tell stage 2's parameters where their moments lie.

        It does so itself after the step of its first group, when the other groups have none yet.
        """
        if self.stage == 2:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _set_moment(self, parameter: Any, field: str, value: Tensor) -> None:
        """Put this rank's part of a whole moment where the optimiser has it."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage == 2:
            safe_set_full_optimizer_state(parameter, value, field)
            return
        # DeepSpeed cuts a whole value only where the ranks divide it; the last parts are padded with zeros otherwise.
        size = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[self.rank * size : (self.rank + 1) * size], field)

    def _partitions(self) -> list[Tensor]:
        """The flat parameters that the optimiser works on: this rank's part of each group."""
        zero = self._zero
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def _fields(self) -> dict[str, Tensor]:
        """Fields of the optimiser's state, from any of its partitions; empty before the first step."""
        for partition in self._partitions():
            if self._optimizer.state.get(partition):
                return dict(self._optimizer.state[partition])
        return {}

    @contextmanager
    def _gathered(self, tensor: Tensor, *, write: bool = False) -> Iterator[None]:
        """Within the block, a parameter is whole on every rank; with ``write``, what is written stays.

        One by one, so that a rank never holds all of stage 3's weights.
        """
        if not hasattr(tensor, "ds_id"):  # stage 2, and buffers
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor], modifier_rank=0 if write else None):
            yield


def _import(device: torch.device) -> Any:
    """DeepSpeed, told first which kind of device this process has. ConfigError for a release that is not known."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # The device of this process: DeepSpeed refuses to start without it, and on CUDA selects the device of that index.
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    import deepspeed

    if not deepspeed.__version__.startswith(_VERSIONS):
        raise ConfigError(
            f"backend.name=zero2 and zero3 need DeepSpeed {_VERSIONS[0]}x, {deepspeed.__version__} is installed; "
            "install that release, or choose backend=fsdp2"
        )
    # An all-reduce in shared memory that only inference calls; it would be compiled here, by all ranks at once.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
