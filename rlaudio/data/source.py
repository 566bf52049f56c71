"""An endless, seeded stream of prompts that can be stopped and resumed at exactly the same place.

What became of a prompt that was dealt is the ledger's business (`experience/ledger.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlaudio.errors import DataError
from rlaudio.types import IntArray, PromptRecord


class PromptSource:
    """Deals every record once per epoch, in an order that depends only on (seed, epoch).

    Args:
        records: at least one; their order is part of what `restore` checks.
        seed: of the shuffles.

    Raises:
        DataError: there are no records.
    """

    def __init__(self, records: Sequence[PromptRecord], *, seed: int) -> None:
        if not records:
            raise DataError("no records to draw prompts from; check the data file and its filters")
        self._records = tuple(records)
        self._seed = seed
        self._digest = hashlib.sha256("\n".join(record.id for record in self._records).encode()).hexdigest()
        self._epoch = 0
        self._position = 0
        self._order = self._shuffle()
        self._records_by_id = {record.id: record for record in self._records}
        self.num_issued = 0

    def __len__(self) -> int:
        return len(self._records)

    def next(self) -> PromptRecord:
        """Deal the next prompt, under the number `num_issued`; never ends."""
        record = self._draw()
        self.num_issued += 1
        return record

    def find(self, prompt_id: str) -> PromptRecord:
        """The record of this id. Raises DataError: there is none."""
        try:
            return self._records_by_id[prompt_id]
        except KeyError:
            raise DataError(
                f"no record is called {prompt_id!r} any more: resume with the data that the run began with"
            ) from None

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON-ready values: give it to `restore` of a source over the same records."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "digest": self._digest,
            "num_issued": self.num_issued,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises:
            DataError: the state was taken over other records, or is not a state. The source is left as it was.
        """
        missing = sorted({"seed", "epoch", "position", "digest", "num_issued"} - set(state))
        if missing:
            raise DataError(f"prompt source state lacks {', '.join(missing)}; it was not written by this version")
        if state["digest"] != self._digest:
            raise DataError(
                "the records changed since this state was taken (their ids or order differ); "
                "resume with the same data, or start a new run"
            )
        position = int(state["position"])
        if not 0 <= position <= len(self._records):
            raise DataError(
                f"prompt source position {position} lies outside 0 to {len(self._records)}; start a new run"
            )
        self._seed, self._epoch, self._position = int(state["seed"]), int(state["epoch"]), position
        self._order = self._shuffle()
        self.num_issued = int(state["num_issued"])

    def _draw(self) -> PromptRecord:
        if self._position == len(self._records):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffle()
        record = self._records[int(self._order[self._position])]
        self._position += 1
        return record

    def _shuffle(self) -> IntArray:
        generator = np.random.default_rng([self._seed % 2**63, self._epoch])
        return generator.permutation(len(self._records)).astype(np.int32)
