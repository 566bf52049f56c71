"""Stand-ins for Ray's actor handles: they play and judge on a virtual clock, and fall ill as a schedule says.

They are called as handles are, `handle.play.options(num_returns=3).remote(...)`, and given to the real pools.
"""

import asyncio
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from ray.exceptions import RayActorError

from rlaudio.actors.rollout import PlayOrder
from rlaudio.data.records import record_sounds
from rlaudio.errors import EngineDeadError, EngineError, JudgeError, RolloutError, TurnTimeoutError, VerdictTimeoutError
from rlaudio.experience.spool import Spooled
from rlaudio.types import PromptRecord, WeightVersion

Ailment = Literal["mute", "stuck", "hung", "dead", "engine dead"]
"""mute: nothing is answered, a ping neither. stuck: only pings are. hung: the actor lives and says that its engine gave
nothing in time; its ping waits for the engine. dead, engine dead: every call fails at once."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A reference to what a call returns: the work is done when it is awaited."""

    work: Callable[[], Awaitable[Any]]

    def __await__(self) -> Generator[Any, None, Any]:
        return self.work().__await__()


@dataclass(frozen=True, slots=True)
class Method:
    call: Callable[..., Any]

    def options(self, *, num_returns: int) -> "Method":
        return self

    def remote(self, *arguments: Any) -> Any:
        return self.call(*arguments)


class FakeActor:
    """One actor of a `FakeRun`.

    Args:
        name: in its pool.
        run: passes time, counts calls, raises what is due.
        ailment: (calls that go well before, what it has from then on); None stays well, -1 calls is ill at its start.

    Attributes:
        ill: what it has now.
        noticed_s: when a caller first met what it has: an error, or a time-out. None: nobody did.
        served_s, timed_out: ends of calls in time, and (begin, end) of those that outlived their deadline.
    """

    def __init__(self, name: str, run: Any, *, ailment: tuple[int, Ailment] | None = None) -> None:
        self.name = name
        self._run = run
        self._falls_ill = ailment
        self.ill: Ailment | None = None
        self.version = run.first_version
        self.refused = False
        self.noticed_s: float | None = None
        self.served_s: list[float] = []
        self.timed_out: list[tuple[float, float]] = []
        self._num_calls = 0
        self._ended = asyncio.Event()

    @property
    def play(self) -> Method:
        def call(record: PromptRecord, order: PlayOrder) -> list[Any]:
            header = Answer(lambda: self._timed(self._play(record, order), RolloutError))
            return [header, order.group, f"of {order.group}"]

        return Method(call)

    @property
    def judge(self) -> Method:
        def call(record: PromptRecord, group: int) -> list[Any]:
            return [Answer(lambda: self._timed(self._judge(group), JudgeError)), group]

        return Method(call)

    @property
    def start(self) -> Method:
        return Method(lambda *version: Answer(self._start))

    @property
    def ping(self) -> Method:
        return Method(lambda: Answer(self._ping))

    def end(self) -> None:
        """What `ray.kill` does: every call, waiting or to come, fails."""
        self._ended.set()

    @property
    def ended(self) -> bool:
        return self._ended.is_set()

    async def take_weights(self, version: WeightVersion) -> bool:
        """Whether it did, in time."""
        await self._run.pass_time("broadcast")
        if self.ill in ("mute", "hung"):
            self._notice()
            await asyncio.sleep(self._run.sync_deadline_s)
            return False
        if self.ill in ("dead", "engine dead"):
            self._notice()
            return False
        if self._run.rng.random() < self._run.refuse_share:
            self.refused = True
            self._notice()
            return False
        self.version = version
        return True

    async def _play(self, record: PromptRecord, order: PlayOrder) -> Any:
        """Several turns, each sampled under what this engine holds at that moment."""
        run = self._run
        longest_s = run.delay_s * (20.0 if run.rng.random() < run.slow_share else 1.0)
        versions = []
        for _ in range(run.rng.randint(1, 3)):
            versions.append(self.version)
            await run.pass_time("play", longest_s=longest_s)
            await self._suffer(TurnTimeoutError("no reply within the turn's deadline"))
        run.maybe_fail(RolloutError("it does not fit the window"))
        run.played[order.group] = tuple(versions)
        heard = run.heard[order.group] = tuple(part.sha256 for _, part in record_sounds(record))
        return SimpleNamespace(clips=heard, shipped=tuple(name for name in heard if name not in order.shipped))

    async def _judge(self, group: int) -> Any:
        await self._run.pass_time("judge")
        await self._suffer(VerdictTimeoutError("no verdict within the deadline"))
        self._run.maybe_fail(JudgeError("too few siblings could be judged"))
        versions = sorted(self._run.played[group])
        self._run.sampled_by[group] = {self._run.chain[version.number] for version in versions}
        has_signal = self._run.rng.random() >= self._run.dull_share
        return SimpleNamespace(
            has_signal=has_signal, versions=(versions[0], versions[-1]), late="", spooled=Spooled(f"{group}", "", 1)
        )

    async def _start(self) -> None:
        """From the checkpoint, whatever the learner has made of it since."""
        await self._run.pass_time("start")
        if self._falls_ill is not None and self._falls_ill[0] < 0:
            self.ill = self._falls_ill[1]
            self._notice()
        await self._suffer(EngineError("the engine did not come up"))

    async def _ping(self) -> None:
        await asyncio.sleep(self._run.rng.uniform(0, self._run.alive_deadline_s / 2))
        if self.ill in ("mute", "hung"):
            await self._hang()
        await self._suffer(None)

    async def _timed(self, work: Awaitable[Any], expected: type[Exception]) -> Any:
        began_s = _now_s()
        self._num_calls += 1
        if self._falls_ill is not None and self._num_calls > self._falls_ill[0]:
            self.ill = self._falls_ill[1]
        try:
            answer = await work
        except asyncio.CancelledError:
            if _now_s() - began_s >= self._run.group_deadline_s:
                self.timed_out.append((began_s, _now_s()))
                self._notice()
            raise
        except (TurnTimeoutError, VerdictTimeoutError):
            self.timed_out.append((began_s, _now_s()))
            self._notice()
            raise
        except expected:
            raise
        except (RayActorError, EngineDeadError):
            self._notice()
            raise
        self.served_s.append(_now_s())
        return answer

    async def _suffer(self, late: Exception | None) -> None:
        """What its state does to a call; `late` is what a worker says of an engine that gives nothing."""
        if self._ended.is_set() or self.ill == "dead":
            raise RayActorError
        if self.ill == "engine dead":
            raise EngineDeadError("the engine is dead: out of memory")
        if late is None or self.ill is None:
            return
        if self.ill == "hung":
            await asyncio.sleep(self._run.turn_deadline_s)
            raise late
        await self._hang()

    async def _hang(self) -> None:
        await self._ended.wait()
        raise RayActorError

    def _notice(self) -> None:
        if self.noticed_s is None and (self.ill or self.refused):
            self.noticed_s = _now_s()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
