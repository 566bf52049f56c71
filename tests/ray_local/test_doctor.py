"""The doctor passes a healthy run, and names each of eight planted faults by the right row.

Faults are examined in this process, all over one engine; the command is run once as a user runs it.
"""

import asyncio
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from rlaudio.actors.rollout import RolloutWorker
from rlaudio.config import RunConfig
from rlaudio.config_loader import load_config
from rlaudio.data.records import read_records
from rlaudio.doctor.checkup import Effort
from rlaudio.doctor.examine import CHECKS, examine
from rlaudio.doctor.rows import Row, failures
from rlaudio.doctor.sides import LocalSides
from rlaudio.errors import DoctorError
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import NullTracker
from rlaudio.recipes.doctor import examine_before_training
from rlaudio.types import PromptRecord, WeightVersion

# vLLM 0.32 and DeepSpeed 0.19 warn on import and at start; not ours to fix. Importing takes minutes on a busy machine.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
CONFIG = QUICKSTART / "config.yaml"
SMALL = Effort(records=3, model_lengths=9, multi_clip=2, deaf=3, deaf_tokens=6, updates=2)
START = WeightVersion(0, 0)


@dataclass(frozen=True)
class Clinic:
    """One engine for every patient; each brings a configuration, a worker and a trainer of its own."""

    config: RunConfig
    records: list[PromptRecord]
    engine: Any

    def config_of(self, family: str = "", *, encode_once: bool = False) -> RunConfig:
        config = replace(self.config, rollout=replace(self.config.rollout, encode_once=encode_once))
        return replace(config, model=replace(config.model, family=f"tests.faults:{family}")) if family else config

    async def examine(
        self, config: RunConfig, *, worker: type[RolloutWorker] = RolloutWorker, engine: Any = None
    ) -> list[Row]:
        sides = await self.sides(config, worker=worker, engine=engine)
        return await examine(config, records=self.records, sides=sides, quick=False, effort=SMALL)

    async def sides(
        self, config: RunConfig, *, worker: type[RolloutWorker] = RolloutWorker, engine: Any = None
    ) -> LocalSides:
        from rlaudio.learner.messages import TrainerSpec
        from rlaudio.learner.rank import RankWorker

        await self._restore()
        rollout = worker(config, on_gpu=False, engine=engine or self.engine)
        await rollout.start(START)
        spec = TrainerSpec(model=config.model, clips_root=config.data.clips, learner=config.learner)
        return LocalSides(rollout, RankWorker(spec))

    async def _restore(self) -> None:
        """The checkpoint's weights, and nothing remembered of the last patient's sounds."""
        import torch

        from rlaudio.models.families import open_family
        from rlaudio.weights.snapshot import Snapshot

        family = open_family(self.config.model)
        module = family.load_module(dtype=torch.float32)
        trained = [(name, tensor) for name, tensor in family.public_names(module) if not family.frozen(name)]
        update = Snapshot.of(trained, version=START, wire_dtype="float32").to_update()
        await self.engine.update_weights(update, deadline_s=60.0)
        await self.engine._call(lambda engine: engine.reset_mm_cache())


@pytest.fixture(scope="module")
def clinic(small_world: Path) -> Iterator[Clinic]:
    import torch.distributed as dist

    config: RunConfig = load_config(
        RunConfig, CONFIG, [f"data.train={small_world}/train.jsonl", f"data.clips={small_world}"]
    )
    engine = asyncio.run(started(config))
    # vLLM has opened a world of one, and DeepSpeed takes what it finds.
    environment = {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    os.environ.update(environment)
    from rlaudio.learner.optimization import leave_ranks, prepare_deepspeed

    prepare_deepspeed()
    import deepspeed

    assert dist.is_initialized()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    yield Clinic(config, read_records(config.data.train), engine)
    asyncio.run(engine.close())
    leave_ranks()  # vLLM has taken its world down: DeepSpeed would go on using it
    for name in environment:
        os.environ.pop(name, None)


async def started(config: RunConfig) -> Any:
    from rlaudio.actors.serving import start_engine
    from rlaudio.models.families import open_family

    return await start_engine(
        config.rollout.engine,
        family=open_family(config.model),
        dtype="float32",
        on_gpu=False,
        version=START,
        seed=0,
    )


def told(rows: list[Row]) -> str:
    return "\n".join(f"{row.name}: {row.verdict} {dict(row.measured)} {row.reason}" for row in rows)


async def test_a_healthy_run_passes_every_check(clinic: Clinic) -> None:
    rows = await clinic.examine(clinic.config_of())
    assert [row.name for row in rows] == [check.name for check in CHECKS]
    assert {row.verdict for row in rows} == {"pass"}, told(rows)
    by_name = {row.name: row for row in rows}
    assert 0.0 <= float(by_name["logprobs"].measured["max_nats"]) < 1e-4
    assert by_name["token_counts"].measured["differences"] == 0
    assert by_name["weights_sync"].measured["unseen"] == 0


@pytest.mark.parametrize(
    ("family", "check", "reason"),
    [
        ("OneTokenOff", "token_counts", r"rule \d+, player \d+, engine's prompt \d+"),
        ("OtherFloor", "features", "log-mel features differ by .*: another floor"),
        ("SwappedTensors", "checkpoint_weights", "k_proj.weight is what the files call .*v_proj.weight.*swapped"),
        ("WrongEndOfTurn", "special_ids", r"turn_end is 7 \(<\|pad\|>\), tokenizer.json has <\|EOT\|> = 1"),
        ("SkippedActivation", "features", "the features being equal: encoder or adaptor compute something else"),
    ],
)
async def test_a_fault_of_a_family_is_named(clinic: Clinic, family: str, check: str, reason: str) -> None:
    rows = await clinic.examine(clinic.config_of(family))
    assert_first_failure(rows, check, reason)


async def test_a_deaf_encoder_is_named_where_both_sides_agree(clinic: Clinic) -> None:
    rows = await clinic.examine(clinic.config_of("DeafEncoder", encode_once=True))
    assert_first_failure(rows, "deaf", "the engine is deaf: silence .*the trainer is deaf")
    assert [row.name for row in failures(rows)] == ["deaf"], "nothing but the deaf test sees it"


async def test_stale_weights_are_named(clinic: Clinic) -> None:
    from tests.faults import StaleEngine

    rows = await clinic.examine(clinic.config_of(), engine=StaleEngine(clinic.engine))
    assert_first_failure(rows, "weights_sync", "other values \\(stale or damaged\\)|holds other weights")
    assert [row.name for row in failures(rows)] == ["weights_sync", "fresh_weights"], told(rows)
    assert "stale" in rows[-1].reason


async def test_a_template_that_keeps_thinking_is_named(clinic: Clinic) -> None:
    from tests.faults import KeepsThinking

    rows = await clinic.examine(clinic.config_of(), worker=KeepsThinking)
    assert_first_failure(rows, "template", "the template keeps thinking")
    assert [row.name for row in failures(rows)] == ["template"], told(rows)


async def test_training_refuses_to_start_unless_told_otherwise(clinic: Clinic, tmp_path: Path) -> None:
    config = clinic.config_of("WrongEndOfTurn")
    tracker, said = Tracked(), io.StringIO()
    with pytest.raises(DoctorError, match=r"(?s)refuses to start.*special_ids: turn_end is 7.*doctor.on_failure=warn"):
        await before_training(clinic, config, tmp_path / "first.json", tracker, said)
    assert tracker.numbers["doctor/special_ids/failed"] == 1.0
    assert tracker.numbers["doctor/token_counts/differences"] == 0.0
    assert tracker.files == [tmp_path / "first.json"]
    written = json.loads((tmp_path / "first.json").read_text())
    assert written["verdict"] == "fail"
    assert {row["name"] for row in written["rows"]} == {check.name for check in CHECKS if check.quick}

    warned = replace(config, doctor=replace(config.doctor, on_failure="warn"))
    await before_training(clinic, warned, tmp_path / "second.json", tracker, said)
    assert "training goes on although" in said.getvalue()


async def test_the_checks_before_training_leave_the_trainer_as_it_was(clinic: Clinic, tmp_path: Path) -> None:
    sides = await clinic.sides(clinic.config_of())
    before = (sides.rank.trainer.version, sides.rank.trainer.step_index, sides.rank.snapshot().checksums)
    path, tracker = tmp_path / "doctor.json", Tracked()
    with Progress(stream=io.StringIO()) as progress:
        await examine_before_training(
            clinic.config,
            config_path=CONFIG,
            records=clinic.records,
            sides=sides,
            path=path,
            tracker=tracker,
            progress=progress,
        )
    assert (sides.rank.trainer.version, sides.rank.trainer.step_index, sides.rank.snapshot().checksums) == before


async def before_training(clinic: Clinic, config: RunConfig, path: Path, tracker: "Tracked", said: io.StringIO) -> None:
    sides = await clinic.sides(config)
    with Progress(stream=said) as progress:
        await examine_before_training(
            config,
            config_path=CONFIG,
            records=clinic.records,
            sides=sides,
            path=path,
            tracker=tracker,
            progress=progress,
        )


class Tracked(NullTracker):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}
        self.files: list[Path] = []

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        self.numbers |= metrics

    def log_artifact(self, path: Path) -> None:
        self.files.append(path)


def assert_first_failure(rows: list[Row], check: str, reason: str) -> None:
    """The named check fails, for the planted reason, and nothing before it does."""
    failed = failures(rows)
    assert failed and failed[0].name == check, told(rows)
    assert re.search(reason, failed[0].reason), failed[0].reason
    assert failed[0].next_step


def test_the_command_passes_on_the_quickstart(small_world: Path, tmp_path: Path) -> None:
    overrides = [
        *(f"data.train={small_world}/train.jsonl", f"data.clips={small_world}", f"run.root={tmp_path}"),
        *(f"data.heldout.{name}={small_world}/{name}.jsonl" for name in ("heldout", "heldout_voices")),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "rlaudio.cli.main", "doctor", str(CONFIG), *overrides]
    done = subprocess.run(command, env=environment, cwd=ROOT, text=True, capture_output=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    path = Path(re.search(r"^json: (.+)$", done.stdout, re.MULTILINE).group(1))  # type: ignore[union-attr]
    report = json.loads(path.read_text())
    assert path.parent == tmp_path
    assert report["schema"] == 1 and report["verdict"] == "pass"
    assert [row["name"] for row in report["rows"]] == [check.name for check in CHECKS]
    counts = next(row for row in report["rows"] if row["name"] == "token_counts")["measured"]
    assert counts["prompts_through_both"] >= 400 and counts["differences"] == 0
