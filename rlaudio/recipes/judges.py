"""How good is a judge: it is served by one actor, asked about every set, and the figures are written down."""

import math
from collections.abc import Sequence
from pathlib import Path

import ray

from rlaudio.actors.judging import JudgeWorker
from rlaudio.actors.members import DEATHS, ActorPool, line
from rlaudio.actors.serving import serving_environment
from rlaudio.audio.store import ClipStore
from rlaudio.config_judges import JudgeConfig
from rlaudio.errors import EngineError, JudgeError
from rlaudio.observe.progress import Progress
from rlaudio.recipes.cluster import actor_environment
from rlaudio.rewards.judged_sets import Figures, JudgedSet, path_of, read_set
from rlaudio.rewards.verdicts import Answer, Ask
from rlaudio.runs import write_json_atomic, write_text_atomic

FIGURES, TABLE = "calibration.json", "calibration.txt"
"""What is left in the run folder, beside every verdict of every set."""

_SPARE_S = 60.0
"""On top of the deadlines of single answers, which the actor keeps by itself."""


def read_sets(config: JudgeConfig) -> list[JudgedSet]:
    """Every set that the configuration names. Raises DataError."""
    clips = ClipStore(config.clips) if config.clips else None
    settings = config.calibration
    return [read_set(one, asking=config.asking, clips=clips, num_resamples=settings.bootstrap) for one in settings.sets]


async def measure_judge(
    config: JudgeConfig, sets: Sequence[JudgedSet], *, folder: Path, progress: Progress
) -> dict[str, Figures]:
    """Ask the judge about all sets and write `calibration.json`, `calibration.txt` and the verdicts into `folder`.

    Raises:
        EngineError: it could not be served, or died.
        JudgeError: it gave no answer in time.
    """
    settings, model = config.calibration, config.judge_model
    environment = actor_environment()
    if model.path:
        on_gpu = settings.num_gpus > 0
        environment |= serving_environment(model.engine, model=model.path, dtype=model.dtype, on_gpu=on_gpu)
    actor = ray.remote(JudgeWorker).options(
        num_cpus=settings.num_cpus, num_gpus=settings.num_gpus, runtime_env={"env_vars": environment}
    )
    pool = ActorPool("calibration", {"judge-0": actor.remote(config)}, alive_deadline_s=_SPARE_S, told=progress.say)
    progress.stage("starting the judge")
    try:
        await pool.start(lambda handle: handle.start.remote(), deadline_s=settings.start_deadline_s)
        found: dict[str, Figures] = {}
        for one in sets:
            progress.stage(f"judging {one.name}")
            answers = await _answers(pool, one.asks, config=config, progress=progress)
            write_text_atomic(path_of(folder, one.name), one.lines(answers))
            found[one.name] = one.figures(answers)
    finally:
        pool.stop()
    write_json_atomic(folder / FIGURES, {name: figures.to_json() for name, figures in found.items()})
    write_text_atomic(folder / TABLE, tables(found) + "\n")
    return found


def tables(found: dict[str, Figures]) -> str:
    """All sets, ready to print."""
    return "\n\n".join(f"== {name}\n{figures.table()}" for name, figures in found.items())


async def _answers(pool: ActorPool, asks: Sequence[Ask], *, config: JudgeConfig, progress: Progress) -> list[Answer]:
    """In parts of a few rounds of `max_in_flight`, so that progress is seen."""
    settings = config.calibration
    size = 4 * settings.max_in_flight
    answers: list[Answer] = []
    for start in range(0, len(asks), size):
        part = list(asks[start : start + size])
        deadline_s = math.ceil(len(part) / settings.max_in_flight) * settings.verdict_deadline_s + _SPARE_S
        async with pool.lease() as member:
            try:
                answers += await pool.call(member, member.handle.verdicts.remote(part), deadline_s=deadline_s)
            except TimeoutError as error:
                raise JudgeError(
                    f"{member.name} gave no verdicts within {deadline_s:g} s: raise calibration.verdict_deadline_s, or "
                    "look at its engine in Ray's logs"
                ) from error
            except DEATHS as error:
                raise EngineError(f"{member.name} died while it judged ({line(error)}): see Ray's logs") from error
        progress.update(len(answers), len(asks))
    return answers
