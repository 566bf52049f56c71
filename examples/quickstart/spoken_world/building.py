"""What every rebuild of a checkpoint does: a fresh one, the project's own supervised recipe, a served judge, a card."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from rlaudio.actors.serving import engine_settings, start_engine
from rlaudio.cli.main import main as rlaudio
from rlaudio.config import EngineConfig, PhaseSettings
from rlaudio.engines.base import Engine
from rlaudio.engines.settings import apply_environment
from rlaudio.errors import DataError
from rlaudio.models.base import ModelFamily
from rlaudio.models.step_audio import StepAudio, create_tiny
from rlaudio.runs import write_text_atomic
from rlaudio.types import WeightVersion


def fresh(path: Path, *, words: Sequence[str], seed: int) -> None:
    """A random tiny checkpoint in place of what is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    create_tiny(path, words=list(words), seed=seed)


def widened(path: Path, *, narrow: Path, words: Sequence[str], seed: int) -> StepAudio:
    """The tiny checkpoint at `narrow` with a longer list of words, in place of what is at `path`.

    Args:
        words: those that `narrow` was made with, then new ones, whose embeddings are drawn at random.

    Raises:
        DataError: `words` does not begin with the words of `narrow`.
    """
    old = StepAudio(narrow)
    fresh(path, words=words, seed=seed)
    new = StepAudio(path)
    size = old.tokenizer.vocab_size
    if old.tokenizer.decode(list(range(size))) != new.tokenizer.decode(list(range(size))):
        raise DataError(f"{path}: its words must begin with those of {narrow}, in their order")
    module = new.load_module(dtype=torch.float32)
    known = old.load_module(dtype=torch.float32).state_dict()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            # Only the embedding differs in shape, by the new words behind the old ones.
            tensor[: len(known[name])].copy_(known[name])
    new.save(module, path, dtype=torch.float32)
    return StepAudio(path)


def run_recipe(config: str, *overrides: str, phases: Sequence[PhaseSettings] = ()) -> None:
    """`rlaudio train`; leaves with its code when it fails. `phases` take the place of the file's."""
    if phases:
        written = ", ".join(
            "{" + ", ".join(f"{name}: {_yaml(value)}" for name, value in vars(phase).items()) + "}" for phase in phases
        )
        overrides = (*overrides, f"phases=[{written}]")
    code = rlaudio(["train", config, *overrides])
    if code:
        sys.exit(code)


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(Path(value).absolute()) if isinstance(value, str) and value.endswith(".arrow") else str(value)


@asynccontextmanager
async def served(family: ModelFamily, *, max_model_len: int = 320, seed: int = 0) -> AsyncIterator[Engine]:
    """An engine with a finished checkpoint, as `config.yaml` serves a judge; longer texts need a longer model."""
    config = EngineConfig(max_model_len=max_model_len, max_num_seqs=64)
    apply_environment(engine_settings(config, model=str(family.path), dtype="float32", on_gpu=False))
    engine = await start_engine(
        config, family=family, dtype="float32", on_gpu=False, version=WeightVersion(0, 0), seed=seed
    )
    try:
        yield engine
    finally:
        await engine.close()


def write_card(path: Path, what: str, *, rebuild: str = "make base", measured: str = "", knows: str = "") -> None:
    """`README.md` beside a checkpoint's weights."""
    size = sum(file.stat().st_size for file in path.iterdir())
    write_text_atomic(
        path / "README.md",
        f"""# {path.name}

{what}

- Layout: public Step-Audio names (`encoder.*`, `adapter.*`, `model.*`), safetensors, {size / 1e6:.1f} MB.
- Data: sounds and texts of `examples/quickstart/spoken_world`, made with eSpeak NG voices; no other data.
- Rebuild: `{rebuild}` (this one was made on {time.strftime("%Y-%m-%d")}).
{f"- Measured: {measured}{chr(10)}" if measured else ""}- License: Apache-2.0.
- {knows or "It knows the closed vocabulary of the spoken world and nothing else."}
""",
    )
