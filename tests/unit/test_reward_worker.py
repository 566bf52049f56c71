"""The reward actor's own logic: who is kept, what has signal, what the shuffled control deals out, what is reported."""

import dataclasses
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rlaudio.actors.reward import RewardWorker
from rlaudio.config import AlgorithmSettings, OnlySettings, RunConfig, ScheduleSettings, SourceSettings
from rlaudio.errors import ConfigError, JudgeError, VerdictTimeoutError
from rlaudio.experience.builder import played_batch
from rlaudio.rewards.base import Failure, JudgeServices, Scores
from rlaudio.rewards.generative import GenerativeJudge, JudgeCounters
from rlaudio.types import Dialogue, Judgment, Message, PromptRecord, TextPart, Turn, VersionSpan, WeightVersion

RECORD = PromptRecord(
    "p", "sums", (Message("user", (TextPart("a"),), answer="one"), Message("user", (TextPart("b"),), answer="two"))
)


class Flaky:
    """Fails on the siblings it is told to; says 1 otherwise."""

    unplayed = 0.0

    def __init__(
        self, services: JudgeServices, *, name: str, fails_on: list[int], value: float = 1.0, signs: str = ""
    ) -> None:
        self.name = name
        self._fails_on = fails_on
        self._value = value
        self._signs = signs or name

    async def score(self, record: PromptRecord, dialogues: Sequence[Dialogue]) -> Scores:
        return Scores(
            tuple(
                Judgment(
                    self._signs,
                    d.sibling,
                    t.index,
                    self._value if d.sibling in self._fails_on else 1.0,
                    {"correct": 1.0},
                )
                for d in dialogues
                for t in d.turns
            ),
            tuple(Failure(self.name, d.sibling, 0, "unreadable") for d in dialogues if d.sibling in self._fails_on)
            if self._value == 1.0
            else (),
        )


def turn(index: int, reply: str, *, version: int = 0) -> Turn:
    ids = np.arange(3, dtype=np.int32)
    spans = (VersionSpan(WeightVersion(0, version), 0, 3),)
    return Turn(index, ids, ids, ids.astype(np.float32), spans, (), "because", reply, "stop")


def group(*replies: tuple[str, ...]) -> list[Dialogue]:
    return [
        Dialogue("p", 7, sibling, tuple(turn(i, reply, version=sibling) for i, reply in enumerate(said)))
        for sibling, said in enumerate(replies)
    ]


async def worker(*sources: SourceSettings, **rewards: Any) -> RewardWorker:
    config = RunConfig()
    config.rewards = dataclasses.replace(config.rewards, sources=list(sources), **rewards)
    made = RewardWorker(config, on_gpu=False)
    await made.start()
    return made


VERIFIED = SourceSettings("verified", "rlaudio.rewards.verified:VerifiedReward")


def flaky(*siblings: int) -> SourceSettings:
    return SourceSettings("flaky", "tests.unit.test_reward_worker:Flaky", options={"fails_on": list(siblings)})


async def test_rewards_versions_and_counts_reach_the_header() -> None:
    batch = played_batch(RECORD, group(("one", "two"), ("one", "six"), ("six", "six")))
    header, experience = await (await worker(VERIFIED)).judge(RECORD, batch)
    assert header.has_signal
    assert header.versions == (WeightVersion(0, 0), WeightVersion(0, 2))
    assert experience.num_rows == 6
    assert (header.stats.num_correct, header.stats.num_parsable, header.stats.num_turns) == (3, 6, 6)
    assert header.stats.rewards == pytest.approx({"verified": 0.2 + 0.8 * 0.5})
    rewards = dict(
        zip(
            zip(experience.column("sibling").to_pylist(), experience.column("turn").to_pylist(), strict=True),
            experience.column("reward").to_pylist(),
            strict=True,
        )
    )
    assert rewards[0, 0] > 0 > rewards[2, 0]
    assert rewards[0, 1] > rewards[1, 1] == pytest.approx(rewards[2, 1])


async def test_equal_siblings_have_no_signal() -> None:
    header, _ = await (await worker(VERIFIED)).judge(
        RECORD, played_batch(RECORD, group(("one", "two"), ("one", "two")))
    )
    assert not header.has_signal


async def test_a_sibling_that_could_not_be_judged_leaves_and_the_group_survives() -> None:
    batch = played_batch(RECORD, group(("one", "two"), ("six", "two"), ("one", "six"), ("one", "two")))
    header, experience = await (await worker(VERIFIED, flaky(1))).judge(RECORD, batch)
    assert set(experience.column("sibling").to_pylist()) == {0, 2, 3}
    assert (header.stats.failures, header.stats.failure) == ({"flaky": 1}, "flaky: unreadable")
    assert header.stats.num_dialogues == 3


async def test_too_few_survivors_is_an_error_that_says_why() -> None:
    batch = played_batch(RECORD, group(("one", "two"), ("six", "two"), ("one", "six"), ("one", "two")))
    with pytest.raises(JudgeError, match="'p': 1 of 4 siblings could be judged, 2 are needed.*unreadable"):
        await (await worker(VERIFIED, flaky(0, 1, 2))).judge(RECORD, batch)


async def test_an_algorithm_with_a_critic_learns_from_one_dialogue_and_its_own_reward() -> None:
    made = await worker(VERIFIED)
    made._config.algorithm = AlgorithmSettings(name="ppo", group_size=1)
    _, experience = await made.judge(RECORD, played_batch(RECORD, group(("one", "six"))))
    assert experience.column("reward").to_pylist() == pytest.approx([1.0, 0.2])
    with pytest.raises(JudgeError, match="1 of 1 siblings could be judged, 2 are needed"):
        await (await worker(VERIFIED)).judge(RECORD, played_batch(RECORD, group(("one", "six"))))


async def test_the_shuffled_control_keeps_the_values_and_loses_their_owners() -> None:
    dialogues = group(*[("one", "two")] * 4, *[("six", "six")] * 4)
    straight, right = await (await worker(VERIFIED)).judge(RECORD, played_batch(RECORD, dialogues))
    _, dealt = await (await worker(VERIFIED, shuffle=True)).judge(RECORD, played_batch(RECORD, dialogues))
    for index in (0, 1):
        mask = np.array(right.column("turn").to_pylist()) == index
        before, after = (np.array(b.column("reward").to_pylist())[mask] for b in (right, dealt))
        assert sorted(before) == pytest.approx(sorted(after))
    assert right.column("reward").to_pylist() != dealt.column("reward").to_pylist()
    assert straight.has_signal


async def test_the_shuffled_control_pays_nobody_for_ending_early() -> None:
    """Over many deals the sibling that stopped after one turn earns what the others earn: nothing of its own."""
    made = await worker(VERIFIED, shuffle=True)
    early, others = [], []
    for number in range(120):
        dialogues = [dataclasses.replace(d, group=number) for d in group(("one",), *[("one", "two")] * 3)]
        _, experience = await made.judge(RECORD, played_batch(RECORD, dialogues))
        siblings, rewards = (np.array(experience.column(name).to_pylist()) for name in ("sibling", "reward"))
        assert rewards.sum() == pytest.approx(0.0, abs=1e-5)
        early.append(rewards[siblings == 0].sum())
        others.append(rewards[siblings != 0].sum() / 3)
    # One sibling of four has -0.75, the others 0.25 each; undealt, the early one would have -0.75 always.
    assert abs(np.mean(early)) < 0.15
    assert abs(np.mean(others)) < 0.15


async def test_a_turn_is_counted_correct_once_and_only_among_those_that_were_kept() -> None:
    batch = played_batch(RECORD, group(("one", "two"), ("six", "two"), ("one", "six"), ("one", "two")))
    header, _ = await (await worker(VERIFIED, flaky(1))).judge(RECORD, batch)
    # Every source must agree: flaky finds all six turns of the kept siblings correct, the verifier five.
    assert (header.stats.num_correct, header.stats.num_turns) == (5, 6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
async def test_a_value_that_is_no_number_is_a_failure_of_its_source(value: float) -> None:
    source = SourceSettings("mine", "tests.unit.test_reward_worker:Flaky", options={"fails_on": [2], "value": value})
    batch = played_batch(RECORD, group(("one", "two"), ("six", "two"), ("one", "six"), ("one", "two")))
    header, experience = await (await worker(VERIFIED, source)).judge(RECORD, batch)
    assert set(experience.column("sibling").to_pylist()) == {0, 1, 3}
    assert header.stats.failures == {"mine": 2}
    assert f"source 'mine' gave {value}, which is not finite" in header.stats.failure
    assert np.isfinite(experience.column("reward").to_numpy()).all()


async def test_a_judgment_in_another_name_is_an_error_that_says_so() -> None:
    source = SourceSettings("mine", "tests.unit.test_reward_worker:Flaky", options={"fails_on": [], "signs": "yours"})
    with pytest.raises(ConfigError, match="in the name of 'yours', the configured ones are mine, verified"):
        await (await worker(VERIFIED, source)).judge(RECORD, played_batch(RECORD, group(("one", "two"), ("a", "b"))))


async def test_an_evaluated_dialogue_is_reported_turn_by_turn() -> None:
    batch = played_batch(RECORD, [Dialogue("p", 0, 0, (turn(0, "one"),))])
    result = await (await worker(VERIFIED)).evaluate(RECORD, batch)
    assert result.num_turns_asked == 2
    assert result.accuracy == 0.5
    assert [(t.correct, t.reply, t.answer) for t in result.turns] == [(True, "one", "one")]


async def test_a_record_is_judged_by_the_sources_it_names_alone() -> None:
    made = await worker(VERIFIED, flaky(0, 1))
    batch = played_batch(RECORD, group(("one", "two"), ("six", "two")))
    header, _ = await made.judge(dataclasses.replace(RECORD, sources=("verified",)), batch)
    assert (set(header.stats.rewards), header.stats.failures) == ({"verified"}, {})
    with pytest.raises(JudgeError):
        await made.judge(RECORD, batch)


class Judging(GenerativeJudge):
    """Says 1 of every turn and counts an answer for each; does not answer when told to be `silent`."""

    def __init__(self, services: JudgeServices, *, name: str, silent: bool = False) -> None:
        self.name, self.unplayed, self.silent = name, 0.0, silent
        self.counters = JudgeCounters()

    async def score(self, record: PromptRecord, dialogues: Sequence[Dialogue]) -> Scores:
        if self.silent:
            raise JudgeError("no answer within 60 s")
        turns = [(d.sibling, t.index) for d in dialogues for t in d.turns]
        self.counters.asked += len(turns)
        return Scores(tuple(Judgment(self.name, *turn, 1.0) for turn in turns))


async def test_what_the_judge_did_is_told_once_and_not_what_it_did_for_evaluations() -> None:
    made = await worker(VERIFIED, SourceSettings("judge", "tests.unit.test_reward_worker:Judging"))
    batch = played_batch(RECORD, group(("one", "two"), ("six", "two")))
    for _ in range(2):
        await made.evaluate(RECORD, played_batch(RECORD, group(("one", "two"))))
        header, _ = await made.judge(RECORD, batch)
        assert header.stats.judge_counts["asked"] == 4


async def test_a_source_that_fails_leaves_its_part_of_an_evaluation_out_and_its_reason_in() -> None:
    silent = SourceSettings("judge", "tests.unit.test_reward_worker:Judging", options={"silent": True})
    made = await worker(VERIFIED, silent)
    batch = played_batch(RECORD, group(("one", "six")))
    result = await made.evaluate(RECORD, batch)
    assert [t.reward for t in result.turns] == pytest.approx([1.0, 0.2])
    assert result.problem == "judge: no answer within 60 s (and 1 more)"
    with pytest.raises(JudgeError, match="no answer"):
        await made.judge(RECORD, batch)


class Late(Judging):
    """Gives nothing in time, on every turn or on those it is told."""

    def __init__(self, services: JudgeServices, *, name: str, on: list[int] | None = None) -> None:
        super().__init__(services, name=name)
        self._on = on

    async def score(self, record: PromptRecord, dialogues: Sequence[Dialogue]) -> Scores:
        if self._on is None:
            raise VerdictTimeoutError("mine: no answer within 60 s")
        scores = await super().score(record, dialogues)
        late = tuple(Failure(self.name, j.sibling, j.turn, "no time", True) for j in scores.judgments)
        return Scores(
            tuple(j for j in scores.judgments if j.sibling not in self._on),
            tuple(failure for failure in late if failure.sibling in self._on),
        )


def late(on: list[int] | None = None, **settings: Any) -> SourceSettings:
    return SourceSettings("mine", "tests.unit.test_reward_worker:Late", options={"on": on}, **settings)


async def test_too_few_siblings_for_lack_of_time_is_a_time_out_and_for_other_reasons_is_not() -> None:
    batch = played_batch(RECORD, group(("one", "two"), ("one", "two"), ("six", "two")))
    with pytest.raises(VerdictTimeoutError, match="1 of 3 siblings could be judged, 2 are needed.*no time"):
        await (await worker(VERIFIED, late(on=[0, 1]))).judge(RECORD, batch)
    with pytest.raises(JudgeError) as caught:
        await (await worker(VERIFIED, flaky(0, 1))).judge(RECORD, batch)
    assert not isinstance(caught.value, VerdictTimeoutError)
    header, _ = await (await worker(VERIFIED, late(on=[0]))).judge(RECORD, batch)
    assert (header.stats.num_dialogues, header.late) == (2, "")


async def test_an_evaluation_whose_judge_gives_nothing_in_time_says_so_and_has_the_rest() -> None:
    with pytest.raises(VerdictTimeoutError, match="no answer within 60 s") as caught:
        await (await worker(VERIFIED, late())).evaluate(RECORD, played_batch(RECORD, group(("one", "six"))))
    told = pickle.loads(pickle.dumps(caught.value))
    assert [t.reward for t in told.partial.turns] == pytest.approx([1.0, 0.2])
    assert told.partial.problem == "mine: mine: no answer within 60 s (and 1 more)"


async def test_a_source_of_weight_0_is_measured_and_changes_nothing_that_is_trained_on() -> None:
    batch = played_batch(RECORD, group(("one", "two"), ("one", "six"), ("six",), ("one", "one")))
    alone, rows = await (await worker(VERIFIED)).judge(RECORD, batch)
    measured = counting(weight=0.0)
    header, with_it = await (await worker(VERIFIED, measured)).judge(RECORD, batch)
    assert with_it.column("reward").equals(rows.column("reward"))
    assert header.stats.rewards["counting"] == pytest.approx(3 / 7) and header.stats.shares["counting"] == 0
    assert header.stats.rewards["verified"] == alone.stats.rewards["verified"]
    spoken = [{p["source"] for p in parts} for parts in with_it.column("rewards").to_pylist()]
    assert spoken == [{"verified", "counting"}] * 7
    result = await (await worker(VERIFIED, measured)).evaluate(RECORD, played_batch(RECORD, group(("one", "two"))))
    assert [[p.source for p in t.breakdown] for t in result.turns] == [["verified", "counting"]] * 2
    assert [t.reward for t in result.turns] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("made", [flaky(0, 1, 2, 3), late(on=[0, 1, 2, 3]), late()], ids=["bad", "some late", "late"])
async def test_what_a_measured_source_fails_at_is_counted_and_costs_nobody(made: SourceSettings) -> None:
    batch = played_batch(RECORD, group(("one", "two"), ("one", "six"), ("six",), ("one", "one")))
    alone, rows = await (await worker(VERIFIED)).judge(RECORD, batch)
    header, with_it = await (await worker(VERIFIED, dataclasses.replace(made, weight=0.0))).judge(RECORD, batch)
    assert with_it.column("reward").equals(rows.column("reward")) and header.has_signal
    assert header.stats.num_dialogues == alone.stats.num_dialogues == 4
    assert header.stats.failures[made.name] >= 4 and made.name in header.stats.failure
    assert header.late == ("mine: no answer within 60 s" if made.options == {"on": None} else "")


class Counting:
    """Says its step of the run's weights is irrelevant to it: 1 for even siblings, 0 for odd ones; knows no scope."""

    unplayed = -1.0

    def __init__(self, services: JudgeServices, *, name: str, fails: bool = False) -> None:
        self.name, self.fails = name, fails

    async def score(self, record: PromptRecord, dialogues: Sequence[Dialogue]) -> Scores:
        places = [(d.sibling, t.index) for d in dialogues for t in d.turns]
        if self.fails:
            return Scores((), tuple(Failure(self.name, *place, "unreadable") for place in places))
        return Scores(tuple(Judgment(self.name, *place, float(place[0] % 2 == 0), {"seen": 1.0}) for place in places))


def counting(name: str = "counting", **settings: Any) -> SourceSettings:
    return SourceSettings(name, "tests.unit.test_reward_worker:Counting", **settings)


async def test_the_breakdown_of_every_turn_lies_in_the_rows_and_adds_up() -> None:
    batch = played_batch(RECORD, group(("one", "two"), ("one", "six"), ("six",)))
    header, experience = await (await worker(VERIFIED, counting(weight=0.5))).judge(RECORD, batch)
    for reward, parts in zip(
        experience.column("reward").to_pylist(), experience.column("rewards").to_pylist(), strict=True
    ):
        assert sum(part["share"] for part in parts) == pytest.approx(reward, abs=1e-6)
    rows = list(zip(*(experience.column(n).to_pylist() for n in ("sibling", "turn", "rewards")), strict=True))
    (cut,) = [parts for sibling, turn, parts in rows if (sibling, turn) == (2, 0)]
    told = [(p["source"], p["turn"], pytest.approx(p["value"])) for p in cut]
    assert told == [("verified", 0, 0.2), ("counting", 0, 1.0), ("verified", 1, 0.0), ("counting", 1, -1.0)]
    assert dict(cut[0]["detail"]) == {"correct": 0.0, "format": 1.0}
    assert header.stats.details["counting/seen"] == 1.0
    assert header.stats.num_judged == {"verified": 5, "counting": 5}
    assert header.stats.shares["counting"] > 0
    assert header.stats.style["words"] == 1.0


async def test_a_source_outside_its_scope_is_not_asked_and_its_failures_cost_nobody() -> None:
    elsewhere = counting("far", options={"fails": True}, only=OnlySettings(tasks=["other"]))
    later = counting("later", only=OnlySettings(needs=["reference_response"]))
    record = dataclasses.replace(
        RECORD, messages=(RECORD.messages[0], dataclasses.replace(RECORD.messages[1], reference_response="two"))
    )
    batch = played_batch(record, group(("one", "two"), ("one", "two")))
    header, experience = await (await worker(VERIFIED, elsewhere, later)).judge(record, batch)
    assert header.stats.failures == {}
    sources = [[p["source"] for p in parts] for parts in experience.column("rewards").to_pylist()]
    assert sources == [["verified"], ["verified", "later"]] * 2
    assert experience.column("reward").to_pylist() == pytest.approx([0.0, 0.5, 0.0, -0.5])
    # It fails in the first turn, and was configured for the second.
    first_fails = dataclasses.replace(flaky(0, 1), only=OnlySettings(needs=["reference_response"]))
    header, _ = await (await worker(VERIFIED, first_fails)).judge(record, batch)
    assert header.stats.failures == {} and header.stats.num_judged["flaky"] == 2
    alone = played_batch(record, group(("one", "x")))
    result = await (await worker(VERIFIED, elsewhere, later)).evaluate(record, alone)
    assert [[part.source for part in t.breakdown] for t in result.turns] == [["verified"], ["verified", "later"]]
    assert result.problem == ""


async def test_a_schedule_follows_the_weights_that_played_and_not_the_order_of_calls() -> None:
    fading = counting(weight=0.0, schedule=ScheduleSettings("linear", start=1.0, end=10))
    made = await worker(VERIFIED, fading)

    async def spread(version: int) -> float:
        spans = (VersionSpan(WeightVersion(0, version), 0, 3),)
        dialogues = [
            dataclasses.replace(d, turns=tuple(dataclasses.replace(t, version_spans=spans) for t in d.turns))
            for d in group(("one", "two"), ("one", "two"))
        ]
        header, experience = await made.judge(RECORD, played_batch(RECORD, dialogues))
        assert header.stats.weights == {"counting": pytest.approx(1 - version / 10)}
        return float(np.ptp(experience.column("reward").to_numpy()))

    assert [await spread(v) for v in (9, 0, 5, 10)] == pytest.approx([0.1, 1.0, 0.5, 0.0], abs=1e-6)
    # Held-out rewards are of the final weight: two evaluations must compare.
    result = await made.evaluate(RECORD, played_batch(RECORD, group(("one", "two"))))
    assert [t.reward for t in result.turns] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("how", "spread"), [("", 1.0), ("centre", 1.0), ("std", 2.0), ("none", 1.0)])
async def test_normalising_is_a_setting_of_each_source(how: str, spread: float) -> None:
    batch = played_batch(RECORD, group(("one", "two"), ("one", "two")))
    _, experience = await (await worker(counting(normalise=how))).judge(RECORD, batch)
    rewards = experience.column("reward").to_numpy()
    assert np.ptp(rewards) == pytest.approx(spread)
    assert rewards.sum() == pytest.approx(2.0 if how == "none" else 0.0)


async def test_grading_says_of_each_sibling_by_itself_who_is_right() -> None:
    """As `evaluate` says of one dialogue; a source's failure is told of its sibling alone."""
    made = await worker(VERIFIED, flaky(1))
    dialogues = group(("one", "two"), ("one", "three"), ("four",))
    results = await made.grade(RECORD, played_batch(RECORD, dialogues))
    assert [[turn.correct for turn in result.turns] for result in results] == [[True, True], [True, False], [False]]
    assert [bool(result.problem) for result in results] == [False, True, False]
    alone = [await made.evaluate(RECORD, played_batch(RECORD, [one])) for one in dialogues]
    assert alone == results
