"""Two stages of reinforcement learning in a pipeline, on the same real engine and judge: the second begins afresh."""

import json
from pathlib import Path

import pytest

from rlaudio.evals.summary import read_evaluation
from tests.ray_local.test_main_job import QUICKSTART, launch

PIPELINE = "pipeline-seed0"


def file_of(world: Path, folder: Path) -> Path:
    """The second stage starts from the first one's start, with other rewards."""
    settings = {
        "data.train": f"{world}/train.jsonl",
        "data.clips": str(world),
        "data.heldout.heldout": f"{world}/heldout.jsonl",
        "data.heldout.heldout_voices": f"{world}/heldout_voices.jsonl",
        "run.steps": 1,
        "algorithm.groups_per_step": 2,
        "learner.warmup_steps": 0,
        "sync.transport": "collective",  # whose groups belong to one learner
        "evaluation.voice": "",
        "evaluation.examples": 0,
    }
    first = {**settings, "learner.lr": 0.03}  # it speaks otherwise after one step
    second = {**settings, "rewards.sources[1].weight": 0.0}
    config = str(QUICKSTART / "config.yaml")
    stages = [
        {"name": name, "recipe": "rl", "config": config, "settings": changes}
        for name, changes in (("first", first), ("second", second))
    ]
    file = folder / "pipeline.yaml"
    file.write_text(json.dumps({"recipe": "pipeline", "run": {"name": "pipeline"}, "stages": stages}))
    return file


def replies(run: Path, moment: str) -> list[str]:
    result = read_evaluation(run / f"evaluation-{moment}-heldout.json")
    return [turn.reply for dialogue in result.dialogues for turn in dialogue.turns]


@pytest.mark.timeout(900)
def test_engines_go_on_to_the_next_stage_with_its_weights_and_its_rewards(small_world: Path, tmp_path: Path) -> None:
    process = launch(tmp_path, "train", str(file_of(small_world, tmp_path)), f"run.root={tmp_path}")
    output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    assert output.count("starting engines and learner ...") == 1, output
    assert output.count("starting the learner, engines go on ...") == 1, output
    stages = tmp_path / PIPELINE / "stages"
    first, second = (next((stages / name / "runs").glob("*/run.json")).parent for name in ("first", "second"))
    before, after = replies(first, "before"), replies(first, "after-step000001")
    assert before != after, "the engine's weights were not those of the start when the first stage ended"
    assert replies(second, "before") == before
    doctor = json.loads((second / "doctor.json").read_text())
    assert doctor["verdict"] == "pass", "engine and learner hold the same weights"
    rows = [json.loads(line) for line in (second / "metrics" / "metrics.jsonl").read_text().splitlines()]
    (trained,) = [row for row in rows if "share/judge" in row]
    assert trained["share/judge"] == 0.0 and trained["age/max"] == 0
    for run in (first, second):
        audited = launch(tmp_path, "audit", str(run))
        said, _ = audited.communicate(timeout=120)
        assert audited.returncode == 0, said
