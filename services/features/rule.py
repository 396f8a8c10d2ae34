"""When caching does not pay: reading a record takes longer than encoding its input. Measured, not guessed."""

from __future__ import annotations

from statistics import median


class MeasuredRule:
    """Compares the median time to read a record with the median time to encode an input.

    A batch counts as its time divided by its size. Nothing is said before ``enough`` batches of each were seen, and
    the first encoded batch is left out: it loads the encoder.
    """

    def __init__(self, enough: int = 16) -> None:
        self._enough = enough
        self._reads: list[float] = []
        self._encodes: list[float] = []
        self._warm = False

    def read(self, seconds: float, records: int) -> str:
        """A batch that was read. Returns the verdict, with both figures, if caching should stop; else ""."""
        self._reads.append(seconds / max(1, records))
        return self._verdict()

    def encoded(self, seconds: float, inputs: int) -> str:
        """A batch that was encoded. Returns as :meth:`read` does."""
        if self._warm:
            self._encodes.append(seconds / max(1, inputs))
        self._warm = True
        return self._verdict()

    def figures(self) -> tuple[float, float] | None:
        """Median seconds to read a record and to encode an input; None before enough was seen."""
        if min(len(self._reads), len(self._encodes)) < self._enough:
            return None
        return median(self._reads), median(self._encodes)

    def _verdict(self) -> str:
        figures = self.figures()
        if figures is None or figures[0] <= figures[1]:
            return ""
        read, encode = figures
        return (
            f"do not cache: reading a record takes {1e3 * read:.3g} ms, encoding its input {1e3 * encode:.3g} ms "
            "(medians); features are encoded from now on. cache.mode=always keeps caching"
        )
