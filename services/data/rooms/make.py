"""Makes a folder of rooms: resumable, safe to kill, and refused where the folder holds other rooms."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil

from configs.schema import RoomsConfig
from services.contracts import Split
from services.data.rooms.classes import label_table
from services.data.rooms.plan import GENERATOR_VERSION, RoomPlan, plan_rooms
from services.data.rooms.textures import textures_digest
from services.data.rooms.write import DONE, write_room
from services.errors import DataError

IDENTITY_FILE = "rooms.json"
WORTH_A_POOL = 8
"""Rooms to make from which on two processes are quicker, their start included."""

Progress = Callable[[int, int, str], None]
"""Called with rooms done, rooms in all, and the id of the room just done."""


def _identity(config: RoomsConfig) -> dict[str, Any]:
    """What decides every byte of a folder: generator version, config, content of the user's textures."""
    settings = dataclasses.asdict(config)
    settings.pop("textures")  # its content counts, not where it lies
    return {"generator_version": GENERATOR_VERSION, "textures_sha256": textures_digest(config.textures), **settings}


def rooms_digest(config: RoomsConfig) -> str:
    """16 hexadecimal digits that name the rooms of a config: for the name of their folder.

    Raises:
        DataError: ``config.textures`` is set, and is no folder or holds no image.
    """
    text = json.dumps(_identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_rooms(
    config: RoomsConfig, folder: Path, progress: Progress | None = None, *, workers: int | None = None
) -> Path:
    """Makes the rooms of ``config`` below ``folder`` in ScanNet's layout, and gives ``folder``.

    A room is made beside ``scans/`` and moved there when complete, with a marker ``done`` inside; what exists is
    kept, so an interrupted run goes on where it stopped. The files in ``splits/`` are written last.

    Args:
        config: number, size and seed of the rooms.
        folder: made when missing; must be empty or hold rooms of the same config and generator version.
        progress: called after each room, also for those that were there already.
        workers: processes; None uses two for eight or more rooms, and none of its own for fewer.

    Raises:
        DataError: the folder holds other data, the config is impossible, or a texture cannot be read.
    """
    _check(config)
    folder = Path(folder)
    plans = plan_rooms(config.seed, config.scenes)
    _claim(config, folder, plans)
    _replace(folder / "scannetv2-labels.combined.tsv", label_table())
    _sweep(folder)
    missing = [p for p in plans if not (folder / "scans" / p.id / DONE).is_file()]
    done = config.scenes - len(missing)
    if progress is not None and done:
        progress(done, config.scenes, next(p.id for p in reversed(plans) if p not in missing))
    count = workers if workers is not None else min(2, os.cpu_count() or 1) if len(missing) >= WORTH_A_POOL else 1
    for made in _made(config, folder, missing, count):
        done += 1
        if progress is not None:
            progress(done, config.scenes, made)
    for split in Split:
        names = [p.id for p in plans if p.split == split]
        _replace(folder / "splits" / f"{split}.txt", "".join(f"{name}\n" for name in names))
    return folder


def _check(config: RoomsConfig) -> None:
    for key, least in (("scenes", 1), ("views", 1), ("width", 16), ("height", 16), ("seed", 0)):
        value = getattr(config, key)
        if value < least:
            raise DataError(f"data.rooms.{key} is {value}; it must be at least {least}")


def _claim(config: RoomsConfig, folder: Path, plans: list[RoomPlan]) -> None:
    """Writes what the folder holds before anything else, or checks it against what it says."""
    identity, path = _identity(config), folder / IDENTITY_FILE
    if path.is_file():
        try:
            found = json.loads(path.read_text())["identity"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error!r}); remove the folder {folder} to make it anew") from error
        differing = sorted(k for k in identity.keys() | found.keys() if identity.get(k) != found.get(k))
        if differing:
            listed = ", ".join(f"{k}: {found.get(k)!r} there, {identity.get(k)!r} wanted" for k in differing)
            raise DataError(f"{folder} holds other rooms ({listed}); choose another folder or remove this one")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise DataError(f"{folder} is not empty and has no {IDENTITY_FILE}; choose an empty folder for the rooms")
    except OSError as error:
        raise DataError(f"the folder for the rooms, {folder}, cannot be used: {error}") from error
    rooms = [{"id": p.id, "type": p.type, "split": str(p.split)} for p in plans]
    content = {"identity": identity, "config": dataclasses.asdict(config), "rooms": rooms}
    _replace(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _replace(path: Path, text: str) -> None:
    """Writes a small file so that it is there whole or not at all; one that says the same is left as it is.

    Manifests guard these files by their times: a new time would have them read again at every start.
    """
    if path.is_file() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _sweep(folder: Path) -> None:
    """Removes what runs that no longer live left half made."""
    for path in (folder / ".making").glob("*.*"):
        owner = path.name.rsplit(".", 1)[1]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _make_one(config: RoomsConfig, folder: Path, plan: RoomPlan) -> str:
    """Makes one room aside and moves it to its place."""
    aside = folder / ".making" / f"{plan.id}.{os.getpid()}"
    place = folder / "scans" / plan.id
    shutil.rmtree(aside, ignore_errors=True)
    try:
        write_room(config, plan.index, aside)
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not (place / DONE).is_file():
            shutil.rmtree(place)
        if not place.exists():
            aside.rename(place)
    except OSError as error:
        if not (place / DONE).is_file():  # otherwise another run was first, with the same bytes
            raise DataError(f"{plan.id} cannot be written below {folder}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return plan.id


def _made(config: RoomsConfig, folder: Path, missing: list[RoomPlan], workers: int) -> Iterator[str]:
    """Makes the missing rooms, here or in processes of their own, and gives their ids as they are done."""
    if workers <= 1 or len(missing) <= 1:
        for plan in missing:
            yield _make_one(config, folder, plan)
        return
    context = multiprocessing.get_context("spawn")
    waiting = {plan.id: plan for plan in missing}
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        futures = [pool.submit(_make_one, config, folder, plan) for plan in missing]
        try:
            for future in as_completed(futures):
                made = future.result()
                del waiting[made]
                yield made
        except BrokenProcessPool:
            # A worker was killed, or could not start (a script without a main guard): the rest is made here.
            pass
        finally:
            for future in futures:
                future.cancel()
    for plan in waiting.values():
        yield _make_one(config, folder, plan)
