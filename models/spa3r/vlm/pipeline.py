"""Spa3-VLM in use (arXiv 2602.21186, section 3.3): what was seen of a scene is read once, and asked as often as one
likes.

The language model and its adapter are a trained part; merged visual tokens and spatial latents come from elsewhere (the
feature service), as in training.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from models.errors import ModelError, WeightsError
from models.pretrained import load_pretrained
from models.spa3r.vlm.answers import VISUAL_COLUMNS, Prefix, answer, read_prefix
from models.spa3r.vlm.model import Spa3VLM


class Spa3VlmPipeline:
    """A trained Spa3-VLM, in eval mode. WeightsError for a part that is none."""

    def __init__(self, llm: nn.Module) -> None:
        if not isinstance(llm, Spa3VLM):
            raise WeightsError(f"part 'llm' must be a {Spa3VLM.__name__}, got a {type(llm).__name__}")
        self.llm = llm.eval()

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        weight = self.llm.language.get_input_embeddings().weight
        assert isinstance(weight, Tensor), "an embedding's weight"
        return weight.device

    @classmethod
    def load(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Spa3VlmPipeline:
        """From the folder that a run wrote (``<run>/weights/llm``) or exported."""
        return cls(load_pretrained(folder).to(device))

    def look(self, scene: Mapping[str, Tensor]) -> SeenScene:
        """A scene to be asked: columns ``visual`` (1, N, C), ``grids`` (1, F, 2), ``latents`` (1, Q, D) of one sample,
        with their lengths, as in training; others are left out.
        """
        seen = {name: scene[name].to(self.device) for name in VISUAL_COLUMNS if name in scene}
        for name, column in seen.items():
            if len(column) != 1:
                raise ModelError(f"a scene is one sample, its column {name!r} has {len(column)}")
        return SeenScene(self.llm, seen)


class SeenScene:
    """What was seen of one scene: read when the first question comes, kept for those that follow."""

    def __init__(self, llm: Spa3VLM, scene: Mapping[str, Tensor]) -> None:
        self._llm, self._scene = llm, dict(scene)
        self._prefix: Prefix | None = None
        self.readings = 0
        """How often the frames went through the language model."""

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Collection[int],
        batch_size: int = 0,
    ) -> list[list[int]]:
        """Token ids of the greedy answer to each prompt.

        Args:
            prompts: token ids up to where the answer begins; all show the frames in the same places.
            max_new_tokens: longest answer.
            stop: tokens that end an answer; they are no part of it.
            batch_size: prompts at once; 0 takes all.

        ModelError for a prompt that shows the frames elsewhere than the one before, or does not fit the frames.
        """
        rest = []
        for prompt in prompts:
            shown = list(prompt[: self._last_image(prompt) + 1])
            prefix = self._read(shown)
            if tuple(shown) != prefix.ids:
                raise ModelError(
                    "the questions do not show the frames in the same places, so they cannot share one reading: leave "
                    "marks of images out of all of them, or ask those with marks apart"
                )
            rest.append(list(prompt[len(shown) :]))
        if not rest:
            return []
        return answer(self._llm, self._read(()), rest, max_new_tokens=max_new_tokens, stop=stop, batch_size=batch_size)

    def _read(self, ids: Sequence[int]) -> Prefix:
        if self._prefix is None:
            self._prefix = read_prefix(self._llm, ids, self._scene if ids else {})
            self.readings += 1
        return self._prefix

    def _last_image(self, prompt: Sequence[int]) -> int:
        """Place of the last token of an image; -1 without any."""
        places = [place for place, token in enumerate(prompt) if token == self._llm.image_token_id]
        return places[-1] if places else -1
