"""The rollout actor: one engine, one encoder, one player. Groups of dialogues out as Arrow, weights in meanwhile."""

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol, cast

import pyarrow as pa

from rlaudio.actors.serving import ping_engine, policy_sampling, start_engine
from rlaudio.actors.user_services import RunningUserServices, start_user_services
from rlaudio.audio.encoded import EncodeOnce, GroupEars
from rlaudio.audio.store import ClipStore
from rlaudio.config import RunConfig
from rlaudio.data.augmentation import Augmenter
from rlaudio.dialogue.player import DialoguePlayer, PlaySpec
from rlaudio.dialogue.users import User
from rlaudio.engines.base import Engine
from rlaudio.engines.swapping import SwapMode, SwapPolicy
from rlaudio.errors import ConfigError
from rlaudio.experience.builder import played_batch
from rlaudio.experience.states import states_batch
from rlaudio.models.base import ModelFamily
from rlaudio.models.families import open_family
from rlaudio.registry import load_object
from rlaudio.types import PromptRecord, WeightVersion
from rlaudio.weights.base import SyncStep
from rlaudio.weights.receiver import WeightReceiver


@dataclass(frozen=True, slots=True)
class PlayOrder:
    """What the driver asks for: small, so it travels with the call.

    Attributes:
        group: unique number of the group.
        num_siblings: dialogues to play of one record.
        temperature: 0 is greedy (evaluation).
        seed: names run, purpose and attempt.
        silence: control: the policy hears silence.
        ship_states: return the clips' encoder states for the learner; an evaluation has no use for them.
        shipped: clips whose states the learner can have already; they are not shipped again.
        augment: users' sounds are changed as `data.augment` says; never in an evaluation.
    """

    group: int
    num_siblings: int
    temperature: float
    seed: str
    silence: bool = False
    augment: bool = False
    ship_states: bool = False
    shipped: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class PlayedHeader:
    """What the driver learns of a played group; the dialogues themselves stay where they are.

    Attributes:
        num_turns, prompt_tokens, response_tokens: over all siblings.
        encoder_forwards: of those, how many the encoder ran over for this group.
        clips: sha256 of those that were heard as encoder states, each once.
        shipped: of these, whose states are shipped with the group.
        states_bytes: of what is shipped.
    """

    num_turns: int
    prompt_tokens: int
    response_tokens: int
    encoder_forwards: int = 0
    clips: tuple[str, ...] = ()
    shipped: tuple[str, ...] = ()
    states_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ServingParts:
    """What a started worker plays with, for probes (`rlaudio.doctor`) that are run where it is."""

    config: RunConfig
    family: ModelFamily
    engine: Engine
    encoder: EncodeOnce | None


class RolloutProbe(Protocol):
    """Something to find out inside a rollout actor."""

    async def run(self, parts: ServingParts, *payload: Any) -> Any: ...


class RolloutWorker:
    """Plain class; `actors.pool` makes it a Ray actor. `start` first, then any number of calls at once.

    Args:
        config: the run's.
        on_gpu: whether the actor was given a device.
        engine: one that runs already, for tests and measurements; None starts the configured one.
    """

    def __init__(self, config: RunConfig, *, on_gpu: bool, engine: Engine | None = None) -> None:
        self._config = config
        self._on_gpu = on_gpu
        self._engine = engine
        self._player: DialoguePlayer | None = None
        self._encoder: EncodeOnce | None = None
        self._receiver: WeightReceiver | None = None
        self._users: RunningUserServices | None = None

    async def start(self, version: WeightVersion) -> None:
        config = self._config
        self._family = open_family(config.model)
        if encodes_once(config) and self._encoder is None:
            # Before the engine, which takes its share of the device by what it finds free.
            self._encoder = load_encoder(config, family=self._family, on_gpu=self._on_gpu)
        self._engine = self._engine or await start_engine(
            config.rollout.engine,
            family=self._family,
            dtype=config.model.dtype,
            on_gpu=self._on_gpu,
            version=version,
            seed=config.run.seed,
            encoded_clips=self._encoder is not None,
            swap=swap_policy(config),
            start_deadline_s=config.rollout.start_deadline_s,
        )
        self._receiver = WeightReceiver(self._engine, keeps_base=config.sync.delta)
        clips = ClipStore(config.data.clips)
        self._users = self._users or await start_user_services(config, clips=clips, on_gpu=self._on_gpu)
        user: User = load_object(config.dialogue.user)(self._users.lent, **config.dialogue.user_options)
        self._augmenter = Augmenter(config.data.augment, clips, seed=config.run.seed)
        self._player = DialoguePlayer(
            engine=self._engine,
            family=self._family,
            clips=clips,
            user=user,
            settings=config.dialogue,
            max_model_len=config.rollout.engine.max_model_len,
        )

    async def start_over(self, config: RunConfig, version: WeightVersion) -> None:
        """Begin another run with the models of the one before; `rlaudio.recipes.kept` says which can.

        The engine holds the weights of the run before until the first broadcast.
        """
        if self._receiver is not None:
            self._receiver.leave()
        self._config = config
        await self.start(version)

    async def play(self, record: PromptRecord, order: PlayOrder) -> tuple[PlayedHeader, pa.RecordBatch, pa.RecordBatch]:
        """Play one group. Three return values, the driver fetches the first alone: header, dialogues, encoder states.

        Raises:
            RolloutError, EngineError: see `DialoguePlayer.play_group`.
        """
        assert self._player is not None, "start() comes first"
        if order.augment and self._augmenter.active:
            record = await asyncio.to_thread(self._augmenter.apply, record)
        sampling = policy_sampling(
            self._family.tokenizer.ids,
            max_new_tokens=self._config.sampling.max_new_tokens,
            temperature=order.temperature,
            top_p=self._config.sampling.top_p,
        )
        listener = GroupEars(self._encoder) if self._encoder is not None else None
        spec = PlaySpec(order.group, order.num_siblings, sampling, order.seed, silence=order.silence, listener=listener)
        dialogues = await self._player.play_group(record, spec)
        turns = [turn for dialogue in dialogues for turn in dialogue.turns]
        heard = listener.heard if listener is not None else {}
        shipped = tuple(name for name in heard if order.ship_states and name not in order.shipped)
        states = states_batch(heard[name] for name in shipped)
        header = PlayedHeader(
            num_turns=len(turns),
            prompt_tokens=sum(len(turn.prompt_ids) for turn in turns),
            response_tokens=sum(len(turn.response_ids) for turn in turns),
            encoder_forwards=listener.num_forwards if listener is not None else 0,
            clips=tuple(heard),
            shipped=shipped,
            states_bytes=states.nbytes,
        )
        return header, played_batch(record, dialogues), states

    async def sync(self, step: SyncStep) -> Any:
        """One step of a broadcast of weights; see `rlaudio.weights.base`. Generation goes on but for the swap."""
        assert self._receiver is not None, "start() comes first"
        return await step.run(self._receiver)

    async def ping(self) -> None:
        """Answers when this actor's event loop turns and its engine comes round. Raises EngineError: it does not."""
        if self._engine is not None:
            await ping_engine(self._engine)
        if self._users is not None and self._users.engine is not None:
            await ping_engine(self._users.engine)

    async def probe(self, probe: RolloutProbe, *payload: Any) -> Any:
        """Run a probe here; `payload` is what Ray fetched for it."""
        assert self._engine is not None, "start() comes first"
        return await probe.run(ServingParts(self._config, self._family, self._engine, self._encoder), *payload)

    async def close(self) -> None:
        if self._users is not None:
            await self._users.close()
        if self._engine is not None:
            await self._engine.close()


def swap_policy(config: RunConfig) -> SwapPolicy:
    """How a rollout engine swaps; a judge's weights never change. Raises ConfigError: the two settings are at odds."""
    return SwapPolicy(cast("SwapMode", config.sync.swap), keep_kv_cache=config.sync.keep_kv_cache)


def encodes_once(config: RunConfig) -> bool:
    """Whether rollout actors encode: never when the encoder is trained, for then states go stale with every version.

    Engines then hear the sounds themselves; their caches are emptied with every weight swap.
    """
    return config.rollout.encode_once and not config.learner.train_encoder


def load_encoder(config: RunConfig, *, family: ModelFamily, on_gpu: bool) -> EncodeOnce:
    """The checkpoint's frozen encoder on `rollout.encoder_device`, in the trainer's dtype.

    Raises:
        ConfigError: the device is unknown, or is not there.
        CheckpointError: the encoder cannot be loaded.
    """
    import torch

    from rlaudio.models.identity import encoder_name

    device = config.rollout.encoder_device or ("cuda" if on_gpu else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not on_gpu):
        raise ConfigError(
            f"rollout.encoder_device is {device!r} and rollout.num_gpus is {config.rollout.num_gpus:g}: use cpu, or "
            "cuda on an actor that has a GPU"
        )
    encoder = family.load_encoder(dtype=getattr(torch, config.model.dtype))
    if isinstance(encoder, torch.nn.Module):
        encoder = encoder.to(device).eval()
    return EncodeOnce(
        encoder,
        name=encoder_name(family),
        mel=family.mel,
        device=torch.device(device),
        capacity_bytes=config.rollout.encoder_cache_mb << 20,
    )
