"""Every command in the README exists, and each that this project brings runs at size=tiny for two steps."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from actors.cli import main
from models import _torchvision  # noqa: F401  transformers imports torchvision
from services.contracts import ImageRef
from services.data.images import load_image
from tests.support.films import write_video

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
#: The smallest run there is. Appended to a command, so that it wins over what the README chooses for people.
SMALLEST = (
    "size=tiny",
    "cluster=inline",
    "data.rooms.scenes=6",
    "data.rooms.views=4",
    "data.rooms.width=64",
    "data.rooms.height=48",
    "trainer.steps=2",
    "trainer.warmup_steps=0",
    "trainer.micro_batch=2",
    "trainer.validate_every=0",
    "logger.progress=off",
)
TINY = (*SMALLEST, "encoders.features.height=56", "encoders.features.width=56")
PAIRS = (*SMALLEST, "data.pairs.min_overlap=0.01", "data.pairs.max_overlap=1.0", "evaluate.samples=2")
UNIUGG = (*PAIRS, "encoders.vit.height=48", "encoders.vit.width=48")
SPA3 = (*SMALLEST, "evaluate.samples=2", "encoders.patches.height=42", "encoders.patches.width=56")
#: Recipe -> settings of its smallest run.
OF_RECIPE = {
    "spa3r_pretrain": (
        *SPA3, "recipe.view_set.views=[4,4]", "encoders.semantic.height=48", "encoders.semantic.width=64",
    ),
    "spa3_vlm": (
        *SPA3, "encoders.visual.side=56", "encoders.visual.height=28", "encoders.visual.width=56",
        "generate.max_new_tokens=3",
    ),
    "uniugg_encoder": (*PAIRS, "encoders.teacher.height=48", "encoders.teacher.width=48"),
    **dict.fromkeys(("uniugg_vae", "uniugg_align", "uniugg_joint", "uniugg_finetune"), UNIUGG),
}  # fmt: skip


def runnable(command: str) -> bool:
    return command.startswith("loom3d ")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with rooms, which also stand in for the ScanNet folder of the examples."""
    root = tmp_path_factory.mktemp("home")
    assert main(["data", "make", *TINY, f"storage.root={root}"]) == 0
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DINOv2 with random weights, in transformers' layout."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    return folder


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_every_loom3d_command_runs(home: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the README's order, in one process: later commands read what earlier ones wrote."""
    (rooms,) = (path for path in (home / "data").iterdir() if path.is_dir())
    stand_ins = {
        "~/loom3d": str(home),
        "/data/scannet": str(rooms),
        "/weights/dinov2-small": str(weights),
        "kitchen.jpg": str(next(rooms.glob("scans/*/color/*"))),
        "walk.mp4": str(home / "walk.mp4"),
    }
    write_video(home / "walk.mp4", [load_image(ImageRef(path=str(path))) for path in rooms.glob("scans/*/color/*")])
    commands = [command for command in COMMANDS if runnable(command)]
    assert len(commands) >= 15
    for command in commands:
        for theirs, ours in stand_ins.items():
            command = command.replace(theirs, ours)
        arguments = smallest(shlex.split(command)[1:], home)
        # What a network of two steps imagines may show nothing, which `generate` says with status 1.
        allowed = (0, 1) if arguments[0] == "generate" else (0,)
        assert main(arguments) in allowed, f"{command}\n{capsys.readouterr().err}"
    assert (home / "runs" / "probe-tiny" / "report" / "index.html").exists()
    assert (home / "runs" / "my-dinov2" / "evaluation.json").exists()
    assert (home / "runs" / "uniugg_finetune-tiny" / "evaluation.json").exists()
    for name in ("uniugg", "spa3-vlm", "spa3r"):
        assert (home / "exports" / name / "README.md").is_file()


def smallest(arguments: list[str], home: Path) -> list[str]:
    """The command with the settings of the smallest run, where it takes settings."""
    if arguments[0] in ("report", "models") or arguments[:2] == ["config", "keys"]:
        return arguments
    if "--run" in arguments:  # the run's own settings hold
        return [*arguments, f"storage.root={home}"]
    recipe = next((a.removeprefix("recipe=") for a in arguments if a.startswith("recipe=")), "probe")
    settings = OF_RECIPE.get(recipe, TINY)
    chosen = {setting.partition("=")[0] for setting in settings}
    return [a for a in arguments if a.partition("=")[0] not in chosen] + [*settings, f"storage.root={home}"]


def test_every_make_target_of_the_documents_exists() -> None:
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"make ([a-z][a-z-]*)(?= NAME|`|\n| makes| runs)", text))
    assert {"demo", "test", "bench", "learn", "setup", "check", "test-slow"} <= targets
    for target in sorted(targets):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"make {target}: {done.stderr}"


def test_other_commands_name_programs_that_are_installed() -> None:
    others = {shlex.split(command)[0] for command in COMMANDS if not runnable(command)}
    assert others == {"make", "ray"}
    for program in others:
        assert shutil.which(program) or (Path(sys.executable).parent / program).exists(), program


def test_every_file_that_the_readme_links_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
