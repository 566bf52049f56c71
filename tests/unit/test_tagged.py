"""Answers between tags: what R1-AQA's and NeMo-RL's published rewards pay, case by case."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from rlaudio.config import RunConfig
from rlaudio.config_loader import load_config
from rlaudio.config_objects import require_records
from rlaudio.data.importers.base import import_set
from rlaudio.data.importers.catalog import importer_of
from rlaudio.data.records import read_records
from rlaudio.errors import ConfigError
from rlaudio.registry import load_object
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.tagged import TaggedAnswer
from rlaudio.types import Choice, Message, PromptRecord, TextPart, Turn, VersionSpan, WeightVersion

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CHOICES = (Choice("A", "motorboat"), Choice("B", "Yacht consignment"))
RECORD = PromptRecord("r", "t", (Message("user", (TextPart("?"),), answer="B", choices=CHOICES),))


def source(example: str) -> TaggedAnswer:
    (settings,) = load_config(RunConfig, EXAMPLES / example / "config.yaml").rewards.sources
    made: TaggedAnswer = load_object(settings.judge)(JudgeServices(), name=settings.name, **settings.options)
    return made


def turn(reply: str, *, thinking: str | None = "", finish: str = "stop") -> Turn:
    ids = np.arange(2, dtype=np.int32)
    spans = (VersionSpan(WeightVersion(0, 0), 0, 2),)
    return Turn(0, ids, ids, ids.astype(np.float32), spans, (), thinking, reply, finish)  # type: ignore[arg-type]


TAGGED = "<answer>Yacht consignment</answer>"


@pytest.mark.parametrize(
    ("reply", "thinking", "aqa", "omni"),
    [
        (TAGGED, "", 2.0, 0.95),
        (TAGGED, "waves", 1.0, 1.0),  # reasoning is no format of R1-AQA's, and a quarter of NeMo-RL's
        ("<answer> yacht, consignment! </answer>", "", 1.0, 0.95),
        (f"It is {TAGGED}.", "", 1.0, 0.95),
        ("Yacht consignment", "", 1.0, 0.0),
        ("B", "", 0.0, 0.0),
        ("<answer>motorboat</answer>", "", 1.0, 0.15),
        (f"{TAGGED}<answer>motorboat</answer>", "", 0.0, 0.0),  # listing candidates does not pay
        ("<answer>Yacht consignment", "", 0.0, 0.0),
        ("", "", 0.0, 0.0),
        ("", None, 0.0, 0.0),
    ],
)
def test_what_the_two_settings_pay(reply: str, thinking: str | None, aqa: float, omni: float) -> None:
    said = turn(reply, thinking=thinking)
    assert source("qwen2_audio_aqa").check(RECORD, said).value == pytest.approx(aqa)
    assert source("qwen2_5_omni").check(RECORD, said).value == pytest.approx(omni)


def test_a_turn_that_is_cut_off_earns_nothing() -> None:
    assert source("qwen2_audio_aqa").check(RECORD, turn(TAGGED, finish="length")).value == 0.0


def test_without_choices_the_answer_itself_is_compared() -> None:
    record = PromptRecord("r", "t", (Message("user", (TextPart("?"),), answer="seven"),))
    judge = TaggedAnswer(JudgeServices(), match="exact")
    assert judge.check(record, turn("<answer>seven</answer>")).detail["correct"] == 1.0
    assert judge.check(record, turn("<answer>Seven</answer>")).detail["correct"] == 0.0
    assert list(TaggedAnswer.record_problems(PromptRecord("r", "t", (Message("user", (TextPart("?"),)),)), {}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"match": "close"}, "match"),
        ({"tag": "<answer>"}, "tag"),
        ({"correct_weight": 0, "answer_weight": 0, "thinking_weight": 0}, "all 0"),
        ({"answer_weight": -1}, "answer_weight"),
    ],
)
def test_options_that_cannot_be_meant(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TaggedAnswer(JudgeServices(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("example", ["qwen2_audio_aqa", "qwen2_5_omni"])
def test_a_copy_of_avqa_is_imported_as_the_example_trains_on_it(example: str, tmp_path: Path) -> None:
    copy, out = tmp_path / "copy", tmp_path / "data"
    copy.mkdir()
    items = []
    for number in range(3):
        name = f"-HG3Omg_89c_{number:06d}"
        soundfile.write(copy / f"{name}.wav", np.sin(np.arange(16_000) * (0.05 + 0.01 * number)) / 4, 16_000)
        items.append(
            {
                "id": number,
                "video_name": name,
                "question_text": "What happened in the video?",
                "multi_choice": ["motorboat", "Yacht consignment", "Sailboat set sail", "Consignment car"],
                "answer": number,
                "question_relation": "View",
                "question_type": "Happening",
            }
        )
    (copy / "train_qa.json").write_text(json.dumps(items))
    import_set(importer_of("avqa-tagged"), copy, out, license=None, progressed=lambda _: None)
    records = read_records(out / "records.jsonl")
    assert records[0].messages[0].text == (
        "What happened in the audio? Please choose the answer from the following options: ['motorboat', "
        "'Yacht consignment', 'Sailboat set sail', 'Consignment car']. Output the final answer in <answer> </answer>."
    )
    files = [f"data.train={out}/records.jsonl", f"data.clips={out}"]
    require_records(load_config(RunConfig, EXAMPLES / example / "config.yaml", files), {}, records)
