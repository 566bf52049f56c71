"""Several sources drawn by weight: exactly, not on average; and resumed at exactly the same prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from rlaudio.data.source import PromptSource
from rlaudio.errors import DataError
from rlaudio.types import PromptRecord


class Interleaver:
    """Deals places to sources so that at every moment each has had its share, to within less than one place.

    R. Tijdeman, "The chairman assignment problem" (Discrete Mathematics 32, 1980): among the sources that may have the
    place the one with the nearest deadline has it, which keeps |places - weight * n| at or below 1 - 1 / (2k - 2) for
    k sources at every n. The state is the number of places each has had.

    Args:
        weights: above 0; divided by their sum.

    Raises:
        DataError: there are none, or one is not above 0.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise DataError(f"weights of a mixture are {list(weights)}: give each part a number above 0")
        exact = [Fraction(str(weight)) for weight in weights]
        self._shares = [weight / sum(exact) for weight in exact]
        self._slack = Fraction(1, max(1, 2 * len(weights) - 2))
        self.counts = [0] * len(weights)

    def next(self) -> int:
        """The source whose turn it is."""
        num = sum(self.counts) + 1
        due = [share * num - count for share, count in zip(self._shares, self.counts, strict=True)]
        # Deficits sum to 1, so one of k is at least 1/k, which is not below the slack; with one source it is 1.
        able = [index for index, deficit in enumerate(due) if deficit >= self._slack]
        chosen = min(able, key=lambda index: ((1 - self._slack - due[index]) / self._shares[index], index))
        self.counts[chosen] += 1
        return chosen


@dataclass(frozen=True, slots=True)
class MixturePart:
    """One source of a mixture.

    Attributes:
        name: in states and messages; unique in the mixture.
        weight: its share of the prompts.
        records: at least one.
    """

    name: str
    weight: float
    records: Sequence[PromptRecord]


class MixtureSource(PromptSource):
    """Prompts of several parts by weight; each part deals all its records before it repeats one.

    Which part is next depends on the weights alone, which of its records on (seed, part's name, epoch). The weights are
    shares of what is issued: prompts that are dropped later are not made up for.

    Args:
        parts: at least one; ids are unique over all of them.
        seed: of the shuffles.

    Raises:
        DataError: a part has no records, an id occurs twice, a weight is not above 0.
    """

    def __init__(self, parts: Sequence[MixturePart], *, seed: int) -> None:
        empty = [part.name for part in parts if not part.records]
        if empty:
            raise DataError(f"part {empty[0]!r} of the mixture has no records; check its file, or leave it out")
        super().__init__([record for part in parts for record in part.records], seed=seed)
        if len(self._records_by_id) < len(self):
            raise DataError("two records of the mixture have one id; `rlaudio data check` says which")
        self._mixed = tuple(parts)
        self._start(seed)

    def _start(self, seed: int) -> None:
        self._turns = Interleaver([part.weight for part in self._mixed])
        self._orders = [_Epochs(len(part.records), seed=_part_seed(seed, part.name)) for part in self._mixed]

    def state(self) -> dict[str, Any]:
        """As of a `PromptSource`, with where each part stands: a few numbers per part, however many records."""
        parts = {
            part.name: {
                "weight": part.weight,
                "num": len(part.records),
                "count": count,
                "epoch": order.epoch,
                "position": order.position,
            }
            for part, count, order in zip(self._mixed, self._turns.counts, self._orders, strict=True)
        }
        return super().state() | {"mixture": parts}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `PromptSource.restore`. Raises DataError also where parts or weights differ; all stays as it was then."""
        was = state.get("mixture")
        now = {part.name: (part.weight, len(part.records)) for part in self._mixed}
        if not isinstance(was, dict) or {name: (one["weight"], one["num"]) for name, one in was.items()} != now:
            raise DataError(
                f"the mixture changed since this state was taken (name: weight and records are now {now}); resume with "
                "the same parts and weights, or start a new run"
            )
        super().restore(state)
        self._start(int(state["seed"]))
        for index, part in enumerate(self._mixed):
            self._turns.counts[index] = int(was[part.name]["count"])
            self._orders[index].go_to(epoch=int(was[part.name]["epoch"]), position=int(was[part.name]["position"]))

    def _draw(self) -> PromptRecord:
        part = self._turns.next()
        return self._mixed[part].records[self._orders[part].next()]


class _Epochs:
    """The numbers below `num` again and again, each once per epoch, in an order that (seed, epoch) decide."""

    def __init__(self, num: int, *, seed: int) -> None:
        self._num, self._seed = num, seed
        self.go_to(epoch=0, position=0)

    def go_to(self, *, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self._order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(self._num).tolist()

    def next(self) -> int:
        if self.position == self._num:
            self.go_to(epoch=self.epoch + 1, position=0)
        self.position += 1
        return self._order[self.position - 1]


def _part_seed(seed: int, name: str) -> int:
    """Parts of equal length must not be dealt in one order."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\x1f{name}".encode(), digest_size=8).digest(), "big") >> 1
