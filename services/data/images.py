"""Pixels from references: image files, members of tar archives and Parquet columns, frames of videos, depth, ids.

Pixels are returned as they are stored: an EXIF orientation is not applied, because intrinsics and masks belong to
the stored image. Everything that cannot be read is a :class:`DataError` that names the file.
"""

from __future__ import annotations

import io
import re
import struct
import tarfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from services.contracts import DepthRef, ImageRef
from services.errors import DataError

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg"})

# What Pillow raises for a file that is cut off or is no image (its decoders are many, and so are their errors).
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error, Image.DecompressionBombError)
# Modes whose numbers do not fit a byte: converting them would clip silently.
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# A cell with one picture, or one picture of a cell with a list of them.
_PARQUET_MEMBER = re.compile(r"(?P<column>.+?)(?:\[(?P<place>\d+)\])?:(?P<row>\d+)")


def describe(ref: ImageRef) -> str:
    """The reference as a reader of an error message wants it: file, and frame or member."""
    if ref.frame is not None:
        return f"{ref.path} (frame {ref.frame})"
    return f"{ref.path} (member {ref.member})" if ref.member is not None else ref.path


def load_image(ref: ImageRef) -> np.ndarray:
    """The picture as uint8 (H, W, 3) RGB. DataError names the file when it is missing, broken or no colour image."""
    if ref.frame is not None:
        from services.data.videos import load_frame

        return load_frame(Path(ref.path), ref.frame)
    with _open(ref) as image:
        _refuse_deep(image, describe(ref))
        return np.array(_decoded(image, describe(ref)).convert("RGB"))


def load_photo(path: str | Path) -> np.ndarray:
    """A picture of the user's own as uint8 (H, W, 3) RGB: upright as its EXIF orientation says, white behind it.

    Pictures of data sets are read by :func:`load_image` instead, whose pixels their intrinsics and masks belong to.
    DataError as there.
    """
    from PIL import ImageOps

    name = str(path)
    with _open(ImageRef(path=name)) as image:
        _refuse_deep(image, name)
        upright = ImageOps.exif_transpose(_decoded(image, name))
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        return np.array(upright.convert("RGB"))


def image_size(ref: ImageRef) -> tuple[int, int]:
    """(width, height) in pixels, from the header alone where the format has one."""
    if ref.frame is not None:
        from services.data.videos import frame_size

        return frame_size(Path(ref.path))
    with _open(ref) as image:
        return image.size


def load_depth(ref: DepthRef) -> np.ndarray:
    """Depth along z, float32 metres (H, W), 0 where unknown.

    Reads 8- or 16-bit or float pictures (PNG, TIFF) and ``.npy`` arrays. DataError when the file is missing or
    broken, has more than one channel, or has another size than its camera.
    """
    stored = load_stored(ref.path).astype(np.float64)
    if stored.shape != (ref.K.height, ref.K.width):
        raise DataError(
            f"{ref.path}: the depth map is {stored.shape[1]}x{stored.shape[0]} but its intrinsics are for "
            f"{ref.K.width}x{ref.K.height}"
        )
    known = np.isfinite(stored) & (stored > 0)
    if ref.unknown is not None:
        known &= stored != ref.unknown
    return np.where(known, stored * ref.metres_per_unit, 0.0).astype(np.float32)


def load_stored(path: str | Path) -> np.ndarray:
    """The numbers of a depth map as they are stored (H, W), without unit."""
    return _load_array(str(path), "a depth map")


def load_ids(path: str | Path) -> np.ndarray:
    """Instance or class ids as int32 (H, W) from an 8- or 16-bit PNG (palette indices count) or an ``.npy`` array."""
    stored = _load_array(str(path), "an id mask")
    if not np.issubdtype(stored.dtype, np.integer):
        raise DataError(f"{path}: an id mask holds integers, this one holds {stored.dtype}")
    return stored.astype(np.int32)


def read_bytes(ref: ImageRef) -> bytes:
    """The encoded bytes of an image file or of a member of a container. Not for frames of a video."""
    path = Path(ref.path)
    if ref.member is None:
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if path.suffix == ".parquet":
        return _parquet_member(path, ref.member)
    return _tar_member(path, ref.member)


def _open(ref: ImageRef) -> Image.Image:
    source: Path | io.BytesIO = Path(ref.path) if ref.member is None else io.BytesIO(read_bytes(ref))
    try:
        return Image.open(source)
    except FileNotFoundError as error:
        raise DataError(f"{describe(ref)}: there is no such file") from error
    except _PILLOW_ERRORS as error:
        raise DataError(f"{describe(ref)}: not a readable image ({error})") from error


def _refuse_deep(image: Image.Image, what: str) -> None:
    if image.mode in _DEEP_MODES:
        raise DataError(
            f"{what}: a picture of mode {image.mode!r} where an 8-bit colour or grey one is needed; is this a depth "
            "map? If not, save it with 8 bits a channel"
        )


def _decoded(image: Image.Image, what: str) -> Image.Image:
    try:
        image.load()
    except _PILLOW_ERRORS as error:
        raise DataError(f"{what}: the image is truncated or damaged ({error})") from error
    return image


def _load_array(path: str, what: str) -> np.ndarray:
    if path.endswith(".npy"):
        try:
            array = np.load(path, allow_pickle=False)
        except FileNotFoundError as error:
            raise DataError(f"{path}: there is no such file") from error
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{path}: not a readable array ({error})") from error
    else:
        with _open(ImageRef(path=path)) as image:
            array = np.array(_decoded(image, path))
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2:
        raise DataError(f"{path}: {what} has one channel, this file has the shape {array.shape}")
    return np.asarray(array)


# --- containers ------------------------------------------------------------------------------------------------------


def file_version(path: Path) -> tuple[int, int]:
    """(size, mtime_ns): caches of what a file holds are kept by it. DataError when the file cannot be read."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    return stat.st_size, stat.st_mtime_ns


def tar_members(path: Path) -> dict[str, tuple[int, int]]:
    """Name -> (offset, size) of the files in an uncompressed tar archive, in their order. Cached until it changes."""
    return _tar_index(path, file_version(path))


@lru_cache(maxsize=64)
def _tar_index(path: Path, stamp: tuple[int, int]) -> dict[str, tuple[int, int]]:
    try:
        with tarfile.open(path, "r:") as archive:
            members = {info.name: (info.offset_data, info.size) for info in archive if info.isfile()}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: not a readable, uncompressed tar archive ({error}); unpack a compressed one with gunzip first, "
            "its members cannot be reached at random"
        ) from error
    for name, (offset, size) in members.items():
        if offset + size > stamp[0]:
            raise DataError(f"{path}: the archive ends within its member {name!r}; it is truncated")
    return members


def _tar_member(path: Path, member: str) -> bytes:
    members = tar_members(path)
    if member not in members:
        raise DataError(f"{path}: has no member {member!r} ({len(members)} files)")
    offset, size = members[member]
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise DataError(f"{path}: the archive ends within its member {member!r}; it is truncated")
    return data


def _parquet_member(path: Path, member: str) -> bytes:
    named = _PARQUET_MEMBER.fullmatch(member)
    if named is None:
        raise DataError(f"{path}: the member {member!r} is not of the form 'column:row' or 'column[place]:row'")
    column, place, row = named["column"], named["place"], int(named["row"])
    stamp = file_version(path)
    for group, (start, stop) in enumerate(_parquet_groups(path, stamp)):
        if start <= row < stop:
            value = _parquet_column(path, stamp, group, column)[row - start].as_py()
            if place is not None and isinstance(value, list):
                value = value[int(place)] if int(place) < len(value) else None
            data = value.get("bytes") if isinstance(value, dict) else value
            if not isinstance(data, bytes):
                raise DataError(f"{path}: row {row} of the column {column!r} holds no image bytes")
            return data
    raise DataError(f"{path}: has no row {row}")


@lru_cache(maxsize=64)
def _parquet_groups(path: Path, _version: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    ranges, start = [], 0
    for group in range(metadata.num_row_groups):
        stop = start + metadata.row_group(group).num_rows
        ranges.append((start, stop))
        start = stop
    return tuple(ranges)


# A row group is the unit that Parquet decodes; neighbours in it are usually asked for next.
@lru_cache(maxsize=4)
def _parquet_column(path: Path, _version: tuple[int, int], group: int, column: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path).read_row_group(group, columns=[column]).column(column)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path}: the column {column!r} cannot be read ({error})") from error
