"""What single roles may have of their own, and what connects them."""

from __future__ import annotations

import pytest

import configs
from configs.roles import SHARED_TRAINER, role_config
from configs.schema import TrainerConfig

JOINT = "recipe=uniugg_joint"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["roles.lm.trainer.lr=1e-3"], ["roles.lm", "no such role", "Did you mean llm?", "llm, diffusion"]),
        (["roles.llm.trainer.steps=400"], ["roles.llm.trainer.steps=400", "set trainer.steps", "weight_decay"]),
        (["roles.llm.trainer.lrr=1"], ["unknown key roles.llm.trainer.lrr", "Did you mean roles.llm.trainer.lr?"]),
        (["roles.llm.trainer.lr=fast"], ["roles.llm.trainer.lr must be a number, got 'fast'"]),
        (["roles.llm.trainer.lr=0"], ["roles.llm.trainer.lr=0 is out of range", "more than 0"]),
        (["roles.llm.trainer.precision=fp8"], ["roles.llm.trainer.precision='fp8'", "float32, bfloat16"]),
        (["roles.llm.trainer.betas=[0.9]"], ["roles.llm.trainer.betas=[0.9] must be two numbers"]),
        (["roles.llm.trainer.lr_scale={head.*: -1}"], ["roles.llm.trainer.lr_scale.head.*=-1", "at least 0"]),
        (["roles.llm.trainer.warmup_steps=1000"], ["roles.llm.trainer.warmup_steps=1000", "trainer.steps=80"]),
        (["roles.llm.targets=[q_proj]"], ["roles.llm.targets", "set roles.llm.peft=lora"]),
        (["roles.llm.backend=single", "cluster.roles.llm.workers=[2]"], ["roles.llm.backend=single", "one worker"]),
        (["roles.llm.backend=zero3", "roles.llm.trainer.ema=0.9"], ["zero3", "trainer.ema=0.9"]),
        (["roles.llm.backend=zero3", "trainer.ema=0.9"], ["zero3", "trainer.ema=0.9"]),
        (["backend=fsdp2", "backend.offload=optimizer"], ["backend.offload=optimizer", "only zero2 and zero3 can"]),
        (
            ["backend=zero2", "backend.offload=parameters"],
            ["backend.name=zero2: only zero3 can", "choose backend=zero3"],
        ),
        (["peft.dora=true"], ["peft.dora=true has no effect", "choose peft=lora"]),
        (["bridge.transport=local"], ["bridge.transport=local contradicts cluster.mode=local", "llm and diffusion"]),
        (["bridge.transport=group", "cluster=inline"], ["bridge.transport=group contradicts cluster.mode=inline"]),
        (["cluster.roles.trainer.workers=[1]"], ["cluster.roles.trainer", "no such role"]),
        (
            ["trainer.micro_batch=4", "cluster.roles.llm.workers=[3,4]"],
            ["trainer.micro_batch=4", "3 workers (cluster.roles.llm.workers=[3, 4])", "1, 2, 4"],
        ),
    ],
)
def test_what_a_role_cannot_have_is_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(configs.ConfigError) as refused:
        configs.load([JOINT, *overrides])
    for word in words:
        assert word in str(refused.value)


def test_one_fault_is_one_message() -> None:
    with pytest.raises(configs.ConfigError) as refused:
        configs.load([JOINT, "roles.llm.trainer.steps=3"])
    assert "problems" not in str(refused.value)


def test_a_role_has_its_own_settings_and_shares_the_others() -> None:
    config = configs.load(
        [JOINT, "roles.llm.trainer={lr: 1, weight_decay: 0.1}", "roles.llm.backend=fsdp2", "roles.llm.peft=lora",
         "roles.llm.targets=[q_proj]"]
    )  # fmt: skip
    llm, diffusion = role_config(config, "llm"), role_config(config, "diffusion")
    assert (llm.trainer.lr, llm.trainer.weight_decay, llm.trainer.steps) == (1, 0.1, config.trainer.steps)
    assert (llm.backend.name, llm.peft.method, llm.peft.targets) == ("fsdp2", "lora", ["q_proj"])
    assert (diffusion.trainer, diffusion.backend, diffusion.peft) == (config.trainer, config.backend, config.peft)


def test_transports_do_not_concern_a_run_of_one_role() -> None:
    assert configs.load(["bridge.transport=local"]).bridge.transport == "local"
    assert configs.load([JOINT, "cluster=inline", "bridge.transport=local"]).bridge.transport == "local"


def test_what_roles_share_are_settings_of_the_trainer() -> None:
    assert {*SHARED_TRAINER} < {*TrainerConfig.__dataclass_fields__}


def test_ranges_of_workers() -> None:
    """Ray Train may choose every number for one role; of several the driver chooses sizes that divide."""
    even = configs.load(["trainer.micro_batch=12", "cluster.roles.trainer.workers=[1,4]"])
    assert even.cluster.roles["trainer"].workers == [1, 4]
    joint = configs.load([JOINT, "trainer.micro_batch=4", "cluster.roles.llm.workers=[1,3]", "backend=ddp"])
    assert joint.cluster.roles["llm"].workers == [1, 3]
    with pytest.raises(
        configs.ConfigError, match=r"workers=\[1, 40\]: .* evenly; set cluster.roles.trainer.workers to"
    ):
        configs.load(["cluster.roles.trainer.workers=[1,40]"])  # no micro_batch anywhere near has all those divisors
