"""What a reward actor writes beside a group's rows in the spool, and reads back: headers as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Protocol, TypedDict

import pyarrow as pa

from rlaudio.actors.rollout import PlayedHeader
from rlaudio.errors import DataError
from rlaudio.observe.metrics import GroupStats
from rlaudio.types import WeightVersion


class ScoredFields(TypedDict):
    """Fields of a `ScoredHeader` that a file knows."""

    has_signal: bool
    versions: tuple[WeightVersion, WeightVersion]
    stats: GroupStats


class _Scored(Protocol):
    @property
    def has_signal(self) -> bool: ...

    @property
    def versions(self) -> tuple[WeightVersion, WeightVersion]: ...

    @property
    def stats(self) -> GroupStats: ...


def header_to_json(header: _Scored) -> dict[str, Any]:
    """JSON-ready values of what the driver learned of a judged group."""
    return {
        "has_signal": header.has_signal,
        "versions": [[version.incarnation, version.number] for version in header.versions],
        "stats": asdict(header.stats),
    }


def header_from_json(written: Mapping[str, Any]) -> ScoredFields:
    """What `header_to_json` was given.

    Raises:
        DataError: it was written by another version of rlaudio.
    """
    stats = written["stats"]
    known = {field.name for field in fields(GroupStats)}
    if strange := sorted(set(stats) - known):
        raise DataError(f"a spooled group has statistics {', '.join(strange)}: use the rlaudio that wrote it")
    oldest, newest = (WeightVersion(*version) for version in written["versions"])
    return {
        "has_signal": written["has_signal"],
        "versions": (oldest, newest),
        "stats": GroupStats(**(stats | {"ages": tuple(stats["ages"])})),
    }


def counts_of(batch: pa.RecordBatch) -> PlayedHeader:
    """What its rows say of a group's playing; what was heard and encoded for it is not known any more."""
    return PlayedHeader(
        num_turns=batch.num_rows,
        prompt_tokens=len(batch.column("prompt_ids").flatten()),
        response_tokens=len(batch.column("response_ids").flatten()),
    )
