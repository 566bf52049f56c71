"""Rebuild both checkpoints from nothing: `python -m spoken_world.base`, in the folder of the quickstart.

The world for supervised training, two random tiny checkpoints, the policy's phases, the judge's phases. What is there
already is not made again, so an interrupted rebuild goes on with the part it was in.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import time
from pathlib import Path

from rlaudio.actors.serving import start_engine
from rlaudio.cli.main import main as rlaudio
from rlaudio.config import EngineConfig
from rlaudio.models.step_audio import StepAudio, create_tiny
from rlaudio.rewards.calibration import Calibration
from rlaudio.runs import write_text_atomic
from rlaudio.types import WeightVersion
from spoken_world.heldout import write_heldout
from spoken_world.judging import calibrate_judge, judge_phases
from spoken_world.make import WorldConfig, make_world
from spoken_world.vocabulary import WORDS

BASE_WORLD = WorldConfig(seed=7, train=0, heldout=0, heldout_voices=0, base=6000)


def build_policy(*, seed: int) -> None:
    """Sounds, then the three phases of `policy.yaml`."""
    make_world(Path("base_data"), BASE_WORLD, num_processes=2)
    _fresh("build/policy-init", seed=seed)
    _run("policy.yaml", f"run.seed={seed}")
    _write_card(
        "policy", f"The tiny Step-Audio policy of the quickstart, seed {seed}: hears 16 kHz speech, reasons, replies."
    )


def build_judge(*, seed: int) -> None:
    """Comparisons with known verdicts, then the phases that `spoken_world.judging` asks for."""
    _fresh("build/judge-init", seed=seed)
    write_heldout(Path("build/judge-heldout.jsonl"))
    phases = judge_phases(Path("build/judge-rows"), family=StepAudio(Path("build/judge-init")), seed=seed)
    written = ", ".join(
        "{" + ", ".join(f"{name}: {_yaml(value)}" for name, value in vars(phase).items()) + "}" for phase in phases
    )
    _run("judge.yaml", f"run.seed={seed}", f"phases=[{written}]")
    figures = asyncio.run(_calibrated(Path("checkpoints/judge"), seed=seed))
    _write_card(
        "judge",
        f"The tiny generative judge of the quickstart, seed {seed}: compares a reply with a reference reply.",
        measured=calibration_line(figures),
    )


async def _calibrated(path: Path, *, seed: int) -> Calibration:
    """Figures of the finished judge on comparisons it never learned from; about 12 s."""
    family = StepAudio(path)
    # As `config.yaml` serves it.
    engine = await start_engine(
        EngineConfig(max_model_len=320, max_num_seqs=64),
        family=family,
        dtype="float32",
        on_gpu=False,
        version=WeightVersion(0, 0),
        seed=seed,
    )
    try:
        return await calibrate_judge(engine, family, num=300)
    finally:
        await engine.close()


def calibration_line(figures: Calibration) -> str:
    """The judge's figures as its card says them."""
    return (
        f"{figures.num_pairs} held-out comparisons in both orders: right verdict of five {figures.accuracy:.0%}, right "
        f"sign {figures.sign_accuracy:.0%}, orders consistent {figures.consistency:.0%}, unreadable "
        f"{figures.failure_rate:.1%}."
    )


def _fresh(path: str, *, seed: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    create_tiny(Path(path), words=list(WORDS), seed=seed)


def _run(config: str, *overrides: str) -> None:
    code = rlaudio(["train", config, *overrides])
    if code:
        sys.exit(code)


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(Path(value).absolute()) if isinstance(value, str) and value.endswith(".arrow") else str(value)


def _write_card(name: str, what: str, *, measured: str = "") -> None:
    path = Path("checkpoints") / name
    size = sum(file.stat().st_size for file in path.iterdir())
    write_text_atomic(
        path / "README.md",
        f"""# {name}

{what}

- Layout: public Step-Audio names (`encoder.*`, `adapter.*`, `model.*`), safetensors, {size / 1e6:.1f} MB.
- Data: sounds and texts of `examples/quickstart/spoken_world`, made with eSpeak NG voices; no other data.
- Rebuild: `make base` (this one was made on {time.strftime("%Y-%m-%d")}).
{f"- Measured: {measured}{chr(10)}" if measured else ""}- License: Apache-2.0.
- It knows the closed vocabulary of the spoken world and nothing else.
""",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("policy", "judge"), help="build one of the two")
    arguments = parser.parse_args()
    if arguments.only != "judge":
        build_policy(seed=arguments.seed)
    if arguments.only != "policy":
        build_judge(seed=arguments.seed)


if __name__ == "__main__":
    main()
