"""Keeps a pool at its size: who is lost starts again after a pause, who is added joins when ready, who goes is drained.

A place (`rollout-3`) is filled by one actor after another (`rollout-3`, `rollout-3.2`, ...): no name is used twice, so
nothing that is still said of a lost actor can meet its successor. Everything happens beside the run, which sees nothing
but members that come and go. A place whose actors are lost too often is given up, with the last reason; the run goes on
with the rest, and ends when nobody is left and nobody comes.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from rlaudio.actors.members import ActorPool, line
from rlaudio.config import SupervisionSettings
from rlaudio.errors import ConfigError

_LOG = logging.getLogger("rlaudio.actors")

State = Literal["coming", "filled", "given up"]


@dataclass(frozen=True, slots=True)
class Hiring:
    """How an actor of a pool comes about.

    Attributes:
        make: a new one of that name, not started; Ray finds room for it.
        start: the call that starts it.
        start_deadline_s: for that call.
        join: gives a started one what the others hold, then takes it in with the function that it is passed.
    """

    make: Callable[[str], ActorHandle[Any]]
    start: Callable[[ActorHandle[Any]], ray.ObjectRef]
    start_deadline_s: float
    join: Callable[[str, ActorHandle[Any], Callable[[], None]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class PoolSize:
    """Of one pool, now.

    Attributes:
        wanted: what was asked for last.
        serving: members that are given work.
        coming: places whose actor is being started, or waits for its pause or for room.
        leaving: actors that finish what they have.
        given_up: places that nobody fills any more.
        problem: why the last place was given up or the last actor lost; empty when none was.
    """

    wanted: int
    serving: int
    coming: int
    leaving: int
    given_up: int
    problem: str = ""

    @property
    def settled(self) -> bool:
        """Nothing is on its way to what was asked for."""
        return not self.coming and not self.leaving


@dataclass
class _Place:
    """Made and changed by its `Supervisor`."""

    name: str
    state: State = "coming"
    actor: str = ""
    num_lives: int = 0
    losses_s: deque[float] = field(default_factory=deque)
    num_failed_starts: int = 0  # since an actor of it has worked
    work: asyncio.Task[None] | None = None

    def next_name(self) -> str:
        self.num_lives += 1
        return self.name if self.num_lives == 1 else f"{self.name}.{self.num_lives}"


class Supervisor:
    """One per pool, made before anybody is lost, inside the event loop.

    Args:
        pool: its members are the places at the beginning.
        hiring: how more come about.
        settings: pauses, limits and deadlines.
        seed: of the pauses' jitter.
        told: hears in a sentence of everybody who comes, goes or is given up.
    """

    def __init__(
        self,
        pool: ActorPool,
        hiring: Hiring,
        *,
        settings: SupervisionSettings,
        seed: int,
        told: Callable[[str], None] = _LOG.warning,
    ) -> None:
        self.pool = pool
        self._hiring, self._settings, self._told = hiring, settings, told
        self._jitter = random.Random(f"{pool.role}/{seed}")
        self._places = [_Place(name, "filled", actor=name, num_lives=1) for name in pool.handles]
        self._prefix = self._places[0].name.rsplit("-", 1)[0] if self._places else pool.role
        self._num_places = len(self._places)
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_leaving = 0
        self._problem = ""
        self._bugs: list[BaseException] = []
        pool.supervised(lost=self._lose, expects=lambda: any(place.state == "coming" for place in self._places))

    @property
    def size(self) -> PoolSize:
        states = [place.state for place in self._places]
        return PoolSize(
            wanted=self.pool.num_wanted,
            serving=self.pool.num_alive,
            coming=states.count("coming"),
            leaving=self._num_leaving,
            given_up=states.count("given up"),
            problem=self._problem,
        )

    def resize(self, size: int) -> None:
        """Ask for so many members. Returns at once: who comes starts beside the run, who goes finishes its work first.

        Places that were given up are tried again.

        Raises:
            ConfigError: below 1; a run cannot go on without.
        """
        if size < 1:
            raise ConfigError(f"a pool of {size} {self.pool.role} actors cannot work: ask for at least 1")
        self.pool.num_wanted = size
        self._places = [place for place in self._places if place.state != "given up"]
        # Those that do no work yet go first, then who has the least in hand, of those the youngest.
        kept = sorted(self._places, key=lambda place: (place.state == "coming", -self.pool.busy_of(place.actor)))
        for place in kept[size:]:
            self._places.remove(place)
            self.pool.give_no_more(place.actor)
            self._num_leaving += 1
            self._do(self._dismiss(place))
        while len(self._places) < size:
            place = _Place(f"{self._prefix}-{self._num_places}")
            self._num_places += 1
            self._places.append(place)
            self._fill(place, pause_s=0.0)
        self.pool.look_again()

    async def stop(self) -> None:
        """Nobody comes or goes any more; the members stay. Raises what went wrong in the supervisor itself."""
        tasks, self._tasks = self._tasks, set()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._bugs:
            raise self._bugs[0]

    # ---- coming ------------------------------------------------------------------------------------------------

    def _lose(self, name: str, reason: str) -> None:
        """A member was left out."""
        place = next((place for place in self._places if place.actor == name), None)
        if place is None:  # it was leaving
            return
        place.actor = ""
        pause_s = self._pause_after(place, f"{name}: {reason}")
        if pause_s is not None:
            self._fill(place, pause_s=pause_s)

    def _fill(self, place: _Place, *, pause_s: float) -> None:
        place.state = "coming"
        place.work = self._do(self._keep_filling(place, pause_s=pause_s))

    async def _keep_filling(self, place: _Place, *, pause_s: float | None) -> None:
        while pause_s is not None:
            await asyncio.sleep(pause_s)
            name = place.next_name()
            try:
                return await self._hire(place, name)
            except Exception as error:  # what a named class raises may be anything: it is told, and tried again
                place.num_failed_starts += 1
                pause_s = self._pause_after(place, f"{name}: {line(error)}")

    async def _hire(self, place: _Place, name: str) -> None:
        handle = self._hiring.make(name)

        def take_in() -> None:
            self.pool.add(name, handle)
            place.state, place.actor, place.num_failed_starts = "filled", name, 0

        try:
            await self.pool.placed(name, handle, deadline_s=self._settings.place_deadline_s)
            await self.pool.start_one(name, self._hiring.start(handle), deadline_s=self._hiring.start_deadline_s)
            await self._hiring.join(name, handle, take_in)
        finally:
            if place.actor != name:
                self.pool.end(handle)
        self._told(f"{name} has joined, {self.pool.num_alive} of {self.pool.num_wanted} {self.pool.role} actors work")

    def _pause_after(self, place: _Place, reason: str) -> float | None:
        """Seconds until the place's next actor is made; None when it was the last."""
        settings, now_s = self._settings, asyncio.get_running_loop().time()
        self._problem = reason
        place.losses_s.append(now_s)
        while place.losses_s[0] < now_s - settings.window_s:
            place.losses_s.popleft()
        # A start may take longer than the window: those that failed count until one goes well.
        num_lost = max(len(place.losses_s), place.num_failed_starts)
        if num_lost <= settings.max_restarts:
            pause_s = pause_before_restart(num_lost, settings, chance=self._jitter.random())
            self._told(f"{place.name} starts again in {pause_s:.1f} s (loss {num_lost}): {reason}")
            return pause_s
        place.state = "given up"
        self._told(
            f"{place.name} is given up after {num_lost} losses (supervision.max_restarts is {settings.max_restarts}), "
            f"the last was {reason}; see Ray's logs of that actor, then `rlaudio scale` fills its place again"
        )
        self.pool.look_again()
        return None

    # ---- going -------------------------------------------------------------------------------------------------

    async def _dismiss(self, place: _Place) -> None:
        try:
            if place.work is not None and not place.work.done():
                place.work.cancel()
                await asyncio.wait([place.work])
            if not place.actor:  # it never came
                return
            handed_over = await self.pool.retire(place.actor, deadline_s=self._settings.drain_deadline_s)
            late = f", {handed_over} groups are handed over" if handed_over else ""
            self._told(f"{place.actor} has left, {self.pool.num_alive} {self.pool.role} actors work{late}")
        finally:
            self._num_leaving -= 1

    def _do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.error("the supervisor of %s actors failed", self.pool.role, exc_info=error)
            self._bugs.append(error)


def pause_before_restart(num_lost: int, settings: SupervisionSettings, *, chance: float) -> float:
    """Seconds, doubled with every loss up to the longest; the upper half of them is left to chance.

    Args:
        num_lost: in the window, this one included.
        chance: in [0, 1): places that were lost together do not come back together.
    """
    longest_s = min(settings.longest_pause_s, settings.first_pause_s * 2.0 ** min(num_lost - 1, 60))
    return longest_s * (0.5 + 0.5 * chance)
