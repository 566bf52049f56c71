"""What every side starts from: one checkpoint and one list of prompts, in the layout each of them reads.

The checkpoint is random. A random policy ends its turn early and samples audio placeholders, which no trained one does,
and no two systems agree on how to forbid it. So one direction of the residual stream is kept constant and the heads of
all control ids point against it: their probability is below 1e-9 on every side, nothing has to be ignored or banned,
every response has all its tokens, and log-probabilities can be compared as they are.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen2AudioConfig

from rlaudio.audio.store import ClipStore
from rlaudio.data.records import write_records
from rlaudio.models import checkpoints
from rlaudio.models.qwen_audio.config import PREPROCESSOR_FILE, tiny_qwen2_audio
from rlaudio.models.qwen_audio.family import DEFAULT_SYSTEM, Qwen2Audio
from rlaudio.models.qwen_audio.modeling import Qwen2AudioModule
from rlaudio.models.qwen_audio.tokenizer import QwenTokenizer, build_byte_tokenizer
from rlaudio.types import SAMPLE_RATE_HZ, AudioPart, FloatArray, Message, PromptRecord, TextPart

WINDOW_S = 30
"""The public model's: its encoder takes nothing shorter."""

QUESTION = "What do you hear?"
CONSTANT = 4.0
AGAINST = -60.0
MAX_CONTROL_PROBABILITY = 1e-9

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + DEFAULT_SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As the public checkpoints have it, for text alone."""


@dataclass(frozen=True)
class World:
    """A folder with everything in it.

    Attributes:
        model: Qwen2-Audio checkpoint.
        decoder: its decoder as a plain Qwen2 checkpoint, for peers without ears.
        records: prompts as rlaudio reads them, sounds below `root`.
        prompts: the same as JSON lines of id, text, audio (absolute path, or null).
    """

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def decoder(self) -> Path:
        return self.root / "decoder"

    @property
    def records(self) -> Path:
        return self.root / "records.jsonl"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.jsonl"


def make_world(root: Path, *, audio: bool, num_prompts: int, seed: int = 0) -> World:
    """Write checkpoint and prompts; every prompt is another sound (1.5 to 4 s), or another text (60 to 120 letters)."""
    world = World(root)
    root.mkdir(parents=True, exist_ok=True)
    family = _write_model(world, seed=seed)
    _check_controls(family)
    rng, words = np.random.default_rng(seed), random.Random(seed)
    clips = ClipStore(str(root))
    records, prompts = [], []
    for number in range(num_prompts):
        name, path = f"prompt{number:04d}", None
        if audio:
            clip = clips.put(_speech(int(rng.uniform(1.5, 4.0) * SAMPLE_RATE_HZ), rng=rng))
            path = str((root / clips.uri(clip.sha256)).resolve())
            parts: tuple[Any, ...] = (
                AudioPart(clips.uri(clip.sha256), clip.sha256, SAMPLE_RATE_HZ),
                TextPart(QUESTION),
            )
            text = QUESTION
        else:
            text = "".join(words.choices("abcdefghijklmnopqrstuvwxyz     ", k=words.randint(60, 120))).strip()
            parts = (TextPart(text),)
        records.append(PromptRecord(name, "bench", (Message("user", parts),)))
        prompts.append({"id": name, "text": text, "audio": path})
    write_records(world.records, records)
    world.prompts.write_text("".join(json.dumps(one) + "\n" for one in prompts), encoding="utf-8")
    return world


def _speech(num_samples: int, *, rng: np.random.Generator) -> FloatArray:
    """A gliding, pulsing tone with overtones and some breath."""
    time_s = np.arange(num_samples) / SAMPLE_RATE_HZ
    phase = 2 * np.pi * rng.uniform(100, 250) * time_s + 3 * np.sin(2 * np.pi * 2.3 * time_s)
    voiced = sum(np.sin(order * phase) / order for order in range(1, 9)) * (1 + np.sin(2 * np.pi * 4 * time_s))
    return (0.1 * voiced + 0.01 * rng.standard_normal(num_samples)).clip(-1, 1).astype(np.float32)


def _write_model(world: World, *, seed: int) -> Qwen2Audio:
    """1.0M parameters: a tower of 0.2M (public: 8 % of the weights), a decoder of 0.7M."""
    file = build_byte_tokenizer()
    vocab_size = file.get_vocab_size(with_added_tokens=True)
    tokenizer = QwenTokenizer(file, num_embeddings=vocab_size)
    ids = tokenizer.ids
    values = tiny_qwen2_audio(vocab_size=vocab_size, audio_token_id=ids.audio_pad, window_s=WINDOW_S)
    values["text_config"] |= {
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    module = Qwen2AudioModule(Qwen2AudioConfig.from_dict(values))
    module.initialise(seed=seed)
    _silence_controls(module, sorted({*ids.stop, *ids.banned}))
    extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "Qwen2AudioProcessor",
        "feature_size": 128,
        "chunk_length": WINDOW_S,
        "sampling_rate": SAMPLE_RATE_HZ,
        "return_attention_mask": True,
    }
    generation = {"eos_token_id": list(ids.stop), "pad_token_id": ids.pad, "do_sample": True}

    def write_files(folder: Path, config: dict[str, Any], *, hears: bool) -> None:
        tokenizer.save(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        files = {
            checkpoints.CONFIG_FILE: config,
            **({PREPROCESSOR_FILE: extractor} if hears else {}),
            "generation_config.json": generation,
            "tokenizer_config.json": settings | {"chat_template": CHAT_TEMPLATE},
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    tensors = dict(module.named_parameters())
    checkpoints.write_checkpoint(
        world.model, tensors, dtype=torch.float32, write_files=lambda folder: write_files(folder, values, hears=True)
    )
    decoder = _decoder_values(module)
    checkpoints.write_checkpoint(
        world.decoder,
        _decoder_tensors(tensors),
        dtype=torch.float32,
        write_files=lambda folder: write_files(folder, decoder, hears=False),
    )
    return Qwen2Audio(world.model)


def _decoder_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = "language_model."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _decoder_values(module: Qwen2AudioModule) -> dict[str, Any]:
    values: dict[str, Any] = module.decoder.config.to_dict()
    return values | {"architectures": ["Qwen2ForCausalLM"], "dtype": "float32"}


def _silence_controls(module: Qwen2AudioModule, controls: list[int]) -> None:
    """Dimension 0 of the residual stream is `CONSTANT` at every position and layer; the controls' heads dislike it."""
    with torch.no_grad():
        module.embedding[:, 0] = CONSTANT
        module.projection.weight[0] = 0.0
        module.projection.bias[0] = CONSTANT
        for layer in module.decoder.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        module.head.weight[:, 0] = 0.0
        module.head.weight[controls] = 0.0
        module.head.weight[controls, 0] = AGAINST


def _check_controls(family: Qwen2Audio) -> None:
    ids = family.tokenizer.ids
    module = family.load_module(dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (4, 128), generator=generator)
    with torch.no_grad():
        probabilities = module.logits(module(tokens, states=[], spans=[])).softmax(-1)
    worst = float(probabilities[..., sorted({*ids.stop, *ids.banned})].sum(-1).max())
    assert worst < MAX_CONTROL_PROBABILITY, f"control ids have a probability of {worst:.1e}: lower AGAINST"
