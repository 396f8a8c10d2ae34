"""Where imagined cameras stand: the signs of angles, trajectories, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from actors.poses import PoseOptions, orbit, poses_of, read_poses, rotation, sweep
from configs import ConfigError
from configs.schema import GenerateConfig
from models.geometry.poses import inverse, rigidity_error
from models.geometry.projection import project, transform
from services.errors import DataError

K = torch.tensor([[100.0, 0.0, 80.0], [0.0, 100.0, 60.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


def seen(pose: torch.Tensor, point: list[float]) -> tuple[float, float, float]:
    """Pixel and depth at which the camera of ``pose`` sees a point of the reference camera's frame."""
    uv, z = project(transform(torch.tensor([point], dtype=torch.float64), inverse(pose)), K)
    return float(uv[0, 0]), float(uv[0, 1]), float(z[0])


def no_distance() -> float:
    raise AssertionError("nothing asked for the distance")


def one(**options: object) -> torch.Tensor:
    (pose,) = poses_of(PoseOptions(**options), GenerateConfig(), no_distance)  # type: ignore[arg-type]
    return pose


def test_yaw_40_turns_to_the_right():
    """What lay 40 degrees to the right stands in the middle; what lay ahead stands to the left of it."""
    pose = one(yaw=40.0)
    right = [2 * float(torch.sin(torch.deg2rad(torch.tensor(40.0, dtype=torch.float64)))), 0.0,
             2 * float(torch.cos(torch.deg2rad(torch.tensor(40.0, dtype=torch.float64))))]  # fmt: skip
    assert right[0] > 0
    assert seen(pose, right) == pytest.approx((80.0, 60.0, 2.0), abs=1e-9)
    assert seen(pose, [0.0, 0.0, 2.0])[0] < 80.0
    assert torch.equal(pose[:3, 3], torch.zeros(3, dtype=torch.float64))


def test_pitch_turns_upward_and_roll_clockwise():
    u, v, _ = seen(one(pitch=20.0), [0.0, 0.0, 2.0])
    assert (u, v > 60.0) == (pytest.approx(80.0), True), "what lay ahead is below the middle of the picture"
    u, v, _ = seen(one(roll=10.0), [0.0, -1.0, 2.0])
    assert u < 80.0, "the camera turns clockwise, so that what is above tips to the left"
    assert v < 60.0


def test_a_move_is_along_the_axes_of_the_reference():
    assert seen(one(move="0.5,0,0"), [0.5, 0.0, 2.0]) == pytest.approx((80.0, 60.0, 2.0))
    assert seen(one(move="0,0,0.5"), [0.0, 0.0, 2.0])[2] == pytest.approx(1.5)
    assert seen(one(yaw=90.0, move="1,0,0"), [3.0, 0.0, 0.0]) == pytest.approx((80.0, 60.0, 2.0))


def test_yaw_comes_before_pitch_and_roll():
    torch.testing.assert_close(rotation(30, 20, 10), rotation(30) @ rotation(0, 20) @ rotation(0, 0, 10))
    ahead = rotation(30, 20)[:, 2]
    assert float(torch.atan2(ahead[0], ahead[2])) == pytest.approx(torch.pi / 6)
    assert float(torch.asin(-ahead[1])) == pytest.approx(torch.pi / 9)


def test_an_orbit_keeps_the_point_ahead_in_the_middle():
    poses = orbit(8, 30.0, 2.5)
    for pose in poses:
        assert seen(pose, [0.0, 0.0, 2.5]) == pytest.approx((80.0, 60.0, 2.5))
    assert float(poses[2, 0, 3]) == pytest.approx(-1.25), "it looks to the right from the left"
    torch.testing.assert_close(poses[0], torch.eye(4, dtype=torch.float64))
    assert float(rigidity_error(poses).max()) < 1e-12
    asked = poses_of(PoseOptions(trajectory="orbit"), GenerateConfig(frames=8), lambda: 2.5)
    torch.testing.assert_close(asked, poses)


def test_a_sweep_stays_where_it_is_and_closes():
    poses = sweep(12, 20.0)
    assert float(poses[:, :3, 3].abs().max()) == 0.0
    yaws = torch.rad2deg(torch.atan2(poses[:, 0, 2], poses[:, 2, 2]))
    assert (float(yaws.max()), float(yaws.min())) == (pytest.approx(20.0), pytest.approx(-20.0))
    # The step from the last frame to the first is as the one before it.
    assert float(yaws[0] - yaws[-1]) == pytest.approx(float(yaws[1] - yaws[0]))
    asked = poses_of(PoseOptions(trajectory="sweep"), GenerateConfig(frames=12, angle=20.0), no_distance)
    assert torch.equal(asked, poses)


def test_files_of_poses(tmp_path: Path):
    pose = one(yaw=25.0, pitch=5.0, move="0.1,0.2,0.3")
    both = torch.stack([pose, torch.eye(4, dtype=torch.float64)])
    (tmp_path / "one.json").write_text(json.dumps(pose.tolist()))
    (tmp_path / "two.json").write_text(json.dumps(both.tolist()))
    (tmp_path / "two.txt").write_text("\n".join(" ".join(map(repr, row)) for row in both.reshape(-1, 4).tolist()))
    assert torch.equal(read_poses(str(tmp_path / "one.json"))[0], pose)
    assert torch.equal(read_poses(str(tmp_path / "two.json")), both)
    assert torch.equal(read_poses(str(tmp_path / "two.txt")), both)
    assert torch.equal(one(file=str(tmp_path / "one.json")), pose)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("scaled.json", json.dumps([[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]), "pose 0 is not rigid"),
        ("mirrored.txt", "1 0 0 0\n0 1 0 0\n0 0 -1 0\n0 0 0 1", "not rigid"),
        ("nan.txt", "1 0 0 nan\n0 1 0 0\n0 0 1 0\n0 0 0 1", "not rigid"),
        ("short.txt", "1 0 0 0\n0 1 0 0", "shape (8,)"),
        ("flat.json", "[[1, 0, 0], [0, 1, 0], [0, 0, 1]]", "shape (3, 3)"),
        ("words.txt", "one two", "no matrices"),
        ("object.json", '{"pose": 1}', "a list of four rows of four numbers"),
        ("broken.json", "{", "no matrices"),
        ("empty.txt", "", "shape (0,)"),
    ],
)
def test_files_that_hold_no_poses_are_named(tmp_path: Path, name: str, text: str, said: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as caught:
        read_poses(str(tmp_path / name))
    assert name in str(caught.value)
    assert said in str(caught.value)


def test_exactly_one_way_of_saying_it():
    with pytest.raises(ConfigError, match=r"no pose is given: .*--trajectory orbit"):
        one()
    with pytest.raises(ConfigError, match="both --pose and --yaw"):
        one(file="a.json", yaw=3.0)
    with pytest.raises(ConfigError, match="--move 1,2: write three numbers"):
        one(move="1,2")
    for name, angle in (("yaw", float("inf")), ("pitch", float("nan")), ("roll", float("-inf"))):
        with pytest.raises(ConfigError, match=rf"--{name} {angle}: must be a number of degrees"):
            one(**{name: angle})
    with pytest.raises(DataError, match=r"circle: cannot be read .*`orbit` or `sweep`"):
        one(trajectory="circle")
