"""One pass over numbers: minimum, maximum, percentiles, mean and std, merged from parts.

Types of at most 16 bits have their values counted, and all figures are exact. Other types have
their moments, merged by the formula of Chan, Golub and LeVeque (Updating Formulae and a Pairwise
Algorithm for Computing Sample Variances, 1979), and keep values for the percentiles.
"""

import math
from typing import NamedTuple

import numpy as np


class Figures(NamedTuple):
    """In the numbers' own units; std is the population's, divided by their number."""

    min: float
    max: float
    p01: float
    p99: float
    mean: float
    std: float


class Counts:
    """How often each value of a type of at most 16 bits occurs, by its bits.

    Attributes:
        count: numbers so far.
        kept, thinned: as in `Moments`; here every number is in the percentiles.
    """

    kept, thinned = math.inf, 0

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self._bits = np.dtype(f"u{dtype.itemsize}")
        self._counts = np.zeros(1 << 8 * dtype.itemsize, np.int64)

    @property
    def count(self) -> int:
        return int(self._counts.sum())

    def add(self, values: np.ndarray) -> None:
        """Count values [n] of the type."""
        self._counts += np.bincount(values.view(self._bits), minlength=len(self._counts))

    def part(self) -> tuple[np.ndarray, np.ndarray]:
        """What `merge` takes: the values that occur, and how often. Small, to travel."""
        present = np.flatnonzero(self._counts)
        return present.astype(self._bits), self._counts[present]

    def merge(self, part: tuple[np.ndarray, np.ndarray]) -> None:
        present, counts = part
        self._counts[present] += counts

    def figures(self) -> Figures:
        present, counts = self.part()
        values = present.view(self.dtype).astype(np.float64)
        order = np.argsort(values)
        values, counts = values[order], counts[order]
        ends = counts.cumsum()
        mean = (values * counts).sum() / ends[-1]
        variance = (np.square(values - mean) * counts).sum() / ends[-1]

        def percentile(share: float) -> float:
            """As numpy's "linear": between the two nearest in the sorted numbers."""
            rank = share * (ends[-1] - 1)
            low, high = values[np.searchsorted(ends, [math.floor(rank), math.ceil(rank)], "right")]
            return float(low + (high - low) * (rank % 1))

        return Figures(
            float(values[0]),
            float(values[-1]),
            percentile(0.01),
            percentile(0.99),
            float(mean),
            math.sqrt(variance),
        )


class Moments:
    """Count, mean and squared deviations of numbers of any type, and values for the percentiles.

    Beyond `limit`, half of the kept values are dropped, as often as needed. Which ones depends on
    `origin` and their place alone, so that parts merge to the same values wherever they are
    dropped: a value's key is its place times the golden ratio, of which the fractional part is
    spread evenly over any period in the data, and those with small keys stay.

    Args:
        limit: most values to keep.
        origin: a number of the part, such as its image's.
        thinned: how often half of the values are to be dropped from the start on.

    Attributes:
        count: numbers so far.
        kept: how many of them the percentiles are from.
        thinned: how often half of them were dropped.
    """

    def __init__(self, limit: int, origin: int = 0, thinned: int = 0) -> None:
        self.limit, self.origin, self.thinned = limit, origin, thinned
        self.count = self.kept = 0
        self.base = self.offset = 0.0  # the mean is their sum, which alone would lose digits
        self.squares = 0.0  # of the deviations from the mean
        self.min, self.max = math.inf, -math.inf
        self._pieces: list[tuple[np.ndarray, np.ndarray]] = []  # keys and values

    def add(self, values: np.ndarray) -> None:
        """Take in values [n], whose places are those after the ones before."""
        part = Moments(self.limit)
        part.count = part.kept = len(values)
        if part.count:
            exact = values.astype(np.float64)
            part.min, part.max = exact.min().item(), exact.max().item()
            with np.errstate(over="ignore", invalid="ignore"):  # std won't be finite
                part.base, shifted = part.min, exact - part.min
                part.offset = shifted.mean().item()
                part.squares = np.square(shifted - part.offset).sum().item()
            places = np.arange(self.count, self.count + part.count, dtype=np.uint64)
            start = np.uint64(self.origin * 0xBF58476D1CE4E5B9 % 2**64)
            keys = (places * np.uint64(0x9E3779B97F4A7C15) + start) >> np.uint64(32)
            kept = values.astype(np.result_type(values.dtype, np.float16))
            part._pieces = [(keys.astype(np.uint32), kept)]
        self.merge(part)

    def part(self) -> "Moments":
        """What `merge` takes."""
        return self

    def merge(self, part: "Moments") -> None:
        """Take in what another one has, and leave that one unusable."""
        if not part.count:
            return
        before, self.count = self.count, self.count + part.count
        if not before:
            self.base = part.base
        delta = part.base - self.base + part.offset - self.offset
        self.offset += delta * (part.count / self.count)
        self.squares += part.squares + delta * delta * (part.count / self.count * before)
        self.min, self.max = min(self.min, part.min), max(self.max, part.max)
        if part.thinned < self.thinned:
            part._thin(self.thinned)
        self._pieces += part._pieces
        self.kept += part.kept
        # Many small pieces would take more memory than their values.
        if part.thinned > self.thinned or self.kept > self.limit or len(self._pieces) > 1000:
            self._thin(part.thinned)

    def _thin(self, thinned: int) -> None:
        """Drop half of the values until `thinned` is reached and the rest is within the limit."""
        keys, values = map(np.concatenate, zip(*self._pieces, strict=True))
        self.thinned = max(self.thinned, thinned)
        while (chosen := keys <= 0xFFFFFFFF >> self.thinned).sum() > self.limit:
            self.thinned += 1
        self._pieces = [(keys[chosen], values[chosen])]
        self.kept = int(chosen.sum())

    def figures(self) -> Figures:
        values = np.concatenate([piece for _, piece in self._pieces]).astype(np.float64)
        low, high = np.percentile(values, [1, 99]).tolist()
        std = math.sqrt(self.squares / self.count)
        return Figures(self.min, self.max, low, high, self.base + self.offset, std)
