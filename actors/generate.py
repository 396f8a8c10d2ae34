"""``loom3d generate``: the view from another camera, imagined from one picture, as points, depth and pictures.

What is written into a folder: for each view ``NNN/`` the picture that the colour head draws, the points drawn into the
camera, depth in colours and in millimetres; the points of reference and imagined view as PLY and GLB; for a trajectory
a GIF and an MP4; ``metadata.json``; and ``index.html``, in which the points turn, with the pictures beside.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import configs
from actors import scene_files
from actors.outputs import check_folder
from actors.parts import IMAGINING, check_recipe, open_pipeline, open_run
from actors.poses import PoseOptions, check_rigid, poses_of
from actors.recipes.pictures import colour_depth, hstack
from actors.references import Picture, pose_between, read_picture
from actors.viewer import Camera, Group, Shown, write_viewer
from configs import ConfigError, RunConfig
from models.geometry.poses import rotation_angle
from models.uniugg.pipeline import Imagined, Pipeline
from models.uniugg.scenes import PointCloud, Rendered, select_points

PAGE, METADATA, PLY, GLB, GIF, MP4 = (
    "index.html", "metadata.json", "points.ply", "points.glb", "trajectory.gif", "trajectory.mp4",
)  # fmt: skip
_FEW = 0.25
"""Where a smaller share of the points is confident enough, the threshold is mentioned."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One imagined view, drawn."""

    cloud: PointCloud
    """Imagined points of sufficient confidence."""
    union: PointCloud
    """With the reference's."""
    rendered: Rendered
    overlap: float
    """Share of the picture that the reference's points cover, of whatever confidence: what was seen before."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command made."""

    folder: Path
    metadata: Mapping[str, Any]
    remarks: Sequence[str] = field(default_factory=list)
    """What the user should know, such as a camera that sees nothing."""

    @property
    def sees_nothing(self) -> bool:
        """Whether no view shows anything."""
        return all(view["coverage"] == 0 for view in self.metadata["views"])


# -- the command ---------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> Outcome:
    """What ``loom3d generate`` does with its arguments."""
    folder, config = open_run(args.run, args.overrides, args.config)
    check_recipe(config, folder, IMAGINING, "imagine views")
    reference = read_picture(args.image, config, args.view)
    target = None
    options = pose_options(args)
    if args.target_view is not None:
        if options.given:
            raise ConfigError(f"--target-view and {options.given[0]} are given: they both say where the camera stands")
        target = read_picture(args.image.partition(":")[0], config, args.target_view)
    else:
        poses_of(options, config.generate, lambda: 1.0)  # what is wrong with them is said before weights are loaded
    out = check_folder(Path(args.out).expanduser().absolute() if args.out else folder / "generated" / reference.stem)
    pipeline = open_pipeline(config, folder=folder, given=given_parts(args.part), device=device_of(args.device))
    poses = choose_poses(pipeline, config, reference, options, target)
    return generate(pipeline, config, reference, poses, out, run=folder.name, target=target)


def pose_options(args: argparse.Namespace) -> PoseOptions:
    """The arguments of a command that say where cameras stand."""
    return PoseOptions(
        file=args.pose, yaw=args.yaw, pitch=args.pitch, roll=args.roll, move=args.move, trajectory=args.trajectory
    )


def given_parts(texts: Sequence[str]) -> dict[str, str]:
    """``NAME=FOLDER`` of ``--part``, as a mapping."""
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise ConfigError(f"--part {text}: write NAME=FOLDER, or NAME=run:RUN/PART")
    return {text.partition("=")[0]: text.partition("=")[2] for text in texts}


def device_of(wanted: str) -> str:
    """``wanted``, or the first CUDA device where there is one. ConfigError when this machine does not have it."""
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    here += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if wanted and wanted not in here:
        raise ConfigError(f"--device {wanted}: this machine has {', '.join(here)}")
    return wanted or ("cuda" if "cuda" in here else "cpu")


def choose_poses(
    pipeline: Pipeline, config: RunConfig, reference: Picture, options: PoseOptions, target: Picture | None = None
) -> Tensor:
    """Poses (N, 4, 4) float64, imagined camera -> reference camera."""
    if target is not None:
        return check_rigid(pose_between(reference, target)[None], f"{reference.name} and {target.name}")
    return poses_of(options, config.generate, lambda: distance_ahead(pipeline, reference))


def distance_ahead(pipeline: Pipeline, reference: Picture) -> float:
    """Median depth, metres, of the reference read out as a pair with itself; 1 where nothing lies ahead."""
    cut, K = pipeline.cut(reference.image, reference.K)
    tokens = pipeline.see(cut[None])
    eye = torch.eye(4, device=tokens.device)[None]
    depth = pipeline.decode(tokens.float(), tokens.float(), K.float()[None], eye).depth
    ahead = depth[torch.isfinite(depth) & (depth > 0)]
    return float(ahead.median()) if len(ahead) else 1.0


# -- imagining -----------------------------------------------------------------------------------------------


def imagine(
    pipeline: Pipeline, config: RunConfig, reference: Picture, poses: Tensor, target: Picture | None
) -> Imagined:
    """The views from ``poses`` with the settings of the run; a target's own camera where one is given."""
    settings = config.generate
    camera = None if target is None else pipeline.cut(target.image, target.K)[1]
    return pipeline.imagine(
        reference.image,
        reference.K,
        poses.float(),
        steps=settings.steps,
        guidance=settings.guidance,
        eta=settings.eta,
        seed=config.seed,
        target_K=camera,
        batch_size=settings.batch_size,
    )


def generate(
    pipeline: Pipeline,
    config: RunConfig,
    reference: Picture,
    poses: Tensor,
    out: Path,
    *,
    run: str = "",
    target: Picture | None = None,
) -> Outcome:
    """Imagine the views and write everything below ``out``.

    Args:
        pipeline: of the run.
        config: of the run; ``generate`` and ``seed`` are used.
        reference: what the model is shown.
        poses: (N, 4, 4) imagined camera -> reference camera.
        out: folder, made if need be; files of the same names are replaced.
        run: its name.
        target: the true picture from the pose, where there is one, to stand beside.
    """
    made = imagine(pipeline, config, reference, poses, target)
    cut, K = pipeline.cut(reference.image, reference.K)
    truth = None if target is None else pipeline.cut(target.image, target.K)[0]
    views = [_draw(pipeline, config, made, index, cut) for index in range(len(made))]
    out.mkdir(parents=True, exist_ok=True)
    scale = scene_files.depth_range(list(made.depth))
    shown = [_save_view(out, made, index, view, scale, truth) for index, view in enumerate(views)]
    described = [_describe(made, index, view) for index, view in enumerate(views)]
    if len(views) > 1:
        _save_animation(out, shown, config.generate.frame_rate)
    remarks = _remarks(described, made, config)
    metadata = {
        "run": run,
        "recipe": config.recipe.name,
        "image": reference.name,
        "K": K.tolist(),
        "known_camera": reference.known_camera,
        "size": list(pipeline.size),
        "seed": config.seed,
        "settings": configs.to_dict(config)["generate"],
        "axes": "metres; x right, y down, z ahead of the reference camera; in the GLB y up and z backward",
        "views": described,
        "remarks": remarks,
    }
    _write_page(out, pipeline, config, reference, (cut, K), made, views, shown, described, run)
    temporary = out / f"{METADATA}.tmp"
    temporary.write_text(json.dumps(metadata, indent=1))
    temporary.replace(out / METADATA)
    return Outcome(folder=out, metadata=metadata, remarks=remarks)


def _draw(pipeline: Pipeline, config: RunConfig, made: Imagined, index: int, reference: np.ndarray) -> View:
    settings = config.generate
    target = pipeline.point_cloud(made, index, confidence=settings.confidence, points="target")
    union = pipeline.point_cloud(made, index, confidence=settings.confidence, points="union", reference=reference)
    drawn = target if settings.points == "target" else union
    seen_before = select_points(
        made.reference_points[index], made.reference_colours[index], made.reference_confidence[index], 0.0
    )
    radius, fill = settings.radius, settings.fill
    return View(
        cloud=target,
        union=union,
        rendered=pipeline.render(made, index, drawn, radius=radius, fill=fill),
        overlap=pipeline.render(made, index, seen_before, radius=radius, fill=fill).coverage,
    )


# -- writing -------------------------------------------------------------------------------------------------


def _save_view(
    out: Path, made: Imagined, index: int, view: View, scale: tuple[float, float], truth: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Write the files of one view; returns its pictures by title."""
    from PIL import Image

    folder = out / f"{index:03d}"
    folder.mkdir(exist_ok=True)
    pictures = {
        "Imagined: colour head": scene_files.as_bytes(made.target_colours[index]),
        f"Imagined: points drawn, {share(view.rendered.coverage)} covered": scene_files.as_bytes(view.rendered.image),
        f"Depth, {scale[0]:.1f} to {scale[1]:.1f} m, near is bright": colour_depth(
            made.depth[index].float().cpu().numpy(), *scale
        ),
    }
    names = ["picture.png", "rendered.png", "depth_colour.png"]
    if truth is not None:
        pictures["The true picture from there"] = truth
        names.append("truth.png")
    for name, picture in zip(names, pictures.values(), strict=True):
        Image.fromarray(picture).save(folder / name)
    scene_files.save_depth(made.depth[index], folder / "depth_mm.png")
    for name, save in ((PLY, _save_ply), (GLB, _save_glb)):
        (folder / name).unlink(missing_ok=True)  # of an earlier call, which had points
        if len(view.union.points):
            save(view, folder / name)
    return pictures


def _save_ply(view: View, path: Path) -> None:
    scene_files.save_ply(view.union, path)


def _save_glb(view: View, path: Path) -> None:
    number = len(view.cloud.points)
    reference = PointCloud(view.union.points[number:], view.union.colours[number:])
    scene_files.save_glb({"reference": reference, "imagined": view.cloud}, path)


def _save_animation(out: Path, shown: Sequence[Mapping[str, np.ndarray]], rate: float) -> None:
    frames = [hstack(list(pictures.values())[:2]) for pictures in shown]
    scene_files.save_gif(frames, out / GIF, rate)
    scene_files.save_mp4(frames, out / MP4, rate)


def _describe(made: Imagined, index: int, view: View) -> dict[str, Any]:
    """What metadata.json says of a view."""
    depth = made.depth[index]
    ahead = depth[torch.isfinite(depth) & (depth > 0)]
    pose = made.pose[index].double()
    return {
        "pose": pose.tolist(),
        "K": made.K[index].tolist(),
        "angle_degrees": float(torch.rad2deg(rotation_angle(pose[:3, :3]))),
        "distance_metres": float(pose[:3, 3].norm()),
        "coverage": view.rendered.coverage,
        "overlap": view.overlap,
        "points": {"imagined": len(view.cloud.points), "reference": len(view.union.points) - len(view.cloud.points)},
        "depth_metres": [float(ahead.min()), float(ahead.median()), float(ahead.max())] if len(ahead) else None,
        "confidence": {
            "median": float(made.target_confidence[index].median()),
            "largest": float(made.target_confidence[index].max()),
        },
        "files": f"{index:03d}",
    }


def _remarks(described: Sequence[Mapping[str, Any]], made: Imagined, config: RunConfig) -> list[str]:
    """What should be said aloud: cameras that see nothing, and cameras that see nothing known."""
    empty = [str(index) for index, view in enumerate(described) if view["coverage"] == 0]
    found = []
    if empty:
        largest = float(made.target_confidence.max())
        why = (
            f"no point reaches generate.confidence={config.generate.confidence:g}, the largest is {largest:.3g}; "
            "lower it"
            if largest < config.generate.confidence
            else "all points lie behind the camera or beside its picture: choose a pose that looks at the scene"
        )
        found.append(f"{_named(empty)} nothing (coverage 0): {why}")
    share = [float((confidence >= config.generate.confidence).float().mean()) for confidence in made.target_confidence]
    if not empty and max(share) < _FEW:
        found.append(
            f"{max(share):.0%} of the imagined points at most reach generate.confidence={config.generate.confidence:g} "
            f"(their median is {float(made.target_confidence.median()):.3g}); lower it to see more"
        )
    unseen = [str(i) for i, view in enumerate(described) if view["overlap"] == 0 and str(i) not in empty]
    if unseen:
        found.append(
            f"{_named(unseen)} nothing of what the reference shows: all of it is imagined freely; turn or move less to "
            "keep to the picture"
        )
    return found


def share(part: float) -> str:
    """A share as a percentage; a small one is not shown as none."""
    return "less than 1%" if 0 < part < 0.01 else f"{part:.0%}"


def _named(views: Sequence[str]) -> str:
    return f"view {views[0]} sees" if len(views) == 1 else f"views {', '.join(views)} see"


def _write_page(
    out: Path,
    pipeline: Pipeline,
    config: RunConfig,
    reference: Picture,
    seen: tuple[np.ndarray, Tensor],
    made: Imagined,
    views: Sequence[View],
    shown: Sequence[Mapping[str, np.ndarray]],
    described: Sequence[Mapping[str, Any]],
    run: str,
) -> None:
    cut, K = seen
    cameras = [Camera(pose=np.eye(4), K=K.numpy(), size=pipeline.size)]
    cameras += [
        Camera(pose=made.pose[i].cpu().double().numpy(), K=made.K[i].cpu().double().numpy(), size=pipeline.size)
        for i in range(len(made))
    ]
    groups = [_group("reference", made.reference_points[0], torch.from_numpy(cut) / 255, made.reference_confidence[0])]
    groups += [
        _group("target", made.target_points[i], made.target_colours[i], made.target_confidence[i])
        for i in range(len(made))
    ]
    write_viewer(
        out / PAGE,
        title=f"{reference.name}, imagined" + (f" by {run}" if run else ""),
        note=f"One picture and {_count(len(views), 'camera pose')}. {_camera_note(reference, config)}",
        threshold=config.generate.confidence,
        reference=Shown(name=reference.name, camera=cameras[0], pictures=[("Reference, as the model sees it", cut)]),
        views=[
            Shown(name=f"{i:03d}", camera=cameras[i + 1], pictures=list(shown[i].items()), facts=_facts(described[i]))
            for i in range(len(views))
        ],
        groups=groups,
    )


def _group(kind: str, points: Tensor, colours: Tensor, confidence: Tensor) -> Group:
    """All points, whatever their confidence: the page has a slider for it."""
    keep = torch.isfinite(points).all(-1) & torch.isfinite(confidence)
    return Group(
        kind=kind,
        points=points[keep].float().cpu().numpy(),
        colours=scene_files.as_bytes(colours.to(points)[keep]),
        confidence=confidence[keep].float().cpu().numpy(),
    )


def _facts(view: Mapping[str, Any]) -> dict[str, str]:
    depth = view["depth_metres"]
    return {
        "turned by": f"{view['angle_degrees']:.1f}°",
        "moved by": f"{view['distance_metres']:.2f} m",
        "picture covered by points": share(view["coverage"]),
        "shown by the reference's points": share(view["overlap"]),
        "points": f"{view['points']['imagined']:,} imagined, {view['points']['reference']:,} of the reference",
        "depth, median": "nothing lies ahead" if depth is None else f"{depth[1]:.2f} m",
        "confidence, median": f"{view['confidence']['median']:.2f}",
    }


def _camera_note(reference: Picture, config: RunConfig) -> str:
    if reference.known_camera:
        return "The camera of the reference is measured."
    return f"The camera of the reference is not known: a field of view of {config.generate.fov:g}° is assumed."


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
