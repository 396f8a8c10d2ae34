"""What the feature cache saves of a training step: the same steps with frozen networks online, and from the cache.

The speed-up is compared with the ideal: the time of encoding and of training, each measured alone.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from infra.bench.harness import Context, Measured


class Stage:
    """Some steps of a recipe, its frozen features made on the way or read from the cache; all roles train inline."""

    def __init__(self, settings: Sequence[str], steps: int) -> None:
        import configs
        from services.data.sources import open_sources

        self.config = configs.load(settings)
        self.manifests = open_sources(self.config)
        self.steps = steps

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
        """Seconds of the steps, from the loader to the optimiser."""
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

    # -- the roles ------------------------------------------------------------------------------------------

    def _run(self, feeds: dict[str, Any], work: Callable[[Any, Any], float]) -> float:
        """Seconds of the slowest role, which waited for the others."""
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


def compare(context: Context, stage: Stage) -> Measured:
    """Time of an epoch online / from the cache; baseline: (encode + train) / train, each measured alone."""
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
        extra=lambda: {
            "steps": stage.steps,
            "frozen_share": round(parts["encode_s"] / (parts["encode_s"] + parts["train_s"]), 3),
            **{name: round(seconds, 3) for name, seconds in parts.items()},
        },
    )
