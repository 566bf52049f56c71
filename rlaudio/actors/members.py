"""The members of a pool: started together, the least busy asked first, every wait with a deadline, the dead left out.

**Dead, mute or slow.** An actor that died answers with an error at once and is left out. One that gives nothing in
time may be mute (its process lives, its calls never answer) or slow (it works, on more than fits the deadline). So it
is asked whether it lives: `ping` comes back when its event loop turns and its engine comes round between two steps,
however much it has to do. No answer within `alive_deadline_s`: mute, it is left out. A slow group costs nobody's life,
unless nothing else ends: `MAX_TIMEOUTS_IN_A_ROW` time-outs, each of a call that began after the one before, with no
call answered between.

Members may come and go while the pool works (`add`, `retire`); `actors/supervisor.py` sees to that.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from rlaudio.errors import EngineDeadError, EngineError, RlaudioError

_LOG = logging.getLogger("rlaudio.actors")

MAX_TIMEOUTS_IN_A_ROW = 3
"""Of calls one after another, so it takes three deadlines; any number at the same time count as one."""

# What is told of an actor that the memory monitor ends, or that is lost with its node, is not always a RayActorError.
_PROCESS_DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)
DEATHS = (*_PROCESS_DEATHS, EngineDeadError)
"""Errors after which an actor answers nothing more."""


class Member:
    """One actor and what is known of it. Made and changed by its `ActorPool`."""

    def __init__(self, name: str, handle: ActorHandle[Any]) -> None:
        self.name = name
        self.handle = handle
        self.busy = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.is_leaving = False  # it gets no more work
        self.num_timeouts = 0  # in a row
        self.last_timeout_s = float("-inf")
        self.examination: asyncio.Task[str] | None = None


class ActorPool:
    """Members by name; `lease` hands out the least busy one, `call` waits for its answer.

    Args:
        role: what they do, which is also the name of their section in the settings.
        alive_deadline_s: for the answer to a `ping`.
        told: hears in a sentence of every member that is left out.
        end: ends a member's process.
        give_up: cancels a call inside its actor.
    """

    def __init__(
        self,
        role: str,
        handles: Mapping[str, ActorHandle[Any]],
        *,
        alive_deadline_s: float,
        told: Callable[[str], None] = _LOG.warning,
        end: Callable[[ActorHandle[Any]], None] = ray.kill,
        give_up: Callable[[Any], None] = ray.cancel,
    ) -> None:
        self.role = role
        self._alive_deadline_s = alive_deadline_s
        self._told, self._end, self._give_up = told, end, give_up
        self._last_death = "there were none"
        self._members = {name: Member(name, handle) for name, handle in handles.items()}
        self._changed = asyncio.Event()
        self._lost: Callable[[str, str], None] = lambda name, reason: None
        self._expects: Callable[[], bool] = lambda: False
        self.num_wanted = len(handles)

    @property
    def handles(self) -> dict[str, ActorHandle[Any]]:
        """Everybody who lives: whoever is leaving takes new weights until it is gone."""
        return {name: member.handle for name, member in self._members.items()}

    @property
    def num_alive(self) -> int:
        """Members that are given work."""
        return sum(not member.is_leaving for member in self._members.values())

    @property
    def num_calls(self) -> int:
        """Under way on all members."""
        return sum(member.busy for member in self._members.values())

    @property
    def expects_more(self) -> bool:
        """Whether somebody is on the way, so that an empty pool is not the end."""
        return self._expects()

    def supervised(self, *, lost: Callable[[str, str], None], expects: Callable[[], bool]) -> None:
        """From now on `lost(name, reason)` hears of everybody who is left out, and `expects` says if somebody comes."""
        self._lost, self._expects = lost, expects

    def look_again(self) -> None:
        """Whoever waits for a member sees anew whether there is one, or will be."""
        self._changed.set()

    def add(self, name: str, handle: ActorHandle[Any]) -> None:
        """A started actor gets work from now on; names are never used twice."""
        self._members[name] = Member(name, handle)
        self.look_again()

    def busy_of(self, name: str) -> int:
        """Calls under way on a member; 0 when it is gone."""
        member = self._members.get(name)
        return member.busy if member else 0

    def give_no_more(self, name: str) -> None:
        """A member that will be retired gets no more work."""
        if name in self._members:
            self._members[name].is_leaving = True

    async def retire(self, name: str, *, deadline_s: float) -> int:
        """Give a member no more work, wait for what it has in hand, and end it.

        Returns:
            Calls that did not end in time: each fails now as if the actor had died, and is asked of another one.
        """
        self.give_no_more(name)
        member = self._members.get(name)
        if member is None:
            return 0
        with contextlib.suppress(TimeoutError):  # what is left then is handed over
            await asyncio.wait_for(member.idle.wait(), deadline_s)
        if self._members.pop(name, None) is None:
            return 0  # left out meanwhile
        self._end(member.handle)
        return member.busy

    def evict(self, name: str, *, reason: str) -> None:
        """Leave a member out for good, end its process, and say so."""
        member = self._members.pop(name, None)
        if member is None:
            return
        self._end(member.handle)
        self._last_death = f"{name}: {reason}"
        self._told(f"{name} is left out, {self.num_alive} of {self.num_wanted} {self.role} actors go on: {reason}")
        self._lost(name, reason)
        self.look_again()

    @asynccontextmanager
    async def lease(self) -> AsyncIterator[Member]:
        """The least busy member; waits for one as long as somebody is on the way, which has its own deadlines.

        Raises:
            EngineError: nobody is alive, and nobody comes.
        """
        while not self.num_alive:
            if not self.expects_more:
                raise EngineError(
                    f"no {self.role} actor is alive (the last: {self._last_death}); see Ray's logs, then resume the "
                    "run from its last checkpoint"
                )
            self._changed.clear()
            await self._changed.wait()
        member = min((m for m in self._members.values() if not m.is_leaving), key=lambda m: m.busy)
        member.busy += 1
        member.idle.clear()
        try:
            yield member
        finally:
            member.busy -= 1
            if not member.busy:
                member.idle.set()

    async def call(self, member: Member, ref: ray.ObjectRef, *, deadline_s: float) -> Any:
        """Await one small return value; giving up cancels the call inside the actor, so its requests are aborted.

        Raises:
            TimeoutError: nothing came in time; see `examine`.
            One of DEATHS: the member answers nothing more.
            ObjectLostError: what the call was given is gone.
            Whatever the call itself raised.
        """
        answer = await self._answer(ref, deadline_s=deadline_s)
        member.num_timeouts = 0
        return answer

    async def examine(self, member: Member, *, asked_s: float) -> bool:
        """After a call gave nothing in time: leave the member out if it is mute, or slow once too often.

        Args:
            member: it may have been left out meanwhile.
            asked_s: when the call began, in the event loop's time.

        Returns:
            Whether it is left out.
        """
        if asked_s >= member.last_timeout_s:
            member.num_timeouts += 1
            member.last_timeout_s = asyncio.get_running_loop().time()
        if member.name not in self._members:
            return True
        if member.examination is None:
            member.examination = asyncio.create_task(self._what_ails(member))
        # Shielded: whoever is cancelled leaves the answer to the others who wait for it.
        ailment = await asyncio.shield(member.examination)
        if not ailment and member.num_timeouts >= MAX_TIMEOUTS_IN_A_ROW:
            ailment = (
                f"it lives, but {member.num_timeouts} calls one after another outlived their deadlines and none ended "
                f"between; if it is only slow, raise {self.role}.group_deadline_s"
            )
        if ailment:
            self.evict(member.name, reason=ailment)
        return member.name not in self._members

    async def _what_ails(self, member: Member) -> str:
        """Why the member is as good as dead; empty when it answers."""
        try:
            await self._answer(member.handle.ping.remote(), deadline_s=self._alive_deadline_s)
        except TimeoutError:
            return f"mute: a call timed out, and it did not say within {self._alive_deadline_s:g} s that it lives"
        except DEATHS as error:
            return line(error)
        except EngineError as error:
            return f"its engine does not answer: {line(error)}"
        finally:
            member.examination = None
        return ""

    async def start(self, call: Callable[[ActorHandle[Any]], ray.ObjectRef], *, deadline_s: float) -> None:
        """Start every member at once.

        Raises:
            EngineError: one did not start within the deadline, or died before; names it.
        """
        starts = (self.start_one(m.name, call(m.handle), deadline_s=deadline_s) for m in self._members.values())
        await asyncio.gather(*starts)

    async def start_one(self, name: str, ref: ray.ObjectRef, *, deadline_s: float) -> None:
        """Await an actor's start, be it a member or not yet. Raises as `start`."""
        began_s = asyncio.get_running_loop().time()
        try:
            await self._answer(ref, deadline_s=deadline_s)
        except TimeoutError as error:
            raise EngineError(
                f"{name} did not start within {deadline_s:g} s; give it more CPUs, or raise "
                f"{self.role}.start_deadline_s"
            ) from error
        except _PROCESS_DEATHS as error:
            took_s = asyncio.get_running_loop().time() - began_s
            raise EngineError(
                f"{name} died {took_s:.0f} s into its start ({line(error)}); see Ray's logs, the kernel's "
                "too: memory is the usual cause"
            ) from error

    async def placed(self, name: str, handle: ActorHandle[Any], *, deadline_s: float) -> None:
        """Wait until Ray has found room for an actor that is being made. Raises EngineError: it did not, or it died."""
        try:
            await self._answer(handle.ping.remote(), deadline_s=deadline_s)
        except TimeoutError as error:
            raise EngineError(
                f"Ray found no room for {name} within {deadline_s:g} s: free CPUs or GPUs, add a node, or ask for "
                f"fewer {self.role} actors"
            ) from error
        except _PROCESS_DEATHS as error:
            raise EngineError(f"{name} died before its start ({line(error)}); see Ray's logs") from error

    def end(self, handle: ActorHandle[Any]) -> None:
        """End the process of an actor that is no member."""
        self._end(handle)

    def handed_over(self, count: int) -> tuple[ActorHandle[Any], ...]:
        """Up to `count` members that are given work, for another pool. The others end, and nobody is left here."""
        staying = [member for member in self._members.values() if not member.is_leaving][:count]
        for member in staying:
            del self._members[member.name]
        self.stop()
        return tuple(member.handle for member in staying)

    def stop(self) -> None:
        members, self._members = self._members, {}
        for member in members.values():
            self._end(member.handle)

    async def _answer(self, ref: ray.ObjectRef, *, deadline_s: float) -> Any:
        try:
            return await asyncio.wait_for(_as_coroutine(ref), deadline_s)
        except (TimeoutError, asyncio.CancelledError, GetTimeoutError):
            self._give_up(ref)
            raise
        except RayTaskError as error:
            # Ray's own message is the remote traceback; ours says what to do.
            raise (error.cause if isinstance(error.cause, RlaudioError | ObjectLostError) else error) from error


def line(error: BaseException) -> str:
    """An error's first line, with its type."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


async def _as_coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
