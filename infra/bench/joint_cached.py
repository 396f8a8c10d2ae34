"""``p3_cached``: UniUGG's joint stage with ViT and VAE encoding online, beside the same from the cache.

Both roles train inline, as ``cluster=inline`` trains them. The speed-up of the cache is compared with the ideal: the
time of encoding and of training, each measured alone.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from infra.bench.harness import Bench, Context, Measured, Target

_PARTS = {
    "encoder": ("uniugg-vit-tiny", {"width": 384, "depth": 12, "heads": 6}),
    "vae": ("spatial-vae-tiny", {"channels": 384, "width": 128, "depth": 4}),
}
"""A ViT-S, so that encoding online is most of an epoch, as it is at every size but tiny."""


class JointStage:
    """An epoch of ``recipe=uniugg_joint`` on procedural rooms, with a ViT and a VAE of random weights."""

    def __init__(self, root: Path, *, quick: bool) -> None:
        import configs
        from services.data.sources import open_sources

        self.config = configs.load(_settings(root, quick=quick))
        _save_parts(root, quick=quick)
        self.manifests = open_sources(self.config)
        self.steps = 2 if quick else 6

    @contextmanager
    def feeds(self, *, cached: bool) -> Iterator[dict[str, Any]]:
        """Role -> feed; a client that keeps what it encodes, or one that never does."""
        from actors.recipes import open_recipe
        from actors.trainers.feed import Feed
        from services.features.client import FeatureClient
        from services.features.store import FeatureStore

        with ExitStack() as opened:
            store = opened.enter_context(closing(FeatureStore.from_config(self.config)))
            client = opened.enter_context(closing(FeatureClient(self.config, store if cached else None)))
            first, *others = open_recipe(self.config).roles
            feed = opened.enter_context(closing(Feed.open(self.config, self.manifests, client, store, role=first)))
            # Pictures, depth and questions come from the store on both sides: only the features differ.
            yield {first: feed, **{role: opened.enter_context(closing(feed.for_role(role))) for role in others}}

    def epoch(self, feeds: dict[str, Any]) -> float:
        """Seconds of some steps of both roles, from the loader to the optimiser."""
        return self._run(feeds, self._train)

    def train_alone(self, feeds: dict[str, Any]) -> float:
        """Seconds of as many steps with batches that are there already."""
        return self._run(feeds, self._train_again)

    def encode_alone(self, feeds: dict[str, Any]) -> float:
        """Seconds of making the features of these steps, nothing else going on."""
        from services.streams.requests import sample_requests

        took = 0.0
        for feed in feeds.values():
            plan = feed.plan("train")
            for number in range(self.steps):
                samples = [s for micro in plan.step(number).micro_batches for s in micro.samples]
                requests = [
                    request
                    for s in samples
                    if s.kind in feed.inputs
                    for request in sample_requests(s, self.manifests[s.source], self.config, feed.inputs)
                ]
                began = time.perf_counter()
                feed.client.get(requests, number)
                took += time.perf_counter() - began
        return took

    # -- both roles ------------------------------------------------------------------------------------------

    def _run(self, feeds: dict[str, Any], work: Callable[[Any, Any], float]) -> float:
        """Seconds of the slower role, which waited for the other."""
        from actors.bridge.link import Link
        from actors.bridge.local import run_roles
        from actors.recipes import open_recipe
        from actors.trainers.backends.single import SingleBackend
        from actors.trainers.loop import TrainLoop
        from configs.roles import role_config

        recipe = open_recipe(self.config)

        def task(role: str, transport: Any) -> float:
            feed = feeds[role]
            built = recipe.build(role, feed, feed.plan("train"))
            link = Link(
                transport,
                role=role,
                rank=0,
                roles=dict.fromkeys(recipe.roles, 1),
                edges=recipe.edges,
                window=self.config.bridge.window,
            )
            with link:
                loop = TrainLoop(
                    module=built.module.train(),
                    role=built.spec,
                    config=role_config(self.config, role).trainer,
                    backend=SingleBackend(),
                    loss_weights=recipe.loss_weights(role),
                    seed=0,
                    link=link,
                )
                return work(feed, loop)

        return max(run_roles({role: functools.partial(task, role) for role in recipe.roles}).values())

    def _train(self, feed: Any, loop: Any) -> float:
        loop.link.exchange("ready", 0, None)  # building is in no figure
        began = time.perf_counter()
        with feed.load(feed.plan("train"), stop=self.steps) as loader:
            for loaded in loader:
                loop.train_step(loaded)
        return time.perf_counter() - began

    def _train_again(self, feed: Any, loop: Any) -> float:
        from dataclasses import replace

        with feed.load(feed.plan("train"), stop=1) as loader:
            loaded = next(loader)
            loop.train_step(loaded)
            began = time.perf_counter()
            for number in range(1, self.steps + 1):
                loop.train_step(replace(loaded, step=number))
            return time.perf_counter() - began


def _settings(root: Path, *, quick: bool) -> list[str]:
    """The stage at tiny, behind the parts of :data:`_PARTS`."""
    rooms = {"scenes": 10, "views": 6, "width": 64, "height": 48} if quick else {"scenes": 16, "views": 8}
    return [
        "recipe=uniugg_joint",
        "size=tiny",
        "cluster=inline",
        "logger=quiet",
        f"storage.root={root}",
        "model.init.llm=random",
        "service.replicas=0",
        f"encoders.vit.weights={root / 'parts' / 'encoder'}",
        f"encoders.vae.weights={root / 'parts' / 'vae'}",
        f"encoders.reconstruction.weights={root / 'parts' / 'vae'}",
        *(f"data.rooms.{key}={value}" for key, value in rooms.items()),
        *(("trainer.micro_batch=2", "trainer.accumulation=1") if quick else ()),
    ]


def _save_parts(root: Path, *, quick: bool) -> None:
    """Write a ViT and a VAE of random weights where the configuration looks for them."""
    import torch

    import models
    from models.pretrained import save_pretrained

    torch.manual_seed(0)
    for part, (name, sizes) in _PARTS.items():
        module: Any = models.build(name, **({} if quick else sizes))
        save_pretrained(module, root / "parts" / part, name, module.settings)


def prepare_cached(context: Context) -> Measured:
    """Time of an epoch online / from the cache; baseline: (encode + train) / train, each measured alone."""
    stage = JointStage(context.folder, quick=context.quick)
    cached = context.cleanup.enter_context(stage.feeds(cached=True))
    online = context.cleanup.enter_context(stage.feeds(cached=False))
    for feeds in (cached, online):
        stage.epoch(feeds)
    parts: dict[str, float] = {}

    def achieved() -> float:
        parts["online_s"], parts["cached_s"] = stage.epoch(online), stage.epoch(cached)
        return parts["online_s"] / parts["cached_s"]

    def ideal() -> float:
        parts["train_s"], parts["encode_s"] = stage.train_alone(cached), stage.encode_alone(online)
        return (parts["encode_s"] + parts["train_s"]) / parts["train_s"]

    return Measured(
        value=achieved,
        baseline=ideal,
        extra=lambda: {"steps": stage.steps, **{name: round(seconds, 3) for name, seconds in parts.items()}},
    )


TABLE = [
    Bench(name="p3_cached", unit="ratio", target=Target(on="ratio", op=">=", limit=0.8), prepare=prepare_cached),
]
