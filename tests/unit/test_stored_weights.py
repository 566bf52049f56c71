"""Which checkpoints a running engine may go on with: those that differ from its own in trained weights alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlaudio.config import ModelSettings
from rlaudio.models.step_audio import create_tiny
from rlaudio.recipes.stored_weights import StoredWeights, _read, differ_in_weights_alone
from rlaudio.types import WeightVersion
from rlaudio.weights.shares import assemble
from tests.conftest import TINY_WORDS

SAFETENSORS = "model.safetensors"


def change(path: Path, kind: Callable[[str], bool]) -> None:
    tensors = load_file(path / SAFETENSORS)
    name = next(name for name in sorted(tensors) if kind(name))
    tensors[name] = tensors[name] + 1
    save_file(tensors, path / SAFETENSORS)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    first, second = (create_tiny(tmp_path / name, words=TINY_WORDS, seed=0) for name in ("a", "b"))
    change(second.path, lambda name: not second.frozen(name))
    return first.path, second.path


def alike(pair: tuple[Path, Path]) -> bool:
    return differ_in_weights_alone(ModelSettings(path=str(pair[0])), str(pair[1]))


def test_trained_weights_and_notes_may_differ(pair: tuple[Path, Path]) -> None:
    (pair[1] / "README.md").write_text("another one")
    assert alike(pair)


def test_an_encoder_tokenizer_or_configuration_may_not(pair: tuple[Path, Path], tmp_path: Path) -> None:
    tokenizer = pair[1] / "tokenizer_config.json"
    kept = tokenizer.read_text()
    tokenizer.write_text(json.dumps(json.loads(kept) | {"model_max_length": 17}))
    assert not alike(pair)
    tokenizer.write_text(kept)
    (pair[1] / "added_tokens.json").write_text("{}")
    assert not alike(pair)
    (pair[1] / "added_tokens.json").unlink()
    assert alike(pair)
    change(pair[1], lambda name: "encoder" in name)
    assert not alike(pair)
    assert not alike((pair[0], create_tiny(tmp_path / "c", words=[*TINY_WORDS, "more"], seed=0).path))
    assert not alike((pair[0], tmp_path / "missing"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_is_what_a_learner_would_hand_out(pair: tuple[Path, Path], dtype: str) -> None:
    stored = StoredWeights(ModelSettings(path=str(pair[1]), dtype=dtype), WeightVersion(0, 3))
    read = assemble([_read(stored)])
    tensors = {name: tensor for name, tensor in load_file(pair[1] / SAFETENSORS).items() if "encoder" not in name}
    assert read.version == WeightVersion(0, 3)
    assert read.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        wire = tensor.bfloat16().view(torch.uint16) if dtype == "bfloat16" else tensor
        assert (read.tensors[name] == wire.numpy()).all(), name
