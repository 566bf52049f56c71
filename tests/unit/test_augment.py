"""Augmentation: each operation does what it says, and nothing where an answer depends on it. Texts that are spoken."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlaudio.audio.augment import OPERATIONS, augment
from rlaudio.audio.store import ClipStore
from rlaudio.cli.main import main
from rlaudio.config import AugmentSettings, DataSettings, RunConfig
from rlaudio.config_checks import run_problems
from rlaudio.data.augmentation import Augmenter
from rlaudio.data.lines import KEEPS
from rlaudio.data.records import read_records
from rlaudio.errors import AudioError
from rlaudio.types import SAMPLE_RATE_HZ, AudioPart, FloatArray, Message, PromptRecord, TextPart

RANGES = {"speed": (0.8, 0.8), "reverberation": (0.3, 0.3), "noise": (10.0, 10.0), "telephone": (8.0, 8.0)}


def tones(*hz: float, duration_s: float = 0.5) -> FloatArray:
    time_s = np.arange(int(duration_s * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    mixed: FloatArray = np.mean([0.4 * np.sin(2 * np.pi * one * time_s) for one in hz], axis=0).astype(np.float32)
    return mixed


def only(name: str, samples: FloatArray, *, amount: float, seed: int = 1) -> FloatArray:
    return augment(samples, ranges={name: (amount, amount)}, share=1.0, keep=(), seed=seed)


def level_db(samples: FloatArray, *hz: float) -> float:
    spectrum = np.abs(np.fft.rfft(samples))
    nearest = [round(one * len(samples) / SAMPLE_RATE_HZ) for one in hz]
    return float(20 * np.log10(max(spectrum[index - 2 : index + 3].max() for index in nearest) / len(samples) + 1e-12))


def test_speed_shortens_and_raises_by_its_factor() -> None:
    faster = only("speed", tones(400), amount=1.25)
    assert abs(len(faster) - 0.5 * SAMPLE_RATE_HZ / 1.25) <= 2
    peak_hz = float(np.argmax(np.abs(np.fft.rfft(faster)))) * SAMPLE_RATE_HZ / len(faster)
    assert abs(peak_hz - 500) < 4


def test_noise_is_as_far_below_the_sound_as_asked() -> None:
    sound = tones(400, duration_s=2)
    for snr_db in (5.0, 20.0):
        added = only("noise", sound, amount=snr_db) - sound
        assert abs(10 * np.log10(np.mean(sound**2) / np.mean(added**2)) - snr_db) < 0.2


def test_reverberation_goes_on_behind_the_sound_and_fades() -> None:
    heard = only("reverberation", tones(400), amount=0.3)
    tail = heard[len(tones(400)) :]
    assert abs(len(tail) - 0.3 * SAMPLE_RATE_HZ) <= 2
    early, late = (float(np.mean(part**2)) for part in (tail[:800], tail[-800:]))
    assert early > 1e-6 and late < early / 1000


def test_a_telephone_has_no_high_tones_and_keeps_the_low_ones() -> None:
    sound = tones(1000, 6000)
    heard = only("telephone", sound, amount=8)
    assert len(heard) == len(sound)
    assert abs(level_db(heard, 1000) - level_db(sound, 1000)) < 1
    assert level_db(heard, 6000) < level_db(sound, 6000) - 30


@pytest.mark.parametrize("kept", KEEPS)
def test_an_operation_is_left_out_where_it_would_change_what_is_kept(kept: str) -> None:
    allowed = {name: RANGES[name] for name, operation in OPERATIONS.items() if kept not in operation.changes}
    sound = tones(400, 900)
    kept_so = augment(sound, ranges=RANGES, share=1.0, keep=[kept], seed=3)
    assert 0 < len(allowed) < len(RANGES)
    np.testing.assert_array_equal(kept_so, augment(sound, ranges=allowed, share=1.0, keep=[], seed=3))
    assert not np.array_equal(kept_so, augment(sound, ranges=RANGES, share=1.0, keep=[], seed=3))


def test_the_seed_decides_and_share_says_how_often() -> None:
    sound = tones(400)
    one, same, other = (augment(sound, ranges={"noise": (0, 30)}, share=1.0, keep=(), seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert augment(sound, ranges=RANGES, share=0.0, keep=(), seed=1) is sound
    changed = sum(
        augment(sound, ranges={"noise": (10, 10)}, share=0.3, keep=(), seed=seed) is not sound for seed in range(400)
    )
    assert 80 < changed < 160  # five deviations around 120; the seeds are fixed
    loud = only("noise", 2.4 * sound, amount=-10)
    assert np.abs(loud).max() <= 1.0


# ---- records ------------------------------------------------------------------------------------------------------


def record(store: ClipStore, *, task: str = "sums", keep: tuple[str, ...] = ()) -> PromptRecord:
    def part(hz: float) -> AudioPart:
        sha256 = store.put(tones(hz)).sha256
        return AudioPart(store.uri(sha256), sha256, SAMPLE_RATE_HZ, "two and two", "ada", "en")

    messages = (
        Message("user", (part(400), TextPart("listen"))),
        Message("assistant", (part(500),)),
        Message("user", (part(600),), answer="four"),
    )
    return PromptRecord("r", task, messages, keep=keep)


def test_a_record_is_heard_otherwise_and_asks_the_same(tmp_path: Path) -> None:
    store = ClipStore(str(tmp_path))
    settings = AugmentSettings(share=1.0, noise_snr_db=[10, 20], speed=[0.8, 0.8])
    plain = record(store)
    heard = Augmenter(settings, store, seed=1).apply(plain)
    for index, (before, after) in enumerate(zip(plain.messages, heard.messages, strict=True)):
        assert before.text == after.text and before.answer == after.answer
        was, now = before.parts[0], after.parts[0]
        assert isinstance(was, AudioPart) and isinstance(now, AudioPart)
        assert (now.sha256 == was.sha256) == (index == 1)  # given replies stay
        assert now.uri == store.uri(now.sha256) and (now.transcript, now.voice) == ("two and two", "ada")
        store.check(now.sha256)
    # Another actor, on its own store object, comes to the same clips; another run to others.
    again = Augmenter(settings, ClipStore(str(tmp_path)), seed=1)
    assert again.apply(plain) == heard == again.apply(plain)
    assert Augmenter(settings, store, seed=2).apply(plain) != heard
    assert Augmenter(AugmentSettings(), store, seed=1).apply(plain) is plain


def test_what_an_answer_depends_on_is_kept_by_record_or_by_task(tmp_path: Path) -> None:
    store = ClipStore(str(tmp_path))
    settings = AugmentSettings(share=1.0, speed=[0.8, 0.8], keep={"rate": ["rate"]})
    augmenter = Augmenter(settings, store, seed=1)
    assert augmenter.apply(free := record(store)) != free
    assert augmenter.apply(kept := record(store, keep=("pitch",))) == kept
    assert augmenter.apply(kept := record(store, task="rate")) == kept


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (AugmentSettings(share=0.5), "would change nothing: set the range of speed"),
        (AugmentSettings(speed=[0.9, 1.1]), "share is 0 and would change nothing: set a share"),
        (AugmentSettings(share=0.5, speed=[1.1, 0.9]), "speed is [1.1, 0.9]: set the least and the greatest"),
        (AugmentSettings(share=0.5, speed=[0.9]), "speed is [0.9]"),
        (AugmentSettings(share=0.5, noise_snr_db=[5, 500]), "noise_snr_db is [5, 500]"),
        (AugmentSettings(share=0.5, speed=[1, 1], keep={"rate": ["rat"]}), "names 'rat': did you mean rate?"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(settings: AugmentSettings, said: str) -> None:
    told = run_problems(RunConfig(data=DataSettings("t.jsonl", [], "c", augment=settings)))
    assert [said in one for one in told if "data.augment" in one] == [True]


# ---- spoken texts -------------------------------------------------------------------------------------------------


class Whistle:
    """Speaks any text as a tone of one pitch; one word lasts a tenth of a second."""

    def __init__(self, hz: float = 440) -> None:
        self._hz = hz

    def speak(self, text: str) -> FloatArray:
        if "unspeakable" in text:
            raise AudioError("cannot speak this; leave it out")
        return tones(self._hz, duration_s=0.1 * len(text.split()))


def test_texts_are_spoken_with_transcript_voice_and_language(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(name: str, *said: str) -> str:
        messages: list[object] = [{"role": "system", "content": [{"text": "be kind"}]}]
        for text in said:
            messages += [
                {"role": "user", "content": [{"text": text}]},
                {"role": "assistant", "content": [{"text": "ok"}]},
            ]
        return json.dumps({"id": name, "task": "chat", "messages": messages[:-1]})

    texts = tmp_path / "texts.jsonl"
    rows = [line(f"r{index}", "hello there", "bye") for index in range(12)]
    texts.write_text("\n".join([*rows, line("bad", "unspeakable")]))
    out = tmp_path / "out"
    voices = [f"--voice={__name__}:Whistle {{hz: {hz}}}" for hz in (400, 600)]
    assert main(["data", "speak", str(texts), str(out), *voices, "--language", "en"]) == 0
    told = capsys.readouterr().out
    assert "12 record(s), 24 text(s) spoken" in told and "1 left out, first bad: cannot speak this" in told
    store = ClipStore(str(out))
    records = read_records(out / "records.jsonl", clips=store)
    used = set()
    for one in records:
        parts = [message.parts[0] for message in one.messages if message.role == "user"]
        assert [part.transcript for part in parts if isinstance(part, AudioPart)] == ["hello there", "bye"]
        (voice,) = {part.voice for part in parts if isinstance(part, AudioPart)}
        used.add(voice)
        assert [message.text for message in one.messages if message.role != "user"] == ["be kind", "ok"]
    assert used == {"400", "600"}
    assert len({part.sha256 for one in records for part in one.messages[1].parts if isinstance(part, AudioPart)}) == 2
    for voice in ("nobody:Nothing", f"{__name__}:Whistle {{pitch: 3}}", f"{__name__}:Whistle [1"):
        assert main(["data", "speak", str(texts), str(out), "--voice", voice]) == 2
