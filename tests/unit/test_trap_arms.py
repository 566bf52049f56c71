"""The trap experiment without its training: what is measured, how policies are paired, what the intervals may say."""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlaudio.audio.store import ClipStore
from rlaudio.cli.pipeline import pipeline_command
from rlaudio.errors import DataError, RunFolderError
from rlaudio.evals.summary import DialogueResult, RewardPart, TurnResult, write_evaluation
from rlaudio.recipes.kept import Kept
from rlaudio.recipes.pipeline import read_pipeline
from rlaudio.runs import create_run, open_run
from tests.unit.evaluations import dialogue, evaluation, turn
from tests.unit.test_pipeline import loaded_once

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))
sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "verifiable_reward_trap"))

from trap_arms import experiment
from trap_arms.measures import MEASURES, Change, difference, level, measure, require_same_prompts
from trap_arms.page import Seen, write_page
from trap_arms.verdict import ARMS, CONTRASTS, Outcome, Results, claims, compare, headline

EXAMPLE = Path(experiment.__file__).parents[1]


def said(index: int, reply: str, *, liked: float | None = None, correct: bool = True) -> TurnResult:
    parts = () if liked is None else (RewardPart("judge", liked, 1.0),)
    return turn(index, reply=reply, correct=correct, breakdown=parts)


# ---- measures -----------------------------------------------------------------------------------------------------


def test_a_turn_is_measured_and_what_was_not_reached_is_wrong() -> None:
    played = dialogue("p", said(0, "sure it is um seven", liked=0.5), said(1, "five", liked=-1, correct=False), asked=4)
    found = {name: values["p"] for name, values in measure(evaluation("after", played), None).items() if values}
    assert found["accuracy"] == {0: 0.25}
    assert found["preference"] == {0: 0.5, 1: -1.0} and found["preference_right"] == {0: 0.5}
    assert found["warm"] == {0: 1.0, 1: 0.0} and found["words"] == {0: 5.0, 1: 1.0}
    assert found["disfluency"] == {0: 0.2, 1: 0.0} and found["reasoning"] == {0: 3.0, 1: 3.0}
    assert "distinct" not in found


def test_a_verdict_that_failed_is_no_value() -> None:
    found = measure(evaluation("after", dialogue("p", said(0, "x"), said(1, "y", liked=1.0))), None)
    assert found["preference"] == {"p": {1: 1.0}}


def test_diversity_is_of_siblings_and_turn_by_turn() -> None:
    replies = [("a b", "one"), ("a b", "two"), ("a b c", "one"), ("c", "four")]
    siblings = [dialogue("p", said(0, first), said(1, second)) for first, second in replies]
    found = measure(evaluation("after", siblings[0]), evaluation("after", *siblings))
    assert found["distinct"] == {"p": {0: 0.75, 1: 0.75}}
    assert found["distinct_2"] == {"p": {0: 0.5}}, "ab ab ab bc; single words have no pairs"


# ---- pairing ------------------------------------------------------------------------------------------------------


def test_policies_are_paired_by_prompt_and_turn() -> None:
    first = {"easy": {0: 0.9, 1: 0.9}, "hard": {0: 0.1}, "lost": {0: 1.0}}
    second = {"hard": {0: 0.2, 1: 0.7}, "easy": {1: 1.0}, "new": {0: 0.0}}
    change = difference([first], [second])
    assert change is not None and change.num_prompts == 2
    assert change.mean == pytest.approx(0.1) and change.low == pytest.approx(0.1), "unpaired it would be noise"
    assert difference([first], [{"new": {0: 1.0}}]) is None


def test_a_prompt_counts_once_whatever_its_number_of_turns() -> None:
    found = level([{"long": dict.fromkeys(range(9), 1.0), "short": {0: 0.0}}])
    assert found is not None and found.mean == 0.5
    zero = {"long": dict.fromkeys(range(9), 0.0), "short": {0: 0.0}}
    change = difference([zero], [{**zero, "long": dict.fromkeys(range(9), 1.0)}])
    assert change is not None and change.mean == 0.5


def test_one_seed_speaks_of_prompts_and_several_of_seeds() -> None:
    start = {f"p{index}": {0: 0.0} for index in range(50)}
    alike = [{name: {0: value} for name in start} for value in (0.1, 0.2, 0.3)]
    alone = difference([start], [alike[0]])
    assert alone is not None and (alone.num_seeds, alone.low, alone.high) == (1, pytest.approx(0.1), pytest.approx(0.1))
    over = difference([start] * 3, alike)
    assert over is not None and over.num_seeds == 3 and over.mean == pytest.approx(0.2)
    half = 4.303 * 0.1 / 3**0.5  # t(0.975, 2) * deviation / sqrt(n)
    assert (over.low, over.high) == (pytest.approx(0.2 - half), pytest.approx(0.2 + half))
    with pytest.raises(DataError, match="evaluate the same seeds"):
        difference([start] * 2, alike)


def test_policies_that_were_asked_other_prompts_are_not_compared() -> None:
    one, other = ({"accuracy": {name: {0: 1.0}}} for name in ("p", "q"))
    with pytest.raises(DataError, match="rlvr were asked other prompts, such as 'p'"):
        require_same_prompts({"start": one, "rlvr": other})


# ---- the verdict --------------------------------------------------------------------------------------------------


UP, DOWN, FLAT = Change(0.2, 0.1, 0.3, 9, 1), Change(-0.2, -0.3, -0.1, 9, 1), Change(0.01, -0.1, 0.12, 9, 1)
EVERYTHING_FLAT = dict.fromkeys(MEASURES, FLAT)


def results(
    since: Mapping[str, Mapping[str, Change]] | None = None,
    contrasts: Mapping[tuple[str, str], Mapping[str, Change]] | None = None,
) -> Results:
    """Nothing moved, but for what is given."""
    return Results(
        1,
        dict.fromkeys(ARMS, EVERYTHING_FLAT),
        {arm: {**EVERYTHING_FLAT, **(since or {}).get(arm, {})} for arm in ARMS if arm != "start"},
        {pair: {**EVERYTHING_FLAT, **(contrasts or {}).get(pair, {})} for pair in CONTRASTS},
    )


def outcome(name: str, found: Results) -> Outcome:
    return next(claim.outcome for claim in claims(found) if claim.name == name)


@pytest.mark.parametrize("arm", ["rlvr", "rlvr_brief"])
def test_the_trap_needs_accuracy_that_rose_and_a_liking_or_style_that_fell(arm: str) -> None:
    for accuracy, liked, warm in itertools.product((UP, FLAT, DOWN), repeat=3):
        moved = {"accuracy": accuracy, "preference_right": liked, "warm": warm}
        wanted = "undecided" if accuracy is not UP else "shown" if DOWN in (liked, warm) else "not shown"
        assert outcome(arm, results({arm: moved})) == wanted, moved


def test_diversity_alone_is_not_the_trap_and_missing_verdicts_decide_nothing() -> None:
    assert outcome("rlvr", results({"rlvr": {"accuracy": UP, "distinct": DOWN}})) == "not shown"
    unjudged = results({"rlvr": {"accuracy": UP}})
    bare = {m: c for m, c in unjudged.since_start["rlvr"].items() if m != "preference_right"}
    unjudged = dataclasses.replace(unjudged, since_start={**unjudged.since_start, "rlvr": bare})
    assert outcome("rlvr", unjudged) == "undecided"


@pytest.mark.parametrize(
    ("name", "pair", "shown", "against"),
    [
        ("pressure", ("rlvr", "rlvr_brief"), {"words": DOWN, "warm": DOWN}, {"warm": UP}),
        ("joint", ("rlvr", "joint"), {"preference_right": UP}, {"preference_right": DOWN}),
        ("rlhf", ("rlhf", "joint"), {"accuracy": UP}, {"accuracy": DOWN}),
        ("staged", ("staged_first", "staged"), {"accuracy": DOWN}, {"accuracy": UP}),
    ],
)
def test_a_claim_follows_its_own_intervals(
    name: str, pair: tuple[str, str], shown: dict[str, Change], against: dict[str, Change]
) -> None:
    assert outcome(name, results(contrasts={pair: shown})) == "shown"
    assert outcome(name, results(contrasts={pair: against})) == "not shown"
    assert outcome(name, results()) == "undecided"


@pytest.mark.parametrize("arm", ["warm_rlvr", "warm_brief"])
def test_a_style_is_worn_away_where_liking_or_courtesy_fell_whatever_the_accuracy(arm: str) -> None:
    for accuracy, liked, warm in itertools.product((UP, FLAT, DOWN), repeat=3):
        moved = {"accuracy": accuracy, "preference_right": liked, "warm": warm}
        wanted = "shown" if DOWN in (liked, warm) else "not shown"
        assert outcome(arm, results(contrasts={("joint", arm): moved})) == wanted, moved
    missing = results()
    pair = ("joint", arm)
    bare = {m: c for m, c in missing.contrasts[pair].items() if m != "warm"}
    assert outcome(arm, dataclasses.replace(missing, contrasts={**missing.contrasts, pair: bare})) == "undecided"


def test_a_judge_that_costs_accuracy_keeps_nothing() -> None:
    costly = {("rlvr", "joint"): {"preference_right": UP, "accuracy": DOWN}}
    assert outcome("joint", results(contrasts=costly)) == "not shown"


def test_the_headline_says_when_the_claim_does_not_show() -> None:
    trapped = {"accuracy": UP, "warm": DOWN}
    fine = {"accuracy": UP}

    def head(**since: Mapping[str, Change]) -> str:
        said, _, worn = headline(claims(results(since))).partition("; ")
        assert worn == "a style that was taught before stays"
        return said

    assert "not with verified reward alone" in head(rlvr=fine, rlvr_brief=trapped)
    assert head(rlvr=fine, rlvr_brief=fine).startswith("The trap does not show")
    assert head(rlvr=trapped, rlvr_brief=fine) == "The trap shows with verified reward alone"
    assert head(rlvr=trapped, rlvr_brief=trapped).endswith("and with efficiency pressure")
    assert head() == "These runs do not decide whether the trap shows"
    worn = results(contrasts={("joint", "warm_brief"): {"warm": DOWN}})
    assert headline(claims(worn)).endswith("; a style that was taught before is worn away under efficiency pressure")
    worn = results(contrasts={("joint", "warm_rlvr"): {"preference_right": DOWN}})
    assert headline(claims(worn)).endswith("; a style that was taught before is worn away by verified reward alone")


# ---- the files ----------------------------------------------------------------------------------------------------


def replies(arm: str) -> list[DialogueResult]:
    """The start leaves a turn of most dialogues unanswered."""
    style = "ten" if arm == "rlvr_brief" else "sure it is ten"
    found = []
    for index in range(12):
        asked = 2 if arm == "start" and index % 3 else 1
        task = ("sums", "rule")[index % 2]
        found.append(dialogue(f"p{index}", said(0, style, liked=0.1 * index), task=task, asked=asked))
    return found


def test_a_seed_is_compared_and_its_page_escapes_what_was_said(tmp_path: Path) -> None:
    seeds = [{arm: measure(evaluation("after", *replies(arm)), None) for arm in ARMS}]
    found = compare(seeds)
    assert found.since_start["rlvr_brief"]["warm"].fell and found.contrasts["rlvr", "rlvr_brief"]["words"].mean == -3
    assert outcome("rlvr_brief", found) == "shown" and outcome("rlvr", found) == "not shown"
    told = json.loads(json.dumps(experiment.as_json(found, claims(found), seeds=[0])))
    assert told["contrasts"]["rlvr_brief - rlvr"]["warm"]["mean"] == -1.0
    assert "One seed" in told["intervals"] and "not with verified reward alone" in told["headline"]

    spiked = [dataclasses.replace(one, turns=(said(0, "<script>alert(1)</script>"),)) for one in replies("rlvr")]
    shown = {arm: evaluation("after", *(spiked if arm == "rlvr" else replies(arm))) for arm in ARMS}
    write_page(
        tmp_path / "report.html",
        results=found,
        claims=claims(found),
        seen=Seen(0, shown, {"rlvr": {"reward/verified": [(0, 0.1), (1, 0.2)]}}, {"rlvr": ""}),
        judge="as good as it is",
        clips=ClipStore(str(tmp_path)),
        narrator=None,
    )
    page = (tmp_path / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert" in page
    assert headline(claims(found)) in page and "only efficiency pressure is expected to collapse style" in page
    assert "-100.0 %" in page, "of the replies with courtesy"


def test_arms_differ_in_their_weights_alone() -> None:
    """Same start, records, seed, steps and settings; two stages share the steps and the records between them."""
    stages = {stage.name: stage for stage in read_pipeline(str(EXAMPLE / "pipeline.yaml"), ["run.seed=5"]).stages}
    assert {*stages} == {*ARMS, "evaluation"} - {"start"}
    loaded = {name: stage.load() for name, stage in stages.items()}
    weights = {n: [one.weight for one in c.rewards.sources] for n, c in loaded.items() if n != "evaluation"}
    assert weights == {
        "rlvr": [1, 0, 0], "rlvr_brief": [1, 0.1, 0], "rlhf": [0, 0, 1], "joint": [1, 0, 0.2],
        "staged_first": [1, 0, 0], "staged": [0, 0, 1], "warm_rlvr": [1, 0, 0], "warm_brief": [1, 0.1, 0],
    }  # fmt: skip
    plain = {name: dataclasses.asdict(config) for name, config in loaded.items() if name != "evaluation"}
    for one in plain.values():
        del one["run"]["name"], one["run"]["root"]
        for source in one["rewards"]["sources"]:
            del source["weight"]
    assert plain["rlvr"] == plain["rlvr_brief"] == plain["rlhf"] == plain["joint"]
    for name in ("staged_first", "staged"):
        assert 2 * plain[name]["run"].pop("steps") == loaded["joint"].run.steps
        assert plain[name]["data"].pop("train").startswith(str(EXAMPLE / "data" / "train-"))
    assert plain["staged"].pop("model")["path"] == str(stages["staged_first"].results["model"])
    assert plain["staged_first"].pop("model") == plain["joint"]["model"]
    for name in ("warm_rlvr", "warm_brief"):
        assert plain[name].pop("model")["path"] == str(stages["joint"].results["model"])
        assert plain[name] == {key: value for key, value in plain["joint"].items() if key != "model"}
    rest = {**plain["joint"], "run": {k: v for k, v in plain["joint"]["run"].items() if k != "steps"}}
    rest["data"] = {k: v for k, v in rest["data"].items() if k != "train"}
    del rest["model"]
    assert plain["staged"] == plain["staged_first"] == rest
    assert all(config.run.seed == 5 for config in loaded.values())


def test_the_judge_that_evaluates_is_not_the_judge_that_trains() -> None:
    stages = {stage.name: stage for stage in read_pipeline(str(EXAMPLE / "pipeline.yaml")).stages}
    trains, evaluates = (stages[name].load().rewards.judge_model.path for name in ("joint", "evaluation"))
    (other,) = read_pipeline(str(EXAMPLE / "judge_pipeline.yaml")).stages
    assert evaluates == str(other.results["model"]) and trains != evaluates
    assert list(stages["evaluation"].load().policies) == list(ARMS)


def test_a_tiny_trial_keeps_to_folders_of_its_own() -> None:
    full, tiny = (experiment.Plan((0,), tiny=choice) for choice in (False, True))
    assert full.report_folder() != tiny.report_folder()
    stages = read_pipeline(tiny.pipeline, tiny.arms(0, until="rlhf"))
    assert stages.folder.name == "trap-tiny-seed0" and stages.config.run.until == "rlhf"
    assert next(stage for stage in stages.stages if stage.name == "staged").load().run.steps == 2


# ---- the command --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """SIGKILL of the process."""


class FakeStages:
    """What recipes leave, without what they do.

    Args:
        dies_in: a stage that is killed after it made its run folder.
    """

    def __init__(self, dies_in: str = "") -> None:
        self._dies_in = dies_in
        self.ran: list[tuple[str, int, bool]] = []

    def __call__(self, config_path: str, overrides: Sequence[str], *, resume: str | None, kept: Kept) -> int:
        given = dict(line.split("=", 1) for line in overrides)
        told = {name: json.loads(value) for name, value in given.items() if not name.startswith("tracking")}
        name, seed, root = told["run.name"], told["run.seed"], told["run.root"]
        self.ran.append((name, seed, resume is not None))
        with open_run(resume) if resume else create_run(root, name=name, seed=seed) as folder:
            if name == self._dies_in:
                raise Killed
            getattr(self, told["recipe"])(told, folder.path)
        return 0

    def reward_model(self, told: Mapping[str, Any], run: Path) -> None:
        model(Path(told["run.output"]), "judge")
        figures = {"num_pairs": 300, "accuracy": 0.8, "sign_accuracy": 0.9, "consistency": 0.7, "failure_rate": 0.0}
        (run / "calibration.json").write_text(json.dumps({"heldout": figures}))

    def rl(self, told: Mapping[str, Any], run: Path) -> None:
        model(run / "model", f"{told['run.name']} {told['run.seed']}")
        (run / "metrics").mkdir(exist_ok=True)
        (run / "metrics" / "metrics.jsonl").write_text('{"step": 0, "reward/judge": 0.5}\n')
        alert = {"step": 9, "verified": 1.0, "preference": -2.0} if told["run.name"] == "rlvr_brief" else None
        (run / "report.json").write_text(json.dumps({"trap": {"training": {"alert": alert}}}))

    def evaluate(self, told: Mapping[str, Any], run: Path) -> None:
        for arm in told["policies"]:
            for kind in ("evaluation", "siblings"):
                write_evaluation(run / f"{kind}-{arm}-heldout.json", evaluation("after", *replies(arm)))
        (run / "report.json").write_text(json.dumps({"policies": {}, "levels": {}, "gains": {}}))


def model(path: Path, text: str) -> None:
    path.mkdir(exist_ok=True, parents=True)
    (path / "weights").write_text(text)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> experiment.Plan:
    """The example's own settings, with stand-ins for the files they name."""
    monkeypatch.setattr("rlaudio.recipes.pipeline.load_config", loaded_once)
    here, quickstart = tmp_path / "examples" / "trap", tmp_path / "examples" / "quickstart"
    here.mkdir(parents=True)
    for path in EXAMPLE.glob("*.yaml"):
        (here / path.name).write_text(path.read_text() + "\ntracking: {mlflow: false}\n" * ("pipeline" in path.name))
    for name in ("policy", "judge"):
        model(quickstart / "checkpoints" / name, name)
    model(here / "data" / "judge-init", "random")
    for name in ("judge-items", "judge-whole", "judge-heldout", "train-first", "train-second"):
        (here / "data" / f"{name}.jsonl").write_text(name)
    (quickstart / "data").mkdir()
    for name in ("train", "heldout"):
        (quickstart / "data" / f"{name}.jsonl").write_text(name)
    return experiment.Plan((3,), here=here)


def go(plan: experiment.Plan, fake: FakeStages, **until: str) -> list[str]:
    def train(arguments: Sequence[str]) -> int:
        return pipeline_command(arguments[1], arguments[2:], resume=None, run_stage=fake)

    assert experiment.run(plan, train=train, **until) == 0
    return [name + " resumed" * resumed for name, _, resumed in fake.ran]


def test_arms_are_resumed_none_is_made_twice_and_all_are_reported(plan: experiment.Plan) -> None:
    arms = [name for name in ARMS if name != "start"]
    with pytest.raises(Killed):
        go(plan, FakeStages("rlhf"))
    with pytest.raises(RunFolderError, match="'evaluation' of trap-seed3 is not done"):
        experiment.report(plan, narrator=None)
    assert go(plan, FakeStages(), until="joint") == ["rlhf resumed", "joint"]
    rest = ["staged_first", "staged", "warm_rlvr", "warm_brief", "evaluation"]
    assert go(plan, FakeStages()) == rest, "the judge and the other arms lie there"
    assert go(plan, FakeStages()) == []
    (plan.here.parent / "quickstart" / "checkpoints" / "judge" / "weights").write_text("another judge")
    assert go(plan, FakeStages()) == arms, "it trained them, and what they came to is as before"

    results, found, page = experiment.report(plan, narrator=None)
    assert results.num_seeds == 1 and outcome("rlvr_brief", results) == "shown"
    assert "by step 9 verified reward rose" in page.read_text() and "right verdict of five in 80%" in page.read_text()
    told = json.loads(page.with_name("report.json").read_text())
    assert told["headline"] == headline(found) and told["seeds"] == [3]


def test_every_seed_is_run_after_the_judge_and_what_fails_ends_it() -> None:
    plan, asked = experiment.Plan((0, 1)), list[str]()

    def train(arguments: Sequence[str], fails: str = "") -> int:
        asked.append(" ".join([Path(arguments[1]).stem, *arguments[2:]]))
        return 130 if asked[-1] == fails else 0

    assert experiment.run(plan, train=train, until="rlvr") == 0
    assert asked == ["judge_pipeline", *(f"pipeline run.seed={seed} run.until=rlvr" for seed in (0, 1))]
    for last, fails in enumerate(("judge_pipeline", "pipeline run.seed=0"), start=1):
        asked.clear()
        assert experiment.run(plan, train=functools.partial(train, fails=fails)) == 130
        assert len(asked) == last
    asked.clear()
    assert experiment.run(plan, train=train, until="judge") == 0 and asked == ["judge_pipeline"]
