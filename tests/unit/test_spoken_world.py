"""The spoken world: the same bytes from the same arguments, splits that share nothing, and labels that can be heard."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

from spoken_world import make, tasks
from spoken_world import vocabulary as v
from spoken_world.heldout import write_heldout
from spoken_world.stages import write_pairs
from spoken_world.voice import EspeakVoice, synthesizer

from rlaudio.audio.store import ClipStore
from rlaudio.data.records import read_records
from rlaudio.data.speak import voice_of
from rlaudio.errors import AudioError, ConfigError, DataError
from rlaudio.rewards.preference_rows import require_apart
from rlaudio.rewards.preferences import read_preferences
from rlaudio.rewards.verifiers import turn_correct
from rlaudio.types import AudioPart, FloatArray, Message, PromptRecord, TextPart

CONFIG = make.WorldConfig(seed=3, train=12, heldout=12, heldout_voices=12, base=12)
SPLITS = ("base", "train", "heldout", "heldout_voices")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "a"
    make.make_world(out, CONFIG)
    return out


def read(world: Path, split: str) -> list[PromptRecord]:
    return read_records(world / f"{split}.jsonl", complete=split == "base")


def user_messages(records: list[PromptRecord]) -> Iterator[Message]:
    return (message for record in records for message in record.messages if message.role == "user")


def drawn_lines(num: int = 300) -> list[tasks.Line]:
    random = Random(5)
    return [line for draw in tasks.TASKS.values() for _ in range(num) for line in draw(random).lines]


def fundamental_hz(samples: FloatArray) -> float:
    """Median pitch of the voiced frames, by autocorrelation between 60 and 300 Hz."""
    found = []
    for start in range(0, len(samples) - 1024, 320):
        frame = samples[start : start + 1024] * np.hanning(1024)
        power = np.fft.irfft(np.abs(np.fft.rfft(frame, 2048)) ** 2)[:1024]
        lag = 53 + int(power[53:267].argmax())
        if power[0] > 0.5 and power[lag] > 0.4 * power[0]:
            found.append(16_000 / lag)
    return float(np.median(found))


# ---- words and checks ----------------------------------------------------------------------------------------------


def test_everything_is_said_in_the_closed_vocabulary() -> None:
    assert len(v.WORDS) <= 170
    assert len(set(v.WORDS)) == len(v.WORDS)
    random = Random(1)
    for line in drawn_lines():
        texts = [line.text, line.answer, line.thinking, line.reply(random, warm=True), *(i.text for i in line.rubric)]
        assert not set(" ".join(texts).split()) - set(v.WORDS)


def test_gold_replies_are_right_in_both_styles_and_no_list_of_candidates_is() -> None:
    random = Random(2)
    pools = [
        v.NUMBERS,
        v.NAMES,
        v.COLORS,
        v.PETS,
        v.CITIES,
        v.THINGS,
        ["fast", "slow"],
        ["high", "low"],
        [*v.END_WORDS, "sir", "well"],
    ]
    for line in drawn_lines():
        rules = (line.rule,) if line.rule else ()
        message = Message("user", (TextPart(line.text),), answer=line.answer, constraints=rules)
        warm = line.reply(random, warm=True)
        assert turn_correct(message, line.reply(random, warm=False)), line
        assert turn_correct(message, warm), (line, warm)
        assert set(warm.split()) & {*v.WARM_WORDS, "thanks", "please"}, warm
        for pool in pools:
            listed = replace(line, answer=" ".join(pool)).reply(random, warm=False)
            assert not turn_correct(message, listed), (line, listed)


def test_no_constant_reply_does_well() -> None:
    lines = [line for line in drawn_lines() if line.manner == "plain"]
    counts = {line.answer: 0 for line in lines}
    for line in lines:
        counts[line.answer] += 1
    assert max(counts.values()) / len(lines) < 0.1


def test_the_words_do_not_give_an_acoustic_label_away() -> None:
    for task, label in (("rate", "fast"), ("pitch", "high")):
        random = Random(3)
        labels: dict[str, list[bool]] = {}
        for _ in range(3000):
            for line in tasks.TASKS[task](random).lines:
                labels.setdefault(line.text, []).append(line.answer == label)
        for text, drawn in labels.items():
            assert abs(np.mean(drawn) - 0.5) < 4 * 0.5 / np.sqrt(len(drawn)), text


# ---- voices --------------------------------------------------------------------------------------------------------


def test_sound_depends_on_its_own_arguments_alone() -> None:
    voice = EspeakVoice("en-us+f2", rate=180, pitch=40)
    first = voice.speak("what is three plus four")
    EspeakVoice("en-us+klatt", rate=300, pitch=90).speak("no wait make it blue")
    np.testing.assert_array_equal(first, voice.speak("what is three plus four"))
    assert first.dtype == np.float32
    assert 0.5 < len(first) / 16_000 < 3.0
    assert 0.01 < np.abs(first).max() <= 1.0


def test_a_voice_that_is_not_there_is_named_before_anything_is_spoken() -> None:
    with pytest.raises(ConfigError, match=r"voices: .*en-xx.*no voice named 'en-xx'; use a name like"):
        voice_of("spoken_world.voice:EspeakVoice {voice: en-xx}", place="voices:")


def test_rate_and_pitch_can_be_heard_from_every_voice_of_their_task() -> None:
    text = "tell me what is three plus four"
    for name in [*make.TRAIN_VOICES_PITCHED, *make.HELDOUT_VOICES_PITCHED]:
        low, high = (
            fundamental_hz(synthesizer().speak(text, voice=f"en-us+{name}", rate_wpm=165, pitch=pitch))
            for pitch in (22, 78)
        )
        assert low < 110 < 125 < high, (name, low, high)
    everyone = [
        *make.TRAIN_VOICES_PITCHED,
        *make.TRAIN_VOICES_OTHER,
        *make.HELDOUT_VOICES_PITCHED,
        *make.HELDOUT_VOICES_OTHER,
    ]
    for name in everyone:
        slow, fast = (
            len(synthesizer().speak(text, voice=f"en-us+{name}", rate_wpm=rate, pitch=50)) for rate in (140, 240)
        )
        assert slow > 1.4 * fast, name


@pytest.mark.parametrize(
    ("text", "voice", "rate", "reason"),
    [
        (" ", "en-us", 175, "empty"),
        ("hello", "xx-nowhere", 175, "no voice named"),
        ("hello", "en-us", 1000, "rate_wpm=1000"),
    ],
)
def test_what_cannot_be_spoken(text: str, voice: str, rate: int, reason: str) -> None:
    with pytest.raises(AudioError, match=reason):
        EspeakVoice(voice, rate=rate).speak(text)


# ---- the made world ------------------------------------------------------------------------------------------------


def test_same_arguments_same_bytes_in_any_number_of_processes(world: Path, tmp_path: Path) -> None:
    make.make_world(tmp_path / "b", CONFIG, num_processes=2)
    ours, theirs = (
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (world, tmp_path / "b")
    )
    assert ours == theirs


def test_another_seed_is_another_world() -> None:
    def texts(seed: int) -> list[tuple[str, ...]]:
        return [plan.script.texts for plan in make.plan_world(replace(CONFIG, seed=seed))["train"]]

    assert texts(3) == texts(3)
    assert texts(3) != texts(4)


def test_records_are_whole_and_right(world: Path) -> None:
    store = ClipStore(str(world))
    for split in SPLITS:
        records = read_records(world / f"{split}.jsonl", complete=split == "base", clips=store)
        assert len(records) == 12
        assert {record.task for record in records} == set(tasks.TASKS)
        for record in records:
            asked = list(user_messages([record]))
            for part in (part for message in asked for part in message.parts if isinstance(part, AudioPart)):
                store.get(part.sha256)  # whole, and the bytes it was named after
            assert 2 <= len(asked) <= 4
            assert len({m.parts[0].sha256 for m in asked if isinstance(m.parts[0], AudioPart)}) == len(asked)
            for message in asked:
                assert message.answer
                assert message.reference_response
                assert turn_correct(message, message.reference_response)
        assert any(m.rubric for m in user_messages(records))
        assert any(not m.rubric for m in user_messages(records))


def test_base_holds_whole_dialogues_in_both_styles(world: Path) -> None:
    warm = []
    for record in read(world, "base"):
        for asked, reply in zip(record.messages[::2], record.messages[1::2], strict=True):
            assert (asked.role, reply.role) == ("user", "assistant")
            assert turn_correct(asked, reply.text)
            assert reply.thinking
            assert "<" not in reply.text + reply.thinking
        warm.append(bool(set(reply.text.split()) & set(v.WARM_WORDS)))
    assert 2 <= sum(warm) <= 10


def test_splits_share_no_script_no_clip_and_no_heldout_voice() -> None:
    plans = make.plan_world(make.WorldConfig(seed=7, train=600, heldout=500, heldout_voices=500, base=600))
    scripts = {split: {plan.script.texts for plan in all_of} for split, all_of in plans.items()}
    spoken = [line for all_of in plans.values() for plan in all_of for line in plan.spoken]
    assert len(set(spoken)) == len(spoken)
    for split in SPLITS:
        for other in SPLITS[: SPLITS.index(split)]:
            assert not scripts[split] & scripts[other]
    for split in ("heldout", "heldout_voices"):
        assert len(scripts[split]) == 500
    voices = {split: {line.voice for plan in all_of for line in plan.spoken} for split, all_of in plans.items()}
    assert not voices["heldout_voices"] & (voices["base"] | voices["train"] | voices["heldout"])
    assert voices["heldout"] <= voices["train"]
    assert len(voices["train"]) >= 38
    assert len(voices["heldout_voices"]) == 10
    for plan in plans["train"]:
        for line, said in zip(plan.script.lines, plan.spoken, strict=True):
            assert (line.manner == "slow") == (said.rate_wpm <= 140 and line.answer == "slow")
            assert len({said.voice for said in plan.spoken}) == 1


def test_clips_of_two_splits_are_caught(world: Path) -> None:
    records = read(world, "train")
    with pytest.raises(DataError, match="is in 'train' and in 'heldout'"):
        make._check_apart({"train": records, "heldout": records[:1]})


def test_made_again_only_when_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = make.WorldConfig(seed=1, train=1, heldout=0, heldout_voices=0)
    out = tmp_path / "world"
    command = ["--out", str(out), "--seed", "1", "--train", "1", "--heldout", "0", "--heldout-voices", "0"]
    assert make.main(command) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["splits"]["train"]["num_dialogues"] == 1
    before = (out / "world.json").stat().st_mtime_ns
    make.make_world(out, small)
    assert (out / "world.json").stat().st_mtime_ns == before
    (out / "train.jsonl").write_text("")
    make.make_world(out, small)
    assert len(read_records(out / "train.jsonl")) == 1
    make.make_world(out, replace(small, seed=2))
    assert json.loads((out / "world.json").read_text())["seed"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["world"]


def test_a_folder_that_is_no_world_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert make.main(["--out", str(tmp_path), "--train", "1"]) == 1
    assert "not a spoken world" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_slip_is_always_wrong_and_what_was_asked_stays_as_it_was() -> None:
    slips, turns = 0, 0
    for plan in make.plan_world(make.WorldConfig(seed=7, train=0, heldout=0, heldout_voices=0, base=120))["base"]:
        assert plan.careless is not None
        for line, (thinking, reply) in zip(plan.script.lines, plan.careless, strict=True):
            message = Message(
                "user", (TextPart(line.text),), answer=line.answer, constraints=(line.rule,) if line.rule else ()
            )
            slipped = thinking != line.thinking
            assert turn_correct(message, reply) != slipped, (line, reply)
            slips, turns = slips + slipped, turns + (line.careless() != line)
    assert 0.4 < slips / turns < 0.6


def test_the_cold_start_has_the_same_sounds_and_questions_as_the_base(world: Path) -> None:
    shown = read_records(world / "coldstart.jsonl", complete=True)
    base = read(world, "base")
    assert len(shown) == int(make.COLD_START_SHARE * CONFIG.base)
    for cold, warm in zip(shown, base, strict=False):
        assert cold.id != warm.id
        assert [m for m in cold.messages if m.role == "user"] == [m for m in warm.messages if m.role == "user"]


def test_a_stage_learns_from_no_comparison_that_its_report_is_about(tmp_path: Path) -> None:
    write_pairs(tmp_path / "train.jsonl", seed=13, num=600)  # some of this seed are held out, or mirror one
    write_heldout(tmp_path / "heldout.jsonl")
    train, heldout = (read_preferences(tmp_path / name) for name in ("train.jsonl", "heldout.jsonl"))
    assert 550 < len(train) < 600 and len(heldout) == 300
    require_apart(train, heldout)
