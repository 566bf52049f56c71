"""Importers: miniature copies in the public layouts, with real sound files, become records that pass the check."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from rlaudio.audio.store import ClipStore
from rlaudio.cli.main import main
from rlaudio.data.records import read_records
from rlaudio.types import SAMPLE_RATE_HZ, AudioPart, PromptRecord


def tone(hz: float, *, duration_s: float = 0.3, rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(int(duration_s * rate_hz)) / rate_hz)).astype(np.float32)


def sound(path: Path, hz: float, *, rate_hz: int = SAMPLE_RATE_HZ) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(hz, rate_hz=rate_hz), rate_hz)
    return path


def lines(path: Path, *items: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(item)}\n" for item in items))


class Copy:
    """A made copy in `src`, and what importing it to `out` left."""

    def __init__(self, root: Path) -> None:
        self.src, self.out = root / "src", root / "out"
        self.src.mkdir()

    def brought(self, layout: str, *options: str) -> list[PromptRecord]:
        assert main(["data", "import", "--from", layout, str(self.src), str(self.out), *options]) == 0
        store = ClipStore(str(self.out))
        return read_records(self.out / "records.jsonl", clips=store)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        lines = (self.out / "skipped.jsonl").read_text().splitlines()
        return [(one["place"], one["reason"]) for one in map(json.loads, lines)]

    def pitch_hz(self, record: PromptRecord, message: int) -> float:
        """Of the sound that a message begins with, from its strongest frequency."""
        (part, *_) = record.messages[message].parts
        assert isinstance(part, AudioPart)
        samples = ClipStore(str(self.out)).get(part.sha256).samples
        return float(np.argmax(np.abs(np.fft.rfft(samples)))) * SAMPLE_RATE_HZ / len(samples)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def question(number: int, **changes: Any) -> dict[str, Any]:
    choices = ["motorboat", "Yacht consignment", "Sailboat", "Car"]
    named = {"id": number, "video_name": f"vid{number}_000030", "video_id": 7, "question_text": "What happened?"}
    kinds = {"question_relation": "Sound", "question_type": "Happening"}
    return {**named, "multi_choice": choices, "answer": 1, **kinds, **changes}


def test_avqa_as_published_and_as_r1_aqa_has_it(copy: Copy) -> None:
    sound(copy.src / "wavs/vid1_000030.wav", 400, rate_hz=44_100)
    sound(copy.src / "wavs/vid2_30.wav", 600)
    twins = question(4, video_name="vid1_000030", multi_choice=["a", "A", "b", "c"])
    beyond = question(5, video_name="vid1_000030", answer=4)
    (copy.src / "train_qa.json").write_text(json.dumps([question(1), question(2), question(3), twins, beyond]))
    first, second = copy.brought("avqa")
    assert (first.id, first.task, first.axis, first.license) == ("avqa-1", "happening", "Sound", None)
    message = first.messages[0]
    assert message.answer == "B" and [choice.text for choice in message.choices][1] == "Yacht consignment"
    assert message.parts[1].text == "What happened?\nA. motorboat\nB. Yacht consignment\nC. Sailboat\nD. Car"  # type: ignore[union-attr]
    assert abs(copy.pitch_hz(first, 0) - 400) < 5 and abs(copy.pitch_hz(second, 0) - 600) < 5
    places, reasons = zip(*copy.skipped, strict=True)
    assert places == ("train_qa.json:2", "train_qa.json:3", "train_qa.json:4")
    assert "vid3" in reasons[0] and "two choices are the same" in reasons[1] and "choice 4 of 4" in reasons[2]


def test_avqa_lines_name_their_sounds(copy: Copy) -> None:
    sound(copy.src / "wavs/x_30.wav", 500)
    sound(copy.out.parent / "secret.wav", 500)
    lines(
        copy.src / "train.jsonl",
        question(1, audio_path="wavs/x_30.wav"),
        question(2, audio_path="/elsewhere/x_30.wav"),  # where the maker had it: found by its name
        question(3, audio_path="../secret.wav"),
    )
    records = copy.brought("avqa", "--license", "CC-BY-4.0")
    assert [(one.id, one.license) for one in records] == [("avqa-1", "CC-BY-4.0"), ("avqa-2", "CC-BY-4.0")]
    assert [place for place, _ in copy.skipped] == ["train.jsonl:3"]


def test_audiomcq(copy: Copy) -> None:
    sound(copy.src / "audios/a.wav", 500)
    base = {"source_dataset": "Clotho", "question_type": "sound", "question": "Which?", "choices": ["cat", "dog"]}
    lines(
        copy.src / "data.jsonl",
        base | {"id": 1, "audio_path": "audios/a.wav", "answer": "dog"},
        base | {"id": 2, "audio_path": "audios/a.wav", "answer": "cow"},
        base | {"id": 3, "audio_path": "audios/gone.wav", "answer": "dog"},
        base | {"id": 1, "audio_path": "audios/a.wav", "answer": "cat"},
    )
    (record,) = copy.brought("audiomcq")
    assert (record.id, record.task, record.license) == ("audiomcq-Clotho-1", "sound", "Apache-2.0")
    assert record.messages[0].answer == "B"
    assert copy.skipped[0][1].startswith("its answer 'cow'")
    assert "gone.wav" in copy.skipped[1][1] and "used before" in copy.skipped[2][1]


def test_spokenwoz_cuts_each_turn_from_its_speakers_channel(copy: Copy) -> None:
    rate_hz = 8_000
    user = np.concatenate(
        [tone(300, duration_s=1, rate_hz=rate_hz), np.zeros(8_000), tone(500, duration_s=1, rate_hz=rate_hz)]
    )
    agent = tone(900, duration_s=3, rate_hz=rate_hz)
    (copy.src / "audio_5700_train_dev").mkdir()
    soundfile.write(copy.src / "audio_5700_train_dev/MUL1.wav", np.stack([agent[: len(user)], user], 1), rate_hz)

    def turn(tag: str, text: str, begin: int, end: int) -> dict[str, Any]:
        words = [{"Word": text, "BeginTime": begin, "EndTime": end, "ChannelId": int(tag == "user")}]
        return {"tag": tag, "text": text, "words": words}

    log = [
        turn("user", "a hotel please", 0, 1000),
        turn("system", "which area", 1000, 2000),
        turn("user", "the north", 2200, 2800),
        turn("system", "done", 2900, 3000),
    ]
    late = [turn("user", "hello", 9000, 9900), turn("system", "hi", 9900, 9990)]
    (copy.src / "text_5700_train_dev").mkdir()
    data = {"MUL1": {"log": log}, "MUL2": {"log": log}, "SNG1": {"log": log[1:2]}}
    (copy.src / "text_5700_train_dev/data.json").write_text(json.dumps(data))
    (record,) = copy.brought("spokenwoz")
    assert record.license == "CC-BY-NC-4.0"
    assert [one.role for one in record.messages] == ["user", "assistant", "user"]
    assert [one.text for one in record.messages] == ["a hotel please", "which area", "the north"]
    assert record.messages[-1].reference_response == "done"
    assert abs(copy.pitch_hz(record, 0) - 300) < 5 and abs(copy.pitch_hz(record, 2) - 500) < 5
    assert [place for place, _ in copy.skipped] == ["data.json:MUL2", "data.json:SNG1"]
    (copy.src / "text_5700_train_dev/data.json").write_text(json.dumps({"MUL1": {"log": late}}))
    assert main(["data", "import", "--from", "spokenwoz", str(copy.src), str(copy.out)]) == 2


def test_uro_bench_of_one_and_of_several_rounds(copy: Copy) -> None:
    for name in ("MtBenchEval-en/wav/1.wav", "MtBenchEval-en/wav/2.wav", "Repeat-zh/wav/1.wav"):
        sound(copy.src / name, 400)
    rounds = [
        {"round": 2, "source_wav": "wav/2.wav", "source_text": "and now", "target_text": "fine"},
        {"round": 1, "source_wav": "wav/1.wav", "source_text": "how are you", "target_text": "well"},
    ]
    lines(copy.src / "MtBenchEval-en/test.jsonl", {"id": 1, "dialogue": rounds}, {"id": 2, "dialogue": [{"round": 1}]})
    flat = {"id": 1, "source_wav": "wav/1.wav", "source_text": "你好", "target_text": ["a", "b"]}
    lines(copy.src / "Repeat-zh/test.jsonl", flat)
    several, one = copy.brought("uro-bench")
    assert [message.text for message in several.messages] == ["how are you", "and now"]
    assert [message.reference_response for message in several.messages] == ["well", "fine"]
    assert (several.id, several.task, several.license) == ("uro-MtBenchEval-en-1", "MtBenchEval-en", "MIT")
    part = one.messages[0].parts[0]
    assert isinstance(part, AudioPart) and (part.language, part.transcript) == ("zh", "你好")
    assert one.messages[0].reference_response is None
    assert [place for place, _ in copy.skipped] == ["MtBenchEval-en/test.jsonl:2"]


def test_audio_multi_challenge(copy: Copy) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(400, rate_hz=48_000), 48_000, format="WAV")
    audio = {"bytes": buffer.getvalue(), "path": None}
    good = {
        "id": "x1",
        "axis": "VOICE_EDITING",
        "rubric": json.dumps(["says no", {"criterion": "is kind"}]),
        "user_turn_1_audio": audio,
        "user_turn_1_transcript": "hi",
        "assistant_turn_1_transcript": "hello",
        "user_turn_2_audio": audio,
        "user_turn_2_transcript": "wait, no",
        "user_turn_3_audio": None,
    }
    bad = good | {"id": "x2", "rubric": "[]"}
    table = pa.Table.from_pylist([good, bad, good | {"id": "x3", "assistant_turn_1_transcript": None}])
    pq.write_table(table, copy.src / "data.parquet")
    (record,) = copy.brought("multichallenge")
    assert (record.id, record.axis) == ("audiomc-x1", "voice_editing")
    assert [(one.role, one.text) for one in record.messages] == [
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "wait, no"),
    ]
    assert [item.text for item in record.messages[-1].rubric] == ["says no", "is kind"] and not record.messages[
        0
    ].rubric
    assert [place for place, _ in copy.skipped] == ["data.parquet:1", "data.parquet:2"]


def test_multi_challenge_in_writing(copy: Copy) -> None:
    said = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "hello"), ("user", "bye"))]
    item = {"QUESTION_ID": "q1", "AXIS": "SELF COHERENCE", "TARGET_QUESTION": "Is it kind?", "PASS_CRITERIA": "YES"}
    lines(copy.src / "data/benchmark_questions.jsonl", item | {"CONVERSATION": said}, item | {"CONVERSATION": said[:2]})
    (record,) = copy.brought("multichallenge")
    assert (
        record.axis == "self_coherence" and record.messages[-1].rubric[0].text == "Is it kind? The right answer is YES."
    )


@pytest.mark.parametrize("layout", ["avqa", "audiomcq", "spokenwoz", "uro-bench", "multichallenge"])
def test_a_folder_of_another_layout_is_refused_and_nothing_is_written(
    copy: Copy, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    (copy.src / "readme.txt").write_text("hello")
    assert main(["data", "import", "--from", layout, str(copy.src), str(copy.out)]) == 2
    assert str(copy.src) in capsys.readouterr().err and not copy.out.exists()


def test_an_unknown_layout_is_named(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "import", "--from", "avaq", str(copy.src), str(copy.out)]) == 2
    assert "uro-bench" in capsys.readouterr().err
