"""Mixtures: exact shares at every moment, no repetition within a part's epoch, resumed at exactly the same prompt."""

import json
import re
from collections import Counter
from itertools import islice

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaudio.config import DataSettings, MixtureSettings, PhaseSettings, RunConfig, SftConfig
from rlaudio.config_checks import run_problems, sft_problems
from rlaudio.data.mixture import Interleaver, MixturePart, MixtureSource
from rlaudio.data.run_data import RunData, prompt_source
from rlaudio.errors import DataError
from rlaudio.experience.issuing import Issuer
from rlaudio.experience.ledger import Ledger
from rlaudio.recipes.sft import draw_mixture, draw_rows
from rlaudio.types import Message, PromptRecord, TextPart

WEIGHTS = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=6)


def records(name: str, num: int) -> list[PromptRecord]:
    return [PromptRecord(f"{name}{i}", "x", (Message("user", (TextPart("hello"),)),)) for i in range(num)]


def parts(*weights: float, sizes: tuple[int, ...] = (7, 5, 3)) -> list[MixturePart]:
    return [
        MixturePart(name, weight, records(name, size))
        for name, weight, size in zip("abc", weights, sizes, strict=False)
    ]


def ids(source: MixtureSource, num: int) -> list[str]:
    return [source.next().id for _ in range(num)]


@given(WEIGHTS)
def test_every_part_has_its_share_at_every_moment_to_within_one_place(weights: list[float]) -> None:
    turns, total = Interleaver(weights), sum(weights)
    for num in range(1, 200):
        turns.next()
        assert sum(turns.counts) == num
        for weight, count in zip(weights, turns.counts, strict=True):
            assert abs(count - num * weight / total) < 1


def test_shares_that_divide_evenly_are_met_exactly_again_and_again() -> None:
    source = MixtureSource(parts(0.5, 0.3, 0.2), seed=1)
    for _ in range(20):
        assert Counter(name[0] for name in ids(source, 10)) == {"a": 5, "b": 3, "c": 2}


def test_a_part_deals_all_its_records_before_it_repeats_one() -> None:
    source = MixtureSource(parts(0.6, 0.3, 0.1), seed=1)
    drawn = ids(source, 400)
    for name, size in (("a", 7), ("b", 5), ("c", 3)):
        own = [one for one in drawn if one[0] == name]
        epochs = [tuple(own[start : start + size]) for start in range(0, len(own) - size + 1, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len(set(epochs)) > 1  # in a new order each time


def test_the_seed_shuffles_within_parts_and_moves_no_share() -> None:
    first, again, other = (MixtureSource(parts(0.6, 0.4), seed=seed) for seed in (1, 1, 2))
    drawn, same, differs = ids(first, 50), ids(again, 50), ids(other, 50)
    assert drawn == same != differs
    assert [name[0] for name in drawn] == [name[0] for name in differs]
    twins = MixtureSource(parts(0.5, 0.5, sizes=(9, 9)), seed=1)
    order = ids(twins, 18)
    assert [n[1:] for n in order if n[0] == "a"] != [n[1:] for n in order if n[0] == "b"]


@given(st.integers(0, 60), st.integers(0, 30))
def test_resumes_exactly_anywhere_and_deals_again_what_came_after_its_state(taken: int, more: int) -> None:
    """A crash comes after the last checkpoint: the ledger knows what was dealt since, and the stream catches up."""
    source, ledger = MixtureSource(parts(0.5, 0.3, 0.2), seed=3), Ledger.in_memory()
    issuer = Issuer(source, ledger)
    for _ in range(taken):
        issuer.next()
    state = json.loads(json.dumps(source.state()))
    for _ in range(more):
        issuer.next()
    resumed = MixtureSource(parts(0.5, 0.3, 0.2), seed=99)
    resumed.restore(state)
    Issuer(resumed, ledger)
    assert resumed.num_issued == taken + more
    assert ids(resumed, 40) == ids(source, 40)
    assert resumed.find("b1").id == "b1"


def test_the_state_does_not_grow_with_records_or_prompts() -> None:
    small, large = (MixtureSource(parts(0.5, 0.5, sizes=(size, size)), seed=1) for size in (10, 5_000))
    for source in (small, large):
        ids(source, 300)
    assert len(json.dumps(large.state())) < len(json.dumps(small.state())) + 50 < 1_500


def test_another_mixture_is_not_resumed_and_stays_as_it_was() -> None:
    state = MixtureSource(parts(0.5, 0.5), seed=1).state()
    for other in (
        parts(0.6, 0.4),
        parts(0.5, 0.5, sizes=(7, 4)),
        [MixturePart(f"{part.name}!", part.weight, part.records) for part in parts(0.5, 0.5)],
    ):
        source, untouched = MixtureSource(other, seed=2), MixtureSource(other, seed=2)
        with pytest.raises(DataError, match="changed since this state was taken"):
            source.restore(state)
        assert ids(source, 20) == ids(untouched, 20)
    plain = prompt_source(RunData(records("a", 3), {}), seed=1)
    with pytest.raises(DataError, match="changed"):
        MixtureSource(parts(1.0), seed=1).restore(plain.state())


@pytest.mark.parametrize("bad", [[], [1.0, 0.0], [1.0, -0.5], [float("inf")], [float("nan")]])
def test_weights_that_are_no_shares_are_refused(bad: list[float]) -> None:
    with pytest.raises(DataError, match="weights"):
        Interleaver(bad)


def test_parts_without_records_and_ids_of_two_parts_are_refused() -> None:
    with pytest.raises(DataError, match="part 'b' of the mixture has no records"):
        MixtureSource(parts(0.5, 0.5, sizes=(3, 0)), seed=1)
    with pytest.raises(DataError, match="one id"):
        MixtureSource([MixturePart(name, 0.5, records("a", 3)) for name in "xy"], seed=1)


def test_a_run_draws_a_mixture_where_one_is_configured() -> None:
    assert not isinstance(prompt_source(RunData(records("a", 3), {}), seed=1), MixtureSource)
    mixed = tuple(parts(0.75, 0.25))
    every = [record for part in mixed for record in part.records]
    source = prompt_source(RunData(every, {}, mixed), seed=1)
    assert Counter(source.next().id[0] for _ in range(40)) == {"a": 30, "b": 10}


def part(path: str, weight: float, name: str = "") -> MixtureSettings:
    return MixtureSettings(path, weight, name)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (DataSettings(clips="c"), "data.train is not set"),
        (DataSettings("t.jsonl", [part("a.jsonl", 1.0)], "c"), "data.train and data.mixture are both set"),
        (DataSettings("", [part("a", 0.5), part("b", 0.4)], "c"), "sum to 0.9.*as 0.555556, 0.444444 would"),
        (DataSettings("", [part("a", 1.5), part("b", -0.5)], "c"), r"data.mixture\[1\].weight is -0.5: .* above 0"),
        (DataSettings("", [part("a", 1.0), part("b", 0.0)], "c"), r"data.mixture\[1\].weight is 0"),
        (DataSettings("", [part("x/a.jsonl", 0.5), part("y/a.jsonl", 0.5)], "c"), "have one name, 'a'"),
    ],
)  # fmt: skip
def test_a_mixture_that_cannot_be_meant_is_refused_with_the_settings(data: DataSettings, said: str) -> None:
    told = [problem for problem in run_problems(RunConfig(data=data)) if "data." in problem]
    assert len(told) == 1 and re.search(said, told[0])


def test_thirds_may_be_written_with_six_digits() -> None:
    data = DataSettings("", [part(name, 0.333333) for name in "abc"], "c")
    assert not [problem for problem in run_problems(RunConfig(data=data)) if "data." in problem]


# ---- supervised rows ----------------------------------------------------------------------------------------------


def rows(name: str, num: int) -> pa.RecordBatch:
    lengths = [[0] * (1 + index % 5) for index in range(num)]
    named = [f"{name}{index}" for index in range(num)]
    return pa.RecordBatch.from_pydict({"prompt_id": named, "prompt_ids": lengths, "response_ids": lengths})


def test_every_step_of_a_supervised_mixture_has_both_kinds_by_weight_and_no_row_twice_in_its_epoch() -> None:
    parts = [(rows("a", 12), 0.7), (rows("t", 40), 0.3)]
    steps = list(islice(draw_mixture(parts, 8, seed=1), 30))
    counts = Counter({"a": 0, "t": 0})
    for step, batch in enumerate(steps, start=1):
        names = batch.column("prompt_id").to_pylist()
        assert len(names) == 8
        counts.update(name[0] for name in names)
        assert abs(counts["a"] - 0.7 * 8 * step) < 1
    drawn = [name for batch in steps for name in batch.column("prompt_id").to_pylist()]
    for kind, size in (("a", 12), ("t", 40)):
        own = [name for name in drawn if name[0] == kind]
        assert all(len(set(own[start : start + size])) == size for start in range(0, len(own) - size + 1, size))
    assert steps == list(islice(draw_mixture(parts, 8, seed=1), 30)) != list(islice(draw_mixture(parts, 8, seed=2), 30))


def test_one_file_is_drawn_as_ever() -> None:
    alone = rows("a", 12)
    drawn = islice(draw_mixture([(alone, 1.0)], 5, seed=4), 9)
    assert list(drawn) == [alone.take(chosen) for chosen in islice(draw_rows(alone, 5, seed=4), 9)]


def test_a_phase_has_one_file_or_a_mixture_whose_weights_sum() -> None:
    both = PhaseSettings(name="a", data="d", mixture=[part("x", 1.0)], steps=1)
    short = PhaseSettings(name="b", mixture=[part("x", 0.5), part("y", 0.4)], steps=1)
    good = PhaseSettings(name="c", mixture=[part("x", 0.5), part("y", 0.5)], steps=1)
    told = [one for one in sft_problems(SftConfig(phases=[both, short, good])) if "mixture" in one]
    assert [one.split(":")[0] for one in told] == [
        "phases[0].data and phases[0].mixture are both set",
        "the weights of phases[1].mixture sum to 0.9",
    ]
