"""How sure are we: bootstrap intervals over dialogues, Student's t over seeds. Pure numpy.

The unit is the dialogue, never the turn: turns of one dialogue share a speaker, a task and a history, so counting them
as independent would make every interval too narrow. What another seed would do, dialogues cannot say: that takes seeds.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_CELLS_PER_CHUNK = 1 << 22  # bounds the index matrix at 32 MB, however many dialogues there are


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def mean_interval(
    values: npt.ArrayLike, *, num_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> Interval:
    """Mean of `values` with its percentile bootstrap interval (Efron 1979).

    Args:
        values: [N] one finite value per dialogue.
        num_resamples: how often N dialogues are drawn with replacement.
        seed: the same values and seed give the same interval.
        confidence: share of the resampled means inside the interval.

    Raises:
        ValueError: no value, a value that is not finite, or a setting out of range.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"need one value per dialogue and at least one dialogue, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"value {int(np.flatnonzero(~np.isfinite(array))[0])} of {len(array)} is not finite")
    if num_resamples < 1 or not 0.0 < confidence < 1.0:
        raise ValueError(f"num_resamples={num_resamples} must be at least 1 and confidence={confidence} inside (0, 1)")
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(_resampled_means(array, num_resamples, seed), [tail, 1.0 - tail])
    return Interval(float(array.mean()), float(low), float(high))


def paired_bootstrap(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Mean of `after - before` with its interval; dialogue i of both sides answers the same prompt.

    Pairing takes the difficulty of the prompts out of the noise: whole pairs are resampled.

    Args:
        before: [N] one value per dialogue, e.g. the share of its turns that are right.
        after: [N] the same dialogues, in the same order.

    Raises:
        ValueError: lengths differ, or as in `mean_interval`.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal lengths: before has shape {first.shape}, after {second.shape}")
    return mean_interval(second - first, num_resamples=num_resamples, seed=seed, confidence=confidence)


_T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""0.975 quantile of Student's t, by the number of values that the mean is of."""
MAX_SEEDS = max(_T_975)


def seeds_interval(means: npt.ArrayLike) -> Interval:
    """Mean over seeds with its 95 % interval by Student's t: wide for two and three, as it has to be.

    Args:
        means: [N] one finite value per seed, such as the mean of `after - before` over dialogues; 2 to `MAX_SEEDS`.

    Raises:
        ValueError: another number of seeds, or a value that is not finite.
    """
    array = np.asarray(means, dtype=np.float64)
    if array.ndim != 1 or len(array) not in _T_975:
        raise ValueError(f"need one value per seed of 2 to {MAX_SEEDS} seeds, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"value {int(np.flatnonzero(~np.isfinite(array))[0])} of {len(array)} is not finite")
    half = _T_975[len(array)] * float(array.std(ddof=1)) / math.sqrt(len(array))
    mean = float(array.mean())
    return Interval(mean, mean - half, mean + half)


def _resampled_means(values: npt.NDArray[np.float64], num_resamples: int, seed: int) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS_PER_CHUNK // len(values))
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, rows):
        stop = min(start + rows, num_resamples)
        means[start:stop] = values[rng.integers(0, len(values), size=(stop - start, len(values)))].mean(axis=1)
    return means
