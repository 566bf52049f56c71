"""Following a job: its log as it grows, over dropped connections, until the job has ended."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from rlaudio.errors import ClusterError

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
QUIET_S = 20.0
"""Without a line for so long the head is asked how the job is: a connection may have died without a word."""
MAX_FAILURES_IN_A_ROW = 5
_REPORT = re.compile(r"^(run folder|mlflow|run): (\S.*)$", re.MULTILINE)


@dataclass(slots=True)
class Reported:
    """What a run says of itself in its log. `take` is given the log in pieces of any size."""

    run_folder: str = ""
    mlflow: str = ""
    _rest: str = field(default="", repr=False)

    def take(self, text: str) -> None:
        *whole, self._rest = (self._rest + text).split("\n")
        for match in _REPORT.finditer("\n".join(whole)):
            if match[1] == "mlflow":
                self.mlflow = match[2].strip()
            else:
                self.run_folder = match[2].strip()


def job_details(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """A job as Ray knows it. Raises ClusterError: there is no such job, or the head does not answer."""
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        raise ClusterError(
            f"job {job_id!r}: {_first_line(error)}; `rlaudio submit --list` shows those known"
        ) from error


async def follow(client: JobSubmissionClient, job_id: str, *, write: Callable[[str], None]) -> JobDetails:
    """Hand the job's log to `write` from its beginning until the job has ended; returns how it ended.

    A dropped connection is made again, and nothing is written twice.

    Raises:
        ClusterError: the head was lost for MAX_FAILURES_IN_A_ROW attempts; the job may go on.
    """
    written = failures = 0
    while True:
        skip = written
        try:
            async for piece in _pieces(client, job_id):
                fresh = piece[skip:]
                skip = max(0, skip - len(piece))
                if fresh:
                    written += len(fresh)
                    failures = 0
                    write(fresh)
            details = await asyncio.to_thread(job_details, client, job_id)
            if str(details.status.value) in ENDED:
                await _write_rest(client, job_id, written=written, write=write)
                return details
            failures = 0
        except (OSError, RuntimeError, ClusterError) as error:
            failures += 1
            if failures >= MAX_FAILURES_IN_A_ROW:
                raise ClusterError(
                    f"the head was lost while following job {job_id} ({_first_line(error)}); the job may go on: "
                    f"`rlaudio submit --logs {job_id}` follows it again"
                ) from error
        await asyncio.sleep(min(0.5 * 2**failures, 10.0))


async def wait_for_end(client: JobSubmissionClient, job_id: str, *, deadline_s: float) -> JobDetails:
    """Ask until the job has ended. Raises ClusterError: it has not within `deadline_s`."""
    until = time.monotonic() + deadline_s
    while True:
        details = await asyncio.to_thread(job_details, client, job_id)
        if details.status.value in ENDED:
            return details
        if time.monotonic() > until:
            raise ClusterError(
                f"job {job_id} is still {details.status.value} {deadline_s:g} s after it was told to stop: look at "
                f"`rlaudio submit --logs {job_id}`"
            )
        await asyncio.sleep(0.5)


async def _pieces(client: JobSubmissionClient, job_id: str) -> AsyncIterator[str]:
    """The log over one connection. Ends with the connection, and when the job has ended though it stays open."""
    source = cast("Any", client.tail_job_logs(job_id))
    following: asyncio.Task[str] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait({following}, timeout=QUIET_S)
            if not done:
                details = await asyncio.to_thread(job_details, client, job_id)
                if details.status.value in ENDED:
                    return
                continue
            try:
                piece = following.result()
            except StopAsyncIteration:
                return
            finally:
                following = None
            yield piece
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await source.aclose()


async def _write_rest(client: JobSubmissionClient, job_id: str, *, written: int, write: Callable[[str], None]) -> None:
    """What the connection did not bring any more: Ray 2.60 may close it before the last lines."""
    whole = await asyncio.to_thread(client.get_job_logs, job_id)
    if len(whole) > written:
        write(whole[written:])


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
