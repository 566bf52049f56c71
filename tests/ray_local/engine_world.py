"""What the engine tests share: tiny random policies, clips of noise, requests about them, and what must come back."""

import asyncio
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlaudio.engines.base import Engine, Generation, GenerationRequest, Sampling, WeightUpdate
from rlaudio.engines.settings import EngineSettings
from rlaudio.models.step_audio import StepAudio, create_tiny
from rlaudio.types import AudioClip, ClipSpan, WeightVersion
from rlaudio.weights.snapshot import Snapshot, WireDtype

WORDS = [f"w{i}" for i in range(50)]
MAX_LEN = 512
MAX_NUM_SEQS = 32
OLD, NEW = WeightVersion(1, 4), WeightVersion(1, 5)
BOUND_NATS = 1e-4
"""Between torch and vLLM."""
FRESH_NATS = 1e-5
"""Between an engine and another that was started from the weights it has now."""


@dataclass(frozen=True)
class World:
    """One family and the requests its engine understands."""

    family: StepAudio

    @classmethod
    def create(cls, path: Path, *, seed: int) -> "World":
        return cls(create_tiny(path, words=WORDS, seed=seed))

    def settings(self, **options: object) -> EngineSettings:
        return EngineSettings(
            model=str(self.family.path),
            max_model_len=MAX_LEN,
            max_num_seqs=MAX_NUM_SEQS,
            kv_cache_mb=32,
            options=self.family.engine_options() | options,
        )

    def request(
        self,
        name: str,
        sampling: Sampling,
        *,
        about: int = 0,
        clip_lengths: tuple[int, ...] = (9000,),
        surplus: int = 0,
        history: np.ndarray | None = None,
    ) -> GenerationRequest:
        """A turn about `about`: its clips, then `history` (ids already sampled). `surplus` adds wrong placeholders."""
        ids = self.family.tokenizer.ids
        clips = tuple(noise(100 * about + i, length) for i, length in enumerate(clip_lengths))
        prompt, spans = [ids.turn_start, *self.family.tokenizer.encode(f"w{about % 50}")], []
        for clip in clips:
            num_rows = self.family.num_audio_tokens(len(clip.samples)) + surplus
            prompt.append(ids.audio_start)
            spans.append(ClipSpan(clip.sha256, len(prompt), len(prompt) + num_rows))
            prompt += [ids.audio_pad] * num_rows + [ids.audio_end]
        prompt += [ids.turn_end, ids.turn_start]
        prompt_ids = np.array(prompt, np.int32)
        if history is not None:
            prompt_ids = np.concatenate([prompt_ids, history])
        return GenerationRequest(
            request_id=name, prompt_ids=prompt_ids, sampling=sampling, clips=clips, clip_spans=tuple(spans)
        )

    def sampling(self, num_tokens: int, *, seed: int | None = 0, temperature: float = 1.0) -> Sampling:
        return Sampling(
            max_new_tokens=num_tokens,
            seed=seed,
            temperature=temperature,
            banned_token_ids=self.family.tokenizer.ids.banned,
        )

    def greedy(self, num_tokens: int) -> Sampling:
        return self.sampling(num_tokens, seed=None, temperature=0.0)

    def trained(self, path: Path, *, seed: int) -> "World":
        """What training leaves: another adaptor and decoder under the same frozen encoder."""
        other = World.create(path, seed=seed)
        module = other.family.load_module(dtype=torch.float32)
        frozen = dict(self.family.public_names(self.family.load_module(dtype=torch.float32)))
        with torch.no_grad():
            for name, parameter in other.family.public_names(module):
                if other.family.frozen(name):
                    parameter.copy_(frozen[name])
        other.family.save(module, other.family.path, dtype=torch.float32)
        return other

    def update(self, *, version: WeightVersion = NEW, wire_dtype: WireDtype = "float32") -> WeightUpdate:
        """These weights as the learner publishes them: the frozen ones stay at home."""
        module = module_of(self.family)
        named = ((name, tensor) for name, tensor in self.family.public_names(module) if not self.family.frozen(name))
        return Snapshot.of(named, version=version, wire_dtype=wire_dtype).to_update()

    def logprobs(self, request: GenerationRequest, response: np.ndarray) -> np.ndarray:
        """[R] what the torch module says of a response, under the request's own sampling."""
        module = module_of(self.family)
        ids = torch.tensor(np.concatenate([request.prompt_ids, response]), dtype=torch.int64)[None]
        with torch.no_grad():
            mels = [self.family.mel(clip.samples) for clip in request.clips if isinstance(clip, AudioClip)]
            spans = [(0, span.start, span.end) for span in request.clip_spans]
            hidden = module.forward(ids, states=module.encode(mels) if mels else [], spans=spans)
            logits = module.logits(hidden)[0, len(request.prompt_ids) - 1 : -1]
        # Greedy log-probabilities are recorded at temperature 1.
        logits = logits / (request.sampling.temperature or 1.0)
        logits[:, list(request.sampling.banned_token_ids)] = -torch.inf
        chosen: np.ndarray = logits.log_softmax(-1)[range(len(response)), torch.tensor(response).long()].numpy()
        return chosen


@dataclass(frozen=True)
class Worlds:
    """The weights an engine was started with, and others that training made of them."""

    start: World
    target: World

    @classmethod
    def create(cls, path: Path) -> "Worlds":
        start = World.create(path / "start", seed=0)
        return cls(start, start.trained(path / "target", seed=1))


@functools.cache
def module_of(family: StepAudio) -> Any:
    """Read once: while requests fly, a test that reads it again loses the race with them."""
    return family.load_module(dtype=torch.float32)


def same(one: Generation, other: Generation) -> bool:
    return np.array_equal(one.response_ids, other.response_ids) and np.array_equal(one.logprobs, other.logprobs)


def assert_equal(ones: list[Generation], others: list[Generation]) -> None:
    """As one engine and another of the same weights may differ."""
    for one, other in zip(ones, others, strict=True):
        np.testing.assert_array_equal(one.response_ids, other.response_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=FRESH_NATS)


async def greedy(engine: Engine, world: World) -> list[Generation]:
    """Four new requests of two clips each, which every engine test that swaps has asked before."""
    requests = [world.request(f"g{i}", world.greedy(24), about=i, clip_lengths=(9_000, 2_000)) for i in range(4)]
    return list(await asyncio.gather(*(engine.generate(request) for request in requests)))


async def until(condition: Callable[[], bool], *, deadline_s: float = 30.0) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 (an engine thread has no event to offer)
            await asyncio.sleep(0.005)


def noise(seed: int, num_samples: int) -> AudioClip:
    samples = np.random.default_rng(seed).normal(scale=0.1, size=num_samples).astype(np.float32)
    return AudioClip(sha256=hashlib.sha256(samples.tobytes()).hexdigest(), samples=samples)
