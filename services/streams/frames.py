"""Token columns of conversations whose pictures keep their shapes, several of them behind what they share.

Every picture is a block of as many placeholders as its record has tokens. ``segments`` says which tokens all
conversations of a sample share (0) and which belong to one of them (1, 2, ...); see :mod:`models.spa3r.vlm.packing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from configs import RunConfig
from models.errors import ModelError
from models.spa3r.vlm.packing import PREFIX, Packed, pack_samples
from models.spec import TensorSpec
from models.text.tokenizer import VISION_TOKENS, token_id
from services.contracts import PlanSample, Record, Tensor
from services.errors import DataError, PackedError
from services.streams.columns import Texts
from services.streams.sampling import sample_id
from services.streams.text import SPECS, TextColumns

GRIDS = "grids"
"""Column of rows and columns of the tokens of each picture of a sample."""


class FrameColumns(TextColumns):
    """Text with Qwen's image blocks."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, 1, vision=True)
        self.image_token_id = token_id(self.tokenizer, VISION_TOKENS[1])
        """The placeholder."""


class FrameTexts(Texts):
    """Conversations of planned samples, by the grids of their pictures.

    Args:
        columns: makes tokens of text.
        manifests: by source.
        appended: a column of a sample whose rows have places of their own behind the last picture's; "" for none.
    """

    def __init__(self, columns: FrameColumns, manifests: Mapping[str, Any], *, appended: str = "") -> None:
        super().__init__(columns, manifests)
        self.columns, self.appended = columns, appended

    def specs(self, kind: str) -> dict[str, TensorSpec]:  # noqa: ARG002, D102
        return {**SPECS, "segments": TensorSpec(shape=(None,), dtype="int64")}

    def blocks(self, seen: Record) -> list[int]:
        """Placeholders of each picture of a sample."""
        grids = seen[GRIDS].data if GRIDS in seen else np.zeros((0, 2), np.int64)
        counts = [int(rows * columns) for rows, columns in grids]
        if counts and self.appended:
            counts[-1] += len(seen[self.appended].data)
        return counts

    def _of(self, sample: PlanSample, seen: Record) -> Record:
        """The conversation of a sample, or those of its pack. DataError names the one that cannot be read."""
        blocks, read = self.blocks(seen), []
        for name in sample.questions or (sample.item,):
            item = self.item(sample, name)
            if len(item.images) != len(blocks):
                raise DataError(
                    f"item {name!r} of {sample.source} has {len(item.images)} images, the sample {sample.id!r} shows "
                    f"{len(blocks)}: index the source again"
                )
            try:
                record = self.columns.conversation(item, blocks)
            except DataError as error:
                raise PackedError(str(error), sample_id(sample.source, name, sample.kind, 0)) from error
            read.append((record["input_ids"].data.tolist(), record["supervised"].data.tolist()))
        if len(read) == 1:  # whatever its turns show, there is nothing to share
            ids, supervised = read[0]
            return _record(Packed(ids=ids, supervised=supervised, segments=[PREFIX] * len(ids)))
        try:
            return _record(pack_samples(read, self.columns.image_token_id))
        except ModelError as error:
            raise DataError(
                f"conversations {', '.join(sample.questions)} of {sample.source} cannot share their pictures: {error}; "
                "set recipe.spa3_vlm.questions_per_sample=1 for such data"
            ) from error


def _record(packed: Packed) -> Record:
    return {
        "input_ids": Tensor(data=np.array(packed.ids, np.int64), dtype="int64"),
        "supervised": Tensor(data=np.array(packed.supervised, np.bool_), dtype="bool"),
        "segments": Tensor(data=np.array(packed.segments, np.int64), dtype="int64"),
    }
