"""Spa3R and Spa3-VLM at tiny, trained by their recipes: by one process, or by the ranks of a backend."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import configs
from actors.driver import run_folder
from actors.trainers.backends import make_backend
from actors.trainers.feed import Feed
from actors.trainers.roles import train_role
from configs import RunConfig
from services.data.sources import open_sources
from services.features.client import FeatureClient
from services.features.encode import pin_weights
from services.features.sink import open_store
from tests.support.scenes import write_scenes

COMMON = (
    "size=tiny", "logger.tensorboard=false", "logger.progress=off", "trainer.warmup_steps=1", "trainer.log_every=1",
    "trainer.validate_every=0", "trainer.checkpoint_every=0", "trainer.threads=1", "trainer.steps=3",
    "trainer.micro_batch=2", "trainer.accumulation=2", "cluster=inline", "backend=single",
)  # fmt: skip
FIELD = (
    "recipe=spa3r_pretrain", "data=scannet", "data.sources.scannet.interval=[]", "recipe.view_set.interval=[1,1]",
    "recipe.view_set.views=[3,3]", "recipe.view_set.plans_per_scene=2", "encoders.patches.height=28",
    "encoders.patches.width=42", "encoders.semantic.height=32", "encoders.semantic.width=48", "evaluate.samples=1",
)  # fmt: skip
VLM = (
    "recipe=spa3_vlm", "data=corpus", "encoders.spa3r.weights=random", "encoders.spa3r.arch={model: spa3r-tiny}",
    "encoders.visual.side=56", "encoders.visual.height=28", "encoders.visual.width=56", "encoders.patches.height=28",
    "encoders.patches.width=42", "generate.max_new_tokens=3", "recipe.spa3_vlm.questions_per_sample=2",
    "evaluate.samples=2",
)  # fmt: skip


def spa3_run(folder: Path, recipe: str, *overrides: str) -> RunConfig:
    """Three steps of two micro-batches of two samples; data and cache are shared by all runs of ``folder``."""
    data = folder / recipe
    if recipe == "spa3_vlm":
        if not data.exists():
            write_talks(data)
        own = [*VLM, f"data.sources.corpus.root={data / 'talks.jsonl'}"]
    else:
        if not data.exists():
            write_scenes(data)
        own = [*FIELD, f"data.sources.scannet.root={data}"]
    settings = (*COMMON, *own, f"storage.root={folder / 'storage'}", *overrides)
    by_key = {setting.split("=", 1)[0]: setting for setting in settings}
    return configs.load(list(by_key.values()))


def write_talks(folder: Path) -> None:
    """Eight questions about two pictures each, and two that have none: some stand beside one with pictures."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in ("a", "b", "c", "d"):
        Image.fromarray(draw.integers(0, 256, (30, 40, 3), np.uint8)).save(folder / f"{name}.png")

    def record(name: str, images: list[str], split: str) -> dict[str, Any]:
        said = "<image>" * len(images) + f"Question {name}: " + "x" * (len(name) % 3)
        turns = [{"from": "human", "value": said}, {"from": "gpt", "value": f"answer {name}"}]
        return {"id": name, "conversations": turns, "split": split, **({"images": images} if images else {})}

    pairs = (["a.png", "b.png"], ["c.png", "d.png"])
    records = [record(f"q{n}", pairs[n % 2], "train") for n in range(8)]
    records += [record(f"text{n}", [], "train") for n in range(2)] + [record("v0", pairs[0], "val")]
    scored = {"question_type": "object_counting", "question": "How many?", "answer": "4"}
    records += [record("s0", pairs[1], "test") | scored]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, records)))


@contextmanager
def opened(config: RunConfig) -> Iterator[Feed]:
    """The feed of a run whose weights are pinned."""
    store = open_store(config)
    with ExitStack() as running:
        client = running.enter_context(closing(FeatureClient(config, store)))
        yield running.enter_context(closing(Feed.open(config, open_sources(config), client, store)))


def train_each(cases: Sequence[RunConfig]) -> dict[str, float]:
    """Train the role of each configuration on this rank, as a worker does; returns steps by run name."""
    done = {}
    for config in cases:
        pinned = pin_weights(config)
        folder = run_folder(pinned)
        with opened(pinned) as feed:
            backend = make_backend(pinned.backend, "cpu")
            done[folder.name] = float(train_role(pinned, folder, feed, backend).steps)
    return done


def losses(folder: Path) -> dict[int, Mapping[str, float]]:
    """Losses and gradient norms by step, from metrics.jsonl."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = ("loss", "grad_norm")
    return {
        row["step"]: {name: value for name, value in row.items() if name.startswith(wanted)}
        for row in rows
        if row["split"] == "train"
    }
