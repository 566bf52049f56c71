"""The generated reward: a judge model compares each reply with a reference response.

Step-Audio-R1.5 (arXiv:2604.25719): `g = R(H, y, y_ref; c)`, always relative, ordinal, `r = phi(g)`. Left open there, so
settings here: the number of levels, phi, the order of the two, whether the judge hears, where references come from.
"""

import asyncio
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlaudio.aio import all_or_first_error
from rlaudio.config import RewardSettings
from rlaudio.dialogue.users import as_said, heard_replies, played_turns, user_message
from rlaudio.errors import (
    AudioError,
    ConfigError,
    EngineDeadError,
    EngineError,
    JudgeError,
    VerdictError,
    VerdictTimeoutError,
)
from rlaudio.rewards.asking import Asking, JudgeModel, Question, ServedModel
from rlaudio.rewards.base import Failure, JudgeServices, Scores
from rlaudio.rewards.compared import Compared, compared_detail
from rlaudio.rewards.endpoint import EndpointModel
from rlaudio.rewards.judge_options import option_problems, service_problems
from rlaudio.rewards.levels import NUM_LEVELS, Scale
from rlaudio.rewards.prompt import Comparison, Said, whole_rubric
from rlaudio.rewards.references import PolicyReferences, RecordReferences, References, SiblingReferences
from rlaudio.rewards.serving import JudgeCounters, JudgeHealth, Places, SharedCache
from rlaudio.types import AudioPart, Dialogue, Judgment, PromptRecord, RubricItem, Turn

GROUP_SHARE = 0.8
"""Of the pool's patience with a group: what was judged by then is kept, where the pool would lose all of it."""


class GenerativeJudge:
    """Compares each played turn with a reference response.

    Turns without a reference get no judgment, for all siblings alike. A turn that never closed its reasoning, was cut
    off, or says nothing gets the worst value by rule: there is no reply to compare. A refusal is a reply.

    A verdict that cannot be read (unparsable, contradictory, cut off) is asked again at a temperature, and so are two
    orders that contradict each other; when `attempts` are used up the turn is a `Failure`, never a number.
    """

    def __init__(
        self,
        services: JudgeServices,
        *,
        name: str = "judge",
        unplayed: float = -1.0,
        levels: int = NUM_LEVELS,
        phi: Sequence[float] | None = None,
        orders: str = "both",
        max_disagreement: int | None = None,
        reference: str = "record",
        hears: str = "transcript",
        rubric: str = "whole",
        instructions: str | None = None,
        max_new_tokens: int | None = None,
        max_history: int = 1,
        max_section_tokens: int = 256,
        temperature: float = 0.0,
        attempts: int = 2,
        max_in_flight: int = 256,
        deadline_s: float = 60.0,
        group_deadline_s: float | None = None,
        cache_size: int = 20_000,
    ) -> None:
        """Args beyond the class's own account:

        unplayed: of a turn that the dialogue never reached.
        levels: of a verdict, 2 to 9; odd ones have "same" in the middle.
        phi: worth of each level, worst first; None rises evenly from -1 to 1.
        orders: "both" asks twice and takes `(phi(g) - phi(g_swap)) / 2`, which no liking for a place can move; one
            question each: "response_second", "response_first", or "random", drawn from the content.
        max_disagreement: levels that the two orders of one comparison may lie apart. Beyond it both are asked again,
            and the turn fails when `attempts` are used up. None: all but the most, so that "much better" in one order
            and "much worse" in the other is no judgment, where the mean would be 0. `levels - 1` takes every pair.
        reference: "record", "policy" (`rewards.reference_model` answers the same history) or "siblings".
        hears: "sound" gives the judge the user's sounds, "transcript" their words.
        rubric: how a turn's rubric enters. "whole": the judge reads all its items in one comparison. "items": one
            comparison per item; the value is their weighted mean, and a critical item that comes out a full level worse
            than the reference vetoes the rest (worst value). "off", or a turn without rubric: a plain preference.
        instructions: the system message; None: "judge" for a served model, a full explanation for an endpoint.
        max_new_tokens: of one answer; None: 32 for a served model, 1024 for an endpoint.
        max_history: how many earlier messages the judge reads, the one that is answered included.
        max_section_tokens: longer texts are cut.
        temperature, attempts: of the first answer; how often an unreadable one, or a contradictory pair, is asked for.
        max_in_flight: questions at the model at once; more wait here, and `JudgeHealth` says how many.
        deadline_s: of one verdict, from the moment it is asked for, retries included.
        group_deadline_s: of all verdicts of a group, waiting included: what came by then is kept. None: four fifths of
            `rewards.group_deadline_s`.

        Raises:
            ConfigError: no judge model is served, or an option makes no sense.
        """
        given = {option: value for option, value in locals().items() if option not in ("self", "services", "name")}
        if problems := list(option_problems(given)):
            raise ConfigError(f"reward source {name!r}: {'; '.join(problems)}")
        self.name, self.unplayed = name, unplayed
        self._scale = Scale(levels)
        self._phi = self._scale.even_phi if phi is None else tuple(float(value) for value in phi)
        self._max_apart = max(0, levels - 2) if max_disagreement is None else max_disagreement
        self._seed = services.seed
        self._orders, self._rubric = orders, rubric
        self._attempts, self._max_history = attempts, max_history
        self._deadline_s = deadline_s
        self._group_deadline_s = (
            GROUP_SHARE * services.group_deadline_s if group_deadline_s is None else group_deadline_s
        )
        self.counters = JudgeCounters()
        self._places = Places(max_in_flight)
        self._cache: SharedCache[int] = SharedCache(cache_size)
        asking = Asking(
            source=name,
            seed=services.seed,
            scale=self._scale,
            instructions=instructions,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            max_section_tokens=max_section_tokens,
            clips=services.require_clips(name) if hears == "sound" else None,
        )
        self._model = self._made_model(services, asking)
        self._references = _made_references(services, reference, source=name, cache_size=cache_size)

    def _made_model(self, services: JudgeServices, asking: Asking) -> JudgeModel:
        if services.endpoint is not None:
            return EndpointModel(services.endpoint, asking, retried=self._count_retry)
        engine, family = services.require(self.name)
        return ServedModel(engine, family, asking)

    def _count_retry(self) -> None:
        self.counters.retried += 1

    @classmethod
    def setting_problems(cls, options: Mapping[str, Any], rewards: RewardSettings) -> Iterator[str]:
        """What is wrong with `options`, each by its name first: known before anything starts."""
        yield from option_problems(options)
        yield from service_problems(options, rewards)

    @classmethod
    def record_problems(cls, record: PromptRecord, options: Mapping[str, Any]) -> Iterator[str]:
        """What this source, built with `options`, could not judge of a record: known before anything starts."""
        messages = [user_message(record, turn) for turn in played_turns(record)]
        if options.get("reference", "record") == "record":
            if not any(message.reference_response is not None for message in messages):
                yield (
                    "no turn has a `reference_response` to compare with: give one, set options.reference to policy or "
                    "siblings, or name the record's `sources` without this one"
                )
            for message in messages:
                if message.rubric and message.reference_response is None and options.get("rubric", "whole") != "off":
                    yield f"the rubric of {message.text[:40]!r} has no `reference_response` to be judged against"
        if options.get("hears", "transcript") == "transcript":
            for message in messages:
                if any(isinstance(part, AudioPart) and not part.transcript for part in message.parts):
                    yield "a sound has no `transcript` and this judge does not hear: add it, or set options.hears=sound"
                    break

    @property
    def health(self) -> JudgeHealth:
        """How it keeps up."""
        return self._places.health

    async def score(self, record: PromptRecord, dialogues: Sequence[Dialogue]) -> Scores:
        """Judge every played turn that has a reference; what has no verdict when the group's time is up has failed.

        Raises:
            VerdictTimeoutError: the model gave no answer in time on every turn.
            JudgeError: it failed on every turn.
            EngineDeadError: it will answer nothing more.
        """
        turns = [
            (dialogue, turn)
            for dialogue in dialogues
            for turn in dialogue.turns
            if self._references.has(record, dialogues, turn.index)
        ]
        if not turns:
            return Scores(())
        tasks = [asyncio.ensure_future(self._judge(record, dialogues, *which)) for which in turns]
        try:
            await asyncio.wait(tasks, timeout=self._group_deadline_s, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if errors := [error for task in tasks if not task.cancelled() and (error := task.exception())]:
            raise errors[0]
        results = [
            self._late(*which) if task.cancelled() else task.result() for task, which in zip(tasks, turns, strict=True)
        ]
        judgments = tuple(r for r in results if isinstance(r, Judgment))
        failures = tuple(r for r in results if isinstance(r, Failure))
        # What is ruled says nothing of the model: it may be mute all the same.
        if failures and all(f.late for f in failures) and all("ruled" in j.detail for j in judgments):
            raise VerdictTimeoutError(f"{self._failed(failures)}: {failures[0].reason}")
        if failures and not judgments and all(f.late or f.reason.startswith("engine: ") for f in failures):
            raise JudgeError(f"{self._failed(failures)}: {failures[0].reason}")
        return Scores(judgments, failures)

    def _failed(self, failures: Sequence[Failure]) -> str:
        return f"{self.name}: the judge failed on all {len(failures)} turns that it was asked about"

    def _late(self, dialogue: Dialogue, turn: Turn) -> Failure:
        health = self.health
        self.counters.timed_out += 1
        reason = (
            f"deadline: no verdict within the group's {self._group_deadline_s:g} s ({health.waiting} questions "
            f"wait, {health.asked} are at the judge): give the judge more, or raise rewards.group_deadline_s"
        )
        return self._failure(dialogue, turn, reason, late=True)

    def _failure(self, dialogue: Dialogue, turn: Turn, reason: str, *, late: bool = False) -> Failure:
        self.counters.failed += 1
        return Failure(self.name, dialogue.sibling, turn.index, reason, late)

    async def _judge(
        self, record: PromptRecord, dialogues: Sequence[Dialogue], dialogue: Dialogue, turn: Turn
    ) -> Judgment | Failure:
        if not turn.parsable or not turn.reply:
            return self._ruled(dialogue, turn, self._worth(0))
        try:
            reference = await asyncio.wait_for(
                self._references.text(record, dialogues, dialogue=dialogue, turn=turn), self._deadline_s
            )
            if not reference:
                return self._ruled(dialogue, turn, self._worth(self._scale.num_levels - 1))
            items = self._criteria(user_message(record, turn.index).rubric)
            history = said_before(record, dialogue, turn=turn.index)[-self._max_history :]
            compared = await all_or_first_error(
                self._agreed(Comparison(history, reference, turn.reply, item.text if item else None)) for item in items
            )
        except VerdictError as error:
            return self._failure(dialogue, turn, f"verdict: {error}")
        except EngineDeadError:
            raise  # no verdict of this engine will ever come: the pool must know
        except (EngineError, TimeoutError) as error:
            late = isinstance(error, TimeoutError)
            reason = f"no answer within {self._deadline_s:g} s" if late else str(error)
            return self._failure(dialogue, turn, f"engine: {reason}", late=late)
        except AudioError as error:
            return self._failure(dialogue, turn, f"sound: {error}")
        except JudgeError as error:
            return self._failure(dialogue, turn, f"reference: {error}")
        self.counters.turns += 1
        self.counters.ties += sum(one.value == 0.0 for one in compared)
        value, detail = self._value(items, compared), compared_detail(compared)
        return Judgment(self.name, dialogue.sibling, turn.index, value, detail)

    def _ruled(self, dialogue: Dialogue, turn: Turn, value: float) -> Judgment:
        self.counters.ruled += 1
        return Judgment(self.name, dialogue.sibling, turn.index, value, {"ruled": 1.0})

    def _criteria(self, rubric: Sequence[RubricItem]) -> Sequence[RubricItem | None]:
        """One entry per comparison."""
        if not rubric or self._rubric == "off":
            return (None,)
        return (RubricItem(whole_rubric(rubric)),) if self._rubric == "whole" else rubric

    def _worth(self, level: int) -> float:
        """The value of a response that comes out at `level` in every order that is asked."""
        if self._orders != "both":
            return self._phi[level]
        return (self._phi[level] - self._phi[self._scale.num_levels - 1 - level]) / 2

    def _value(self, items: Sequence[RubricItem | None], compared: Sequence[Compared]) -> float:
        a_level_worse = self._worth(self._scale.num_levels // 2 - 1)
        if any(item and item.critical and c.value <= a_level_worse for item, c in zip(items, compared, strict=True)):
            return self._worth(0)
        weights = [item.weight if item else 1.0 for item in items]
        total = sum(weights)
        if total <= 0:
            raise JudgeError(f"{self.name}: rubric weights {weights} have no positive sum: correct the record")
        return sum(w * c.value for w, c in zip(weights, compared, strict=True)) / total

    async def _agreed(self, comparison: Comparison) -> Compared:
        """A comparison whose orders do not contradict each other.

        Raises:
            VerdictError: they did, `attempts` times. And what `compare` raises.
        """
        for repeat in range(self._attempts):
            compared = await self.compare(comparison, repeat=repeat)
            if compared.apart <= self._max_apart:
                return compared
            self.counters.disagreed += 1
        raise VerdictError(
            f"the two orders contradict each other, {compared.apart} of at most {self._max_apart} levels apart: worth "
            f"{compared.as_first:g} as A and {compared.as_second:g} as B",
            kind="contradictory",
        )

    async def compare(self, comparison: Comparison, *, repeat: int = 0) -> Compared:
        """One comparison in the configured orders, however far apart they lie.

        Args:
            repeat: how often it was asked before: from 1 on answers are new ones, sampled.

        Raises:
            VerdictError: no readable verdict in `attempts` answers. EngineError: no answer. AudioError: a sound that
            the judge shall hear cannot be read.
        """
        orders = self._orders_of(comparison)
        verdicts = await all_or_first_error(
            self._verdict(self._model.question(comparison, response_first=order), repeat=repeat) for order in orders
        )
        levels = {
            order: self._scale.level(verdict, response_first=order)
            for order, verdict in zip(orders, verdicts, strict=True)
        }
        seen = {order: self._phi[level] for order, level in levels.items()}
        if len(orders) == 1:
            value = seen[orders[0]]
        else:
            # (phi(g) - phi(g_swap)) / 2, both as the judge said them of A: with the response as A, and the reference.
            value = (seen[True] - self._phi[verdicts[orders.index(False)]]) / 2
            self.counters.compared += 1
            self.counters.consistent += levels[True] == levels[False]
        apart = max(levels.values()) - min(levels.values())
        return Compared(value, as_second=seen.get(False), as_first=seen.get(True), apart=apart)

    def _orders_of(self, comparison: Comparison) -> tuple[bool, ...]:
        """Whether the response stands first, once per question."""
        if self._orders == "both":
            return (False, True)
        if self._orders != "random":
            return (self._orders == "response_first",)
        shown = repr((self._seed, comparison.history, comparison.reference, comparison.response, comparison.criterion))
        return (hashlib.blake2b(shown.encode(), digest_size=1).digest()[0] % 2 == 1,)

    async def _verdict(self, question: Question, *, repeat: int) -> int:
        key = question.key + b"again" * repeat
        self.counters.cached += self._cache.has(key)
        return await self._cache.get(key, lambda: self._judgment(question, first=repeat * self._attempts))

    async def _judgment(self, question: Question, *, first: int) -> int:
        async with self._places.take(self.counters):
            try:
                return await asyncio.wait_for(self._asked(question, first=first), self._deadline_s)
            except TimeoutError:
                self.counters.timed_out += 1
                raise

    async def _asked(self, question: Question, *, first: int) -> int:
        last = first + self._attempts - 1
        for attempt in range(first, last + 1):
            try:
                verdict = await question.ask(attempt)
            except VerdictError as error:
                self._count_answer()
                self.counters.unreadable += 1
                self.counters.contradictory += error.kind == "contradictory"
                self.counters.truncated += error.kind == "truncated"
                if attempt == last:
                    raise
            else:
                self._count_answer()
                return verdict
        raise AssertionError("attempts is at least 1")

    def _count_answer(self) -> None:
        self.counters.asked += 1
        self._places.answered()


def _made_references(services: JudgeServices, kind: str, *, source: str, cache_size: int) -> References:
    if kind == "policy":
        return PolicyReferences(services.require_policy(source), source=source, cache_size=cache_size)
    return SiblingReferences() if kind == "siblings" else RecordReferences()


def said_before(record: PromptRecord, dialogue: Dialogue, *, turn: int) -> tuple[Said, ...]:
    """What was said up to user message `turn`, that one included: the user's words, given replies and, as far
    as the user heard them, played replies.
    """
    record, replies = as_said(record, dialogue.turns), heard_replies(dialogue.turns)
    said: list[Said] = []
    index = -1
    for position, message in enumerate(record.messages):
        said.append(Said(message.role, message.text, message.parts))
        if message.role != "user":
            continue
        index += 1
        if index == turn:
            return tuple(said)
        following = record.messages[position + 1 : position + 2]
        if not following or following[0].role != "assistant":
            said.append(Said("assistant", replies.get(index, "")))
    raise JudgeError(f"record {record.id!r} has no user message {turn}: the dialogue was played from another record")
