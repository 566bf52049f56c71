"""Evaluation: several checkpoints on the same held-out sets, each compared with the one before it."""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

from rlaudio.config_stages import EvaluationConfig
from rlaudio.data.run_data import RunData
from rlaudio.errors import WeightSyncError
from rlaudio.evals.heldout import evaluate, evaluate_siblings
from rlaudio.evals.summary import EvaluationResult, read_evaluation, summarise, write_evaluation
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import Tracker
from rlaudio.recipes.playing import PlayingActors, playing_actors
from rlaudio.recipes.stored_weights import differ_in_weights_alone
from rlaudio.runs import RunFolder, write_json_atomic


async def run_evaluation(
    config: EvaluationConfig, *, data: RunData, folder: RunFolder, tracker: Tracker, progress: Progress
) -> dict[str, Any]:
    """Evaluate every policy, those that lie in the folder already excepted, and write `report.json`.

    Returns:
        The content of `report.json`; see `compare`.

    Raises:
        EngineError, RolloutError, JudgeError: nothing could be played or judged; what was evaluated stays.
    """
    policies = config.policies or {"policy": config.model.path}
    found: dict[str, list[EvaluationResult]] = {}
    async with _Engines(config, progress=progress) as engines:
        for name, path in policies.items():
            files = {heldout: folder.path / f"evaluation-{name}-{heldout}.json" for heldout in data.heldout}
            more = {heldout: folder.path / f"siblings-{name}-{heldout}.json" for heldout in data.heldout}
            more = more if config.siblings else {}
            if not all(file.is_file() for file in (*files.values(), *more.values())):
                actors = await engines.of(name, path)
                await _evaluate_one(config, name, actors, data=data, files=files, more=more, progress=progress)
            found[name] = [read_evaluation(file) for file in files.values()]
    report = compare(found, paths=policies, seed=config.run.seed, num_resamples=config.evaluation.bootstrap)
    write_json_atomic(folder.report_json, report)
    for step, levels in enumerate(report["levels"].values()):
        for heldout, side in levels.items():
            values = {"accuracy": side["accuracy"]["all"], "reward": side["reward"]}
            tracker.log({f"{heldout}/{key}": value for key, value in values.items()}, step=step)
    return report


class _Engines:
    """Engines and judges, kept from one policy to the next where the policies differ in trained weights alone."""

    def __init__(self, config: EvaluationConfig, *, progress: Progress) -> None:
        self._config, self._progress = config, progress
        self._running = AsyncExitStack()
        self._actors: PlayingActors | None = None
        self._num_loaded = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._running.aclose()

    async def of(self, name: str, path: str) -> PlayingActors:
        """Actors with the weights of `path`. Raises as `playing_actors`."""
        if self._actors is not None and await asyncio.to_thread(differ_in_weights_alone, self._actors.model, path):
            self._num_loaded += 1
            self._progress.stage(f"loading the weights of {name}")
            try:
                await self._actors.load(path, number=self._num_loaded)
                return self._actors
            except WeightSyncError as error:  # too slow for `sync.deadline_s`, for one: a start has longer
                self._progress.say(f"{error}; engines start anew")
        await self._running.aclose()
        self._progress.stage(f"starting engines for {name}")
        chosen = dataclasses.replace(self._config, model=dataclasses.replace(self._config.model, path=path))
        self._actors = await self._running.enter_async_context(playing_actors(chosen, told=self._progress.say))
        return self._actors


async def _evaluate_one(
    config: EvaluationConfig,
    name: str,
    actors: PlayingActors,
    *,
    data: RunData,
    files: Mapping[str, Path],
    more: Mapping[str, Path],
    progress: Progress,
) -> None:
    """`more`: set -> file of its siblings; empty where none are asked for."""
    if not all(file.is_file() for file in files.values()):
        progress.stage(f"held-out dialogues of {name}")
        results = await evaluate(
            data.heldout,
            phase="after",
            rollouts=actors.rollouts,
            rewards=actors.rewards,
            settings=config.evaluation,
            progressed=progress.update,
            told=progress.say,
        )
        for result in results:
            write_evaluation(files[result.name], result)
    if all(file.is_file() for file in more.values()):
        return
    progress.stage(f"sampled siblings of {name}")
    sampled = await evaluate_siblings(
        {heldout: records[: config.evaluation.max_dialogues or None] for heldout, records in data.heldout.items()},
        num_siblings=config.siblings,
        num_records=config.sibling_records,
        rollouts=actors.rollouts,
        rewards=actors.rewards,
        progressed=progress.update,
        told=progress.say,
    )
    for result in sampled:
        write_evaluation(more[result.name], result)


def compare(
    found: Mapping[str, Sequence[EvaluationResult]], *, paths: Mapping[str, str], seed: int, num_resamples: int
) -> dict[str, Any]:
    """What `report.json` of an evaluation holds.

    Args:
        found: policy -> one result per set, all of the same sets.

    Returns:
        `{"policies": {NAME: path}, "levels": {NAME: {SET: side}}, "gains": {NAME: {SET: delta}}}` with sides and deltas
        as in `rlaudio.evals.summary.summarise`; a gain is over the policy before it, the first has none.

    Raises:
        DataError: the sets of two policies are not the same dialogues.
    """
    names = list(found)
    levels: dict[str, Any] = {}
    gains: dict[str, Any] = {}
    for before, name in zip([names[0], *names], names, strict=False):
        pair = summarise(
            [dataclasses.replace(one, phase="before") for one in found[before]],
            [dataclasses.replace(one, phase="after") for one in found[name]],
            seed=seed,
            throughput={},
            timings_s={},
            num_resamples=num_resamples,
        )
        sets = [one.name for one in found[name]]
        levels[name] = {heldout: pair[heldout]["after"] for heldout in sets}
        if before != name:
            gains[name] = {heldout: pair[heldout]["delta"] for heldout in sets}
    return {"policies": dict(paths), "levels": levels, "gains": gains}
