"""The loop with fake parts, fault by fault: how each one ends or recovers. Whole schedules: test_loop_schedules.py."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from rlaudio.aio import first_error
from rlaudio.config import AlgorithmSettings
from rlaudio.errors import DivergenceError, EngineError, JudgeError, LearnerError, StarvedError, WeightSyncError
from rlaudio.experience.window import DIVERGED, NO_SIGNAL, TOO_OLD
from tests.fake_actors import Ailment
from tests.fake_run import FakeRun, Weights


def settings(
    *, staleness: int = 1, per_step: int = 3, minibatches: int = 1, divergences: int = 3, max_dropped: int = 500
) -> AlgorithmSettings:
    return AlgorithmSettings(
        max_staleness=staleness,
        groups_per_step=per_step,
        minibatches=minibatches,
        max_divergences_in_a_row=divergences,
        max_dropped_in_a_row=max_dropped,
    )


def raised(world: FakeRun, error: type[Exception], match: str = "") -> None:
    """The run ends with this error, and without waiting for anything longer than its work takes."""
    with pytest.raises(ExceptionGroup) as caught:
        world.run()
    leaf = first_error(caught.value)
    assert isinstance(leaf, error) and match in str(leaf)
    assert world.took_s < 100 * world.delay_s


@pytest.mark.parametrize(("algorithm", "dropped"), [("grpo", True), ("ppo", False)])
def test_groups_that_agree_are_left_out_only_where_siblings_are_compared(algorithm: str, dropped: bool) -> None:
    world = FakeRun(AlgorithmSettings(name=algorithm, groups_per_step=3), dull_share=0.5)
    world.run()
    assert (NO_SIGNAL in world.drops) is dropped


def test_staleness_one_overlaps_and_zero_does_not() -> None:
    """The bound is used: with slots for it, some groups are one version old, and the run takes less time."""
    runs = [FakeRun(settings(staleness=staleness), steps=20) for staleness in (0, 1)]
    for world in runs:
        world.run()
    assert max(runs[0].ages) == 0 and 1 in runs[1].ages
    assert runs[1].took_s < 0.8 * runs[0].took_s


def test_the_last_step_is_saved_and_its_weights_are_live_everywhere() -> None:
    world = FakeRun(settings(), steps=6, num_engines=3)
    world.run()
    assert world.saved == [4, 6]
    assert [version.number for version in world.live] == [6, 6, 6]


@pytest.mark.parametrize("staleness", [0, 1, 4])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("play", ZeroDivisionError("a bug in the player")),
        ("judge", AttributeError("a bug in a reward")),
        ("prepare", LearnerError("rank 1 died in prepare")),
        ("optimizer_step", LearnerError("rank 0 did not finish optimizer_step within 600 s")),
        ("broadcast", WeightSyncError("weights 0.1 reached no engine")),
        ("save", OSError(28, "No space left on device")),
    ],
)
def test_a_fault_that_nothing_can_mend_ends_the_run(staleness: int, call: str, error: Exception) -> None:
    """A failed publish at staleness 0 among them: nothing is admitted any more, and nobody waits for that."""
    raised(FakeRun(settings(staleness=staleness), fatal={call: (1, error)}), type(error), str(error))


AILMENTS: list[Ailment] = ["mute", "stuck", "hung", "dead", "engine dead"]


@pytest.mark.parametrize("staleness", [0, 4])
@pytest.mark.parametrize("ailment", AILMENTS)
@pytest.mark.parametrize("actor", ["rollout-0", "reward-1"])
def test_an_actor_that_gives_nothing_is_named_and_left_out_and_no_group_is_lost(
    staleness: int, ailment: Ailment, actor: str
) -> None:
    world = FakeRun(settings(staleness=staleness), steps=20, num_judges=2, ailments={actor: (4, ailment)})
    world.run()
    assert [told.split(" is left out")[0] for told in world.told] == [actor]
    # Until its third time-out a stuck actor is only slow, and what is slow costs a group.
    assert set(world.drops) <= ({"RolloutError", "JudgeError", "VerdictTimeoutError"} if ailment == "stuck" else set())
    assert len(world.trained) == 60


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("ailment", AILMENTS)
@pytest.mark.parametrize("role", ["rollout", "reward"])
def test_a_pool_that_is_lost_ends_the_run(staleness: int, ailment: Ailment, role: str) -> None:
    ailments = {f"{role}-{i}": (5, ailment) for i in range(2)}
    with pytest.raises(ExceptionGroup) as caught:
        FakeRun(settings(staleness=staleness), num_judges=2, ailments=ailments).run()
    assert isinstance(first_error(caught.value), EngineError | WeightSyncError)
    assert "actor is alive" in str(first_error(caught.value)) or "reached no engine" in str(first_error(caught.value))


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_publish_that_every_engine_refuses_ends_the_run(staleness: int) -> None:
    raised(FakeRun(settings(staleness=staleness), refuse_share=1.0), WeightSyncError, "0.1 reached no engine")


@pytest.mark.parametrize("staleness", [0, 1])
def test_engines_that_refuse_weights_are_left_out_and_the_run_goes_on(staleness: int) -> None:
    world = FakeRun(settings(staleness=staleness), num_engines=8, refuse_share=0.05, steps=12)
    world.run()
    assert 0 < len(world.told) < 8 and world.steps_done == list(range(12)) and not world.drops
    assert {version.number for version in world.live} == {12}


def test_slow_groups_cost_nobody_its_place() -> None:
    """Now and then a group outlives its deadline; others end on the same engine meanwhile."""
    world = FakeRun(settings(staleness=4), slow_share=0.15, steps=60)
    world.run()
    assert sum(len(actor.timed_out) for actor in world.actors.values()) > 10 and not world.told


def test_nothing_but_failures_ends_the_run() -> None:
    raised(FakeRun(settings(max_dropped=20), fail_share=2.0), StarvedError, "20 groups in a row")


def test_nothing_but_groups_without_signal_ends_the_run() -> None:
    raised(FakeRun(settings(max_dropped=20), dull_share=1.0), StarvedError, NO_SIGNAL)


def test_a_judgment_that_fails_now_and_then_costs_its_group_only() -> None:
    world = FakeRun(settings(), fail_share=0.4, steps=10)
    world.run()
    assert JudgeError.__name__ in world.drops and len(world.trained) == 30


class DivergesWhere(FakeRun):
    """Diverges in the calls whose numbers `where` picks, counted from 0 over all calls of that name."""

    forward: Callable[[int], bool] = staticmethod(lambda number: False)
    optimizer: Callable[[int], bool] = staticmethod(lambda number: False)

    async def forward_backward(self, part: int) -> None:
        await super().forward_backward(part)
        if self.forward(self.calls["forward_backward"] - 1):
            raise DivergenceError("loss is nan")

    async def optimizer_step(self) -> Weights:
        if self.optimizer(self.calls["optimizer_step"]):
            self.calls["optimizer_step"] += 1
            raise DivergenceError("gradient norm is inf")
        return await super().optimizer_step()


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("place", ["forward", "optimizer"])
def test_a_batch_that_diverges_is_dropped_and_its_step_taken_with_the_next(staleness: int, place: str) -> None:
    world = DivergesWhere(settings(staleness=staleness))
    setattr(world, place, lambda number: number in (2, 3))
    world.run()
    assert world.drops == [DIVERGED] * 6
    assert world.steps_done == [0, 1, 2, 3, 4, 5] and world.version.number == 6
    assert not set(world.taken[6:12]) & set(world.trained)


def test_so_many_divergences_in_a_row_end_the_run() -> None:
    world = DivergesWhere(settings(divergences=3))
    world.forward = lambda number: number >= 2
    raised(world, DivergenceError, "3 batches in a row, the last: loss is nan")
    assert world.steps_done == [0, 1]


def test_divergences_with_a_good_step_between_do_not_end_the_run() -> None:
    world = DivergesWhere(settings(divergences=2))
    world.forward = lambda number: number % 2 == 1
    world.run()
    assert len(world.steps_done) == 6 and world.drops == [DIVERGED] * 15


@pytest.mark.parametrize("staleness", [0, 1])
def test_what_was_learned_before_a_batch_diverged_reaches_the_engines(staleness: int) -> None:
    """The first minibatch moved the weights, the second diverged: the first one's weights are the last good ones."""
    world = DivergesWhere(settings(staleness=staleness, minibatches=2), steps=3)
    world.forward = lambda number: number == 3
    world.run()
    assert world.version.number == 3 * 2 + 1 and {version.number for version in world.live} == {7}
    assert max(world.ages) <= staleness * 2
    assert world.drops == [DIVERGED] * 3


def stragglers(*, staleness: int, look_ahead: int, too_old: str = "wait", slow: Sequence[int] = (4, 9)) -> FakeRun:
    """Groups of one-second turns; those in `slow` take a minute."""

    class Stragglers(FakeRun):
        async def play(self, prompt, *, group):  # type: ignore[no-untyped-def]
            played = await super().play(prompt, group=group)
            await asyncio.sleep(60.0 if group in slow else 0.0)
            return played

    algorithm = AlgorithmSettings(
        max_staleness=staleness, groups_per_step=2, look_ahead=look_ahead, too_old=too_old, minibatches=1
    )
    world = Stragglers(algorithm, steps=12)
    world.run()
    return world


def test_look_ahead_takes_what_is_ready_behind_a_slow_group() -> None:
    in_order, ahead = (stragglers(staleness=2, look_ahead=n) for n in (0, 4))
    assert in_order.taken == sorted(in_order.taken) and ahead.taken != sorted(ahead.taken)
    assert max(in_order.ages) <= 2 < max(ahead.ages) <= 2 + 4 / 2
    assert {window.bound for window in ahead.windows} == {4}
    assert sum(group > 4 for group in ahead.taken[: ahead.taken.index(4)]) == 4, "as often as allowed"


def test_too_old_groups_can_be_dropped_instead() -> None:
    world = stragglers(staleness=2, look_ahead=4, too_old="drop")
    assert set(world.drops) == {TOO_OLD} and max(world.ages) <= 2
    assert {4, 9} & set(world.taken) == set()


def test_at_staleness_zero_look_ahead_changes_nothing() -> None:
    world = stragglers(staleness=0, look_ahead=4)
    assert world.taken == sorted(world.taken) and max(world.ages) == 0
