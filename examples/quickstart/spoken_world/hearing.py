"""A tiny judge that hears: `python -m spoken_world.hearing`, in the folder of the quickstart, trains and measures it.

It is measured on pairs of which the words are the same and only the sound differs (`heard_pairs.py`), in sentences and
voices that it never heard: with the sounds, without them (transcripts alone), and with silence in their place.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa

from rlaudio.aio import all_or_first_error
from rlaudio.audio.store import ClipStore
from rlaudio.config import PhaseSettings
from rlaudio.engines.base import Engine
from rlaudio.errors import VerdictError
from rlaudio.evals.stats import Interval, mean_interval
from rlaudio.models.base import ModelFamily
from rlaudio.models.step_audio import StepAudio
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.generative import GenerativeJudge
from rlaudio.runs import write_json_atomic
from rlaudio.types import SAMPLE_RATE_HZ, AudioPart
from spoken_world.building import run_recipe, served, write_card
from spoken_world.heard_pairs import PROPERTIES, HeardPair, heard_pairs, heard_rows, speak

NUM_TRAIN = 1500
NUM_HELDOUT = 300
STEPS = 300
HELDOUT_SEED = 99

CONDITIONS = ("heard", "silenced", "silenced, length kept", "transcript")
"""How the sounds reach the judge. Silence is as long as another held-out sound, or, where the length is kept, as long
as the sound it stands for: what the judge then finds, it finds in the length. Transcripts alone are equal in a pair."""


@dataclass(frozen=True, slots=True)
class Heard:
    """How often the judge prefers the reply that fits the sound; without a preference it counts as half.

    Attributes:
        condition: one of `CONDITIONS`.
        accuracy: mean over pairs, whose two sounds count as one, with its interval.
        per_property: the same for each of `PROPERTIES`.
        consistency: share of comparisons whose two orders mirror each other.
        num_unreadable: comparisons without a readable verdict, counted as half.
    """

    condition: str
    num_pairs: int
    accuracy: Interval
    per_property: dict[str, Interval]
    consistency: float
    num_unreadable: int


def build_hearing_judge(
    *, seed: int, output: Path = Path("checkpoints/hearing_judge"), work: Path = Path("build/hearing")
) -> list[Heard]:
    """Speak the pairs, train, measure, write the card; the figures."""
    work, output = work.absolute(), output.absolute()
    clips = ClipStore(str(work))
    rows = heard_rows(StepAudio("checkpoints/policy"), list(heard_pairs(seed=seed, num=NUM_TRAIN)), clips=clips)
    data = work / "rows.arrow"
    with pa.ipc.new_file(str(data), rows.schema) as file:
        file.write_batch(rows)
    phase = PhaseSettings(
        name="hearing", data=str(data), steps=STEPS, rows_per_step=48, lr=1e-3, warmup_steps=20, cosine=True
    )
    run_recipe("hearing_judge.yaml", f"run.seed={seed}", f"run.output={output}", f"clips={work}", phases=[phase])
    figures = measure(output, work=work)
    heard, silenced, *_ = figures
    write_card(
        output,
        f"The tiny hearing judge of the quickstart, seed {seed}: says which of two replies fits a sound.",
        rebuild="python -m spoken_world.hearing",
        measured=f"{heard.num_pairs} held-out pairs of sounds of the same words, new sentences and voices, in both "
        f"orders: the fitting reply preferred in {heard.accuracy.mean:.1%} ({_bounds(heard.accuracy)}), with silenced "
        f"sound in {silenced.accuracy.mean:.1%} ({_bounds(silenced.accuracy)}).",
    )
    return figures


def measure(checkpoint: Path, *, work: Path = Path("build/hearing"), num: int = NUM_HELDOUT) -> list[Heard]:
    """Every condition, on held-out pairs whose sounds are made in `work`."""
    return asyncio.run(_measured(checkpoint, clips=ClipStore(str(work)), num=num))


async def _measured(checkpoint: Path, *, clips: ClipStore, num: int) -> list[Heard]:
    family = StepAudio(checkpoint)
    pairs = list(heard_pairs(seed=HELDOUT_SEED, num=num, heldout=True))
    sounds = speak_pairs(pairs, clips)
    async with served(family) as engine:
        return [
            await judge_heard(engine, family, pairs, sounds=sounds, clips=clips, condition=name) for name in CONDITIONS
        ]


def speak_pairs(pairs: Sequence[HeardPair], clips: ClipStore) -> list[AudioPart]:
    """Both sounds of every pair, in their order; 27 ms each."""
    return [speak(spoken, clips) for pair in pairs for spoken in pair.spoken]


async def judge_heard(
    engine: Engine,
    family: ModelFamily,
    pairs: Sequence[HeardPair],
    *,
    sounds: Sequence[AudioPart],
    clips: ClipStore,
    condition: str,
) -> Heard:
    """Ask a served judge about both sounds of every pair, in both orders.

    Args:
        sounds: of `speak_pairs`.
        condition: one of `CONDITIONS`.

    Raises:
        EngineError: the engine failed.
    """
    hears = "transcript" if condition == "transcript" else "sound"
    judge = GenerativeJudge(JudgeServices(engine=engine, family=family, clips=clips), hears=hears)
    if condition.startswith("silenced"):
        sounds = _silenced(sounds, clips=clips, keep_length="length kept" in condition)

    async def credit(number: int, which: int) -> tuple[float, bool, bool]:
        """(1 for the fitting reply, both orders agree, unreadable)."""
        pair = pairs[number]
        try:
            found = await judge.compare(pair.comparison(sounds[2 * number + which]))
        except VerdictError:
            return 0.5, False, True
        preferred = 0.5 if found.value == 0.0 else float((found.value > 0.0) == pair.response_fits(which))
        return preferred, found.as_first == found.as_second, False

    judged = await all_or_first_error(credit(number, which) for number in range(len(pairs)) for which in (0, 1))
    credits = np.array([one[0] for one in judged]).reshape(-1, 2).mean(axis=1)
    of = np.array([pair.property for pair in pairs])
    return Heard(
        condition,
        len(pairs),
        mean_interval(credits),
        {name: mean_interval(credits[of == name]) for name in PROPERTIES},
        float(np.mean([one[1] for one in judged])),
        sum(one[2] for one in judged),
    )


def _silenced(sounds: Sequence[AudioPart], *, clips: ClipStore, keep_length: bool) -> list[AudioPart]:
    lengths = [len(clips.get(sound.sha256).samples) for sound in sounds]
    if not keep_length:
        Random(0).shuffle(lengths)
    silences = [clips.put(np.zeros(length, dtype=np.float32)) for length in lengths]
    return [
        AudioPart(clips.uri(clip.sha256), clip.sha256, SAMPLE_RATE_HZ, transcript=sound.transcript)
        for clip, sound in zip(silences, sounds, strict=True)
    ]


def _bounds(interval: Interval) -> str:
    return f"95 % from {interval.low:.3f} to {interval.high:.3f}"


def heard_table(figures: Sequence[Heard]) -> str:
    """One condition per line."""
    head = f"{'sounds':<24}{'pairs':>6}{'fitting':>9}  {'95 %':<16}{'rate':>7}{'pitch':>7}{'agree':>7}{'unread':>8}"
    rows = [
        f"{one.condition:<24}{one.num_pairs:>6}{one.accuracy.mean:>9.3f}  "
        f"{f'{one.accuracy.low:.3f} to {one.accuracy.high:.3f}':<16}{one.per_property['rate'].mean:>7.3f}"
        f"{one.per_property['pitch'].mean:>7.3f}{one.consistency:>7.3f}{one.num_unreadable:>8}"
        for one in figures
    ]
    return "\n".join([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("checkpoints/hearing_judge"), help="the finished judge")
    parser.add_argument("--work", type=Path, default=Path("build/hearing"), help="folder for sounds and rows")
    parser.add_argument("--figures", type=Path, help="file to write the figures to, as JSON")
    parser.add_argument("--measure", action="store_true", help="measure the judge that is there, train nothing")
    given = parser.parse_args()
    if given.measure:
        figures = measure(given.output, work=given.work)
    else:
        figures = build_hearing_judge(seed=given.seed, output=given.output, work=given.work)
    print(heard_table(figures))
    if given.figures is not None:
        write_json_atomic(given.figures, [asdict(one) for one in figures])


if __name__ == "__main__":
    main()
