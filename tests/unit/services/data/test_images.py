"""Pixels from files, archives, Parquet columns and videos; content digests."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from services.contracts import DepthRef, ImageRef, Intrinsics
from services.data.digests import Stamp, content_digest, digest_file
from services.data.images import image_size, load_depth, load_ids, load_image, load_photo
from services.data.videos import decoder_version, frame_times
from services.errors import DataError
from tests.support.films import write_video


def picture(value: int = 0) -> np.ndarray:
    return np.random.default_rng(value).integers(0, 255, (6, 8, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def test_an_image_file_is_rgb_bytes(tmp_path: Path) -> None:
    for mode, stored in (
        ("RGB", picture()),
        ("L", picture()[..., 0]),
        ("RGBA", np.dstack([picture(), picture()[..., :1]])),
    ):
        path = tmp_path / f"{mode}.png"
        Image.fromarray(stored).save(path)
        loaded = load_image(ImageRef(path=str(path)))
        assert (loaded.dtype, loaded.shape) == (np.uint8, (6, 8, 3))
        expected = np.repeat(stored[..., None], 3, axis=-1) if mode == "L" else stored[..., :3]
        assert np.array_equal(loaded, expected)
        assert image_size(ImageRef(path=str(path))) == (8, 6)


def test_the_orientation_tag_is_not_applied(tmp_path: Path) -> None:
    image = Image.fromarray(picture())
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_image(ImageRef(path=str(tmp_path / "a.png"))), picture())


def test_a_photograph_is_upright_and_has_no_holes(tmp_path: Path) -> None:
    image = Image.fromarray(picture())
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(tmp_path / "sideways.png", exif=exif)
    assert np.array_equal(load_photo(tmp_path / "sideways.png"), np.rot90(picture(), k=-1))
    alpha = np.zeros((6, 8, 1), np.uint8)
    alpha[3:] = 255
    Image.fromarray(np.dstack([picture(), alpha])).save(tmp_path / "cut-out.png")
    cut_out = load_photo(tmp_path / "cut-out.png")
    assert (cut_out[:3] == 255).all(), "white stands behind what is transparent, whatever its hidden colour"
    assert np.array_equal(cut_out[3:], picture()[3:])
    Image.fromarray(picture()[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: a picture of mode 'I;16' .*save it with 8 bits a channel"):
        load_photo(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"absent\.png: there is no such file"):
        load_photo(tmp_path / "absent.png")


@pytest.mark.parametrize(
    ("stored", "unit", "unknown", "expected"),
    [
        (np.array([[0, 1500], [65535, 2]], np.uint16), 0.001, 65535.0, [[0, 1.5], [0, 0.002]]),
        (np.array([[0, 1500], [65535, 2]], np.uint16), 0.001, None, [[0, 1.5], [65.535, 0.002]]),
        (np.array([[np.nan, 1.5], [np.inf, -1.0]], np.float32), 1.0, None, [[0, 1.5], [0, 0]]),
    ],
)
def test_depth_is_metres_with_zero_for_unknown(
    tmp_path: Path, stored: np.ndarray, unit: float, unknown: float | None, expected: list[list[float]]
) -> None:
    camera = Intrinsics(fx=1, fy=1, cx=0, cy=0, width=2, height=2)
    np.save(tmp_path / "a.npy", stored)
    Image.fromarray(stored).save(tmp_path / "a.tiff")
    for name in ("a.npy", "a.tiff"):
        depth = load_depth(DepthRef(path=str(tmp_path / name), metres_per_unit=unit, K=camera, unknown=unknown))
        assert depth.dtype == np.float32
        assert np.allclose(depth, expected)


def test_ids_of_any_depth_and_of_palettes(tmp_path: Path) -> None:
    ids = np.array([[0, 7], [255, 3]])
    Image.fromarray(ids.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray((ids * 200).astype(np.uint16)).save(tmp_path / "16.png")
    palette = Image.fromarray(ids.astype(np.uint8), mode="L").convert("P")
    palette.putdata(ids.ravel().tolist())
    palette.save(tmp_path / "p.png")
    assert np.array_equal(load_ids(tmp_path / "8.png"), ids)
    assert np.array_equal(load_ids(tmp_path / "16.png"), ids * 200)
    assert np.array_equal(load_ids(tmp_path / "p.png"), ids)
    assert load_ids(tmp_path / "8.png").dtype == np.int32


def test_members_of_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for number in range(3):
            data = png(picture(number))
            info = tarfile.TarInfo(f"x/{number}.png")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    for number in (2, 0, 1):
        ref = ImageRef(path=str(path), member=f"x/{number}.png")
        assert np.array_equal(load_image(ref), picture(number))
        assert content_digest(ref) == hashlib.sha256(png(picture(number))).hexdigest()
    with pytest.raises(DataError, match=r"a\.tar: has no member 'y'"):
        load_image(ImageRef(path=str(path), member="y"))


@pytest.mark.parametrize("as_struct", [False, True])
def test_rows_of_parquet_files(tmp_path: Path, as_struct: bool) -> None:
    path = tmp_path / "a.parquet"
    values = [png(picture(number)) for number in range(5)]
    column = pa.array([{"bytes": value, "path": "n"} for value in values] if as_struct else values)
    pq.write_table(pa.table({"image": column}), path, row_group_size=2)
    for number in (4, 0, 3):
        ref = ImageRef(path=str(path), member=f"image:{number}")
        assert np.array_equal(load_image(ref), picture(number))
        assert content_digest(ref) == hashlib.sha256(values[number]).hexdigest()
    with pytest.raises(DataError, match=r"has no row 5"):
        load_image(ImageRef(path=str(path), member="image:5"))


def test_frames_of_a_video_by_index_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    texture = np.random.default_rng(0).integers(0, 30, (48, 64, 3))
    frames = [(texture + 18 * number).astype(np.uint8) for number in range(12)]
    write_video(path, frames, fps=10, gop=5)
    with av.open(str(path)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    assert stored != sorted(stored)  # frames are stored in another order than they are shown in
    times = frame_times(path)
    assert len(times) == 12
    assert times == pytest.approx([number / 10 for number in range(12)])
    for number in (11, 0, 7, 3, 8):
        loaded = load_image(ImageRef(path=str(path), frame=number))
        assert loaded.shape == (48, 64, 3)
        assert np.abs(loaded.astype(int) - frames[number]).mean() < 4
    assert image_size(ImageRef(path=str(path), frame=0)) == (64, 48)
    with pytest.raises(DataError, match=r"has 12 frames, frame 12 was asked for"):
        load_image(ImageRef(path=str(path), frame=12))


def test_a_damaged_frame_is_an_error_and_those_before_it_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    texture = np.random.default_rng(0).integers(0, 60, (48, 64, 3))
    write_video(path, [(texture + 10 * number).astype(np.uint8) for number in range(12)], gop=12)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    position, size = packets[6]
    data = bytearray(path.read_bytes())
    data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    assert load_image(ImageRef(path=str(path), frame=0)).shape == (48, 64, 3)
    with pytest.raises(DataError, match=r"a\.mp4: frame 11 does not decode; the video is truncated or damaged"):
        load_image(ImageRef(path=str(path), frame=11))


def test_digests_name_content_frame_and_decoder(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    one.write_bytes(png(picture()))
    two.write_bytes(png(picture()))
    assert content_digest(ImageRef(path=str(one))) == content_digest(ImageRef(path=str(two)))
    video = tmp_path / "a.mp4"
    write_video(video, [np.full((16, 16, 3), 9, np.uint8)] * 3)
    whole = digest_file(video).digest
    expected = hashlib.sha256(b"%s frame 1 %s" % (whole, decoder_version().encode())).hexdigest()
    assert content_digest(ImageRef(path=str(video), frame=1)) == expected
    assert expected != content_digest(ImageRef(path=str(video), frame=2))
    assert "av-" in decoder_version()


def test_stamps_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert Stamp.of(path) is None
    path.write_bytes(b"1")
    before = Stamp.of(path)
    path.write_bytes(b"22")
    assert Stamp.of(path) != before
    assert digest_file(path).digest == hashlib.sha256(b"22").digest()
