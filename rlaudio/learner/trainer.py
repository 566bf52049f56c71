"""Policy, optimizer and weight version of one rank: forward, backward, step, snapshot. No plan and no Arrow in here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.distributed as dist

from rlaudio.audio.encoded import encode_batch
from rlaudio.audio.store import ClipStore
from rlaudio.config import PhaseSettings
from rlaudio.errors import CheckpointError, ConfigError, DivergenceError, LearnerError
from rlaudio.learner import checkpoint
from rlaudio.learner.batch import MicroBatch
from rlaudio.learner.loss import require_finite
from rlaudio.learner.messages import StepMetrics, TrainerSpec
from rlaudio.learner.module import CtcTerms, ForwardRequest, Trainee
from rlaudio.learner.optimization import (
    DTYPES,
    Schedule,
    build_engine,
    discard_gradients,
    division_config,
    gradient_norm,
    prepare_deepspeed,
    require_stage,
    set_lr,
)
from rlaudio.learner.reference import Reference
from rlaudio.learner.sharding import (
    Sharder,
    exhaust,
    full_shape,
    gather_at_root,
    is_sharded,
    own_share,
    put_share,
    put_whole,
    whole_weights,
)
from rlaudio.learner.sounds import ClipSource, SoundCache
from rlaudio.learner.universal import read_for_other_ranks
from rlaudio.models.checkpoints import copy_stored
from rlaudio.models.families import open_family
from rlaudio.models.identity import encoder_name
from rlaudio.types import SAMPLE_RATE_HZ, EncodedClip, WeightVersion
from rlaudio.weights.snapshot import Snapshot

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import nn

    from rlaudio.models.base import AudioPolicy
    from rlaudio.weights.snapshot import WireDtype


class Trainer:
    """What a rank trains, after `optimization.join_ranks`.

    The engine is built when the first batch says what is trained: the run itself (`phase` None) or a supervised phase.
    A new phase starts with a fresh optimizer and schedule from the weights there are.

    Args:
        spec: model, optimizer, seed.
        clips: where sounds come from; default the clip store at `spec.clips_root`.

    Raises:
        ConfigError, CheckpointError: the family, dtype or checkpoint cannot be used.
    """

    def __init__(self, spec: TrainerSpec, *, clips: ClipSource | None = None) -> None:
        prepare_deepspeed()
        if spec.model.dtype not in DTYPES:
            raise ConfigError(f"model.dtype={spec.model.dtype!r} is unknown: set one of {', '.join(DTYPES)}")
        require_stage(spec.learner, dtype=spec.model.dtype)
        self.spec = spec
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda" if spec.learner.num_gpus else "cpu")
        self.version = spec.version
        self.phase: PhaseSettings | None = None
        self.step_index = 0
        torch.manual_seed(spec.seed)
        self.family = open_family(spec.model)
        self.policy = self._load_policy()
        self._parameters = self._named(self.policy)
        self._engine: DeepSpeedEngine | None = None
        self._silent: torch.Tensor | None = None
        self._reference: Reference | None = None
        self._sounds = SoundCache(
            clips or ClipStore(spec.clips_root),
            mel=self.family.mel,
            encode=self._encode,
            dtype=spec.model.dtype,
            capacity_bytes=spec.cache_mb << 20,
            batch=encode_batch(self.device),
        )
        self._encoder_moved: WeightVersion | None = None
        self.encoder_forwards = 0

    # ---- one step ------------------------------------------------------------------------------------------------

    def forward(self, request: ForwardRequest, *, last: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`Trainee.forward` with gradient; after the backward of the `last` micro-batch the gradient is reduced."""
        logprobs, entropy, ctc, _ = self.forward_with_states(request, last=last)
        return logprobs, entropy, ctc

    def forward_with_states(
        self, request: ForwardRequest, *, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """`forward`, and fourth the decoder's states that `request.hidden` asks for."""
        engine = self._live_engine()
        engine.set_gradient_accumulation_boundary(last)
        return cast("tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]", engine(request))

    @torch.no_grad()
    def before_step(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """([N] log-probabilities, [N, hidden] states) under the weights there are. Called on every rank."""
        logprobs, _, _, states = self._live_engine()(replace(self.request(batch), hidden="detached"))
        self.release_weights()
        return logprobs, states

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this micro-batch's share of the global loss."""
        # DeepSpeed averages over ranks; the losses already are shares of one global mean, so undo it.
        self._live_engine().backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, *, lr: float) -> dict[str, float]:
        """Clip, move the weights and count the version up. Returns `grad_norm` (before clipping) and `lr`.

        Raises:
            DivergenceError: the gradient is not finite; weights and optimizer stay as they were.
        """
        engine = self._live_engine()
        norm = gradient_norm(engine, stage=self._stage)
        self.check_finite(norm, name="gradient norm")
        set_lr(engine, lr)
        engine.step()
        self.step_index += 1
        self.version = WeightVersion(self.version.incarnation, self.version.number + 1)
        if self._trains_encoder():
            self._encoder_moved = self.version
        return {"grad_norm": norm, "lr": lr}

    def check_finite(self, value: float, *, name: str) -> None:
        """Raise DivergenceError after forgetting the gradient. `value` must be equal on every rank."""
        try:
            require_finite(value, name=name, place=f"the step after version {self.version}")
        except DivergenceError:
            discard_gradients(self._live_engine(), stage=self._stage)
            raise

    def snapshot(self) -> Snapshot | None:
        """The trained weights, on rank 0; None elsewhere. Called on every rank."""
        with self._whole(self.trained) as weights:
            if self.rank != 0:
                return None
            return Snapshot.of(weights, version=self.version, wire_dtype=cast("WireDtype", self.spec.model.dtype))

    @contextmanager
    def _whole(self, named: Sequence[tuple[str, nn.Parameter]]) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """`sharding.whole_weights` of these; ranks that do not read them to the end take part all the same."""
        weights = whole_weights(named, stage=self._stage)
        try:
            yield weights
        finally:
            exhaust(weights)

    # ---- requests ------------------------------------------------------------------------------------------------

    def request(
        self, batch: MicroBatch | None, *, ctc: CtcTerms | None = None, ctc_names: Sequence[str] = ()
    ) -> ForwardRequest:
        """Add the sounds of a micro-batch: mels when the encoder is trained, else its states.

        Args:
            batch: None for CTC alone.
            ctc: terms that point into `ctc_names`.
            ctc_names: distinct clips.
        """
        names = list(dict.fromkeys([*ctc_names, *(batch.clips if batch is not None else ())]))
        place = {name: index for index, name in enumerate(names)}
        encode = self._trains_encoder()
        if encode:
            self.encoder_forwards += len(names)
            sounds = self._sounds.mels(names)
        else:
            sounds = self._sounds.states(names, encoder=self.encoder_name)
        sounds = sounds or [self._silence()]
        return ForwardRequest(
            batch=batch,
            sounds=tuple(sound.to(self.device) for sound in sounds),
            occurrences=tuple(place[name] for name in batch.clips) if batch is not None else (),
            encode=encode,
            ctc=ctc,
        )

    def _silence(self) -> torch.Tensor:
        """What a micro-batch without sound runs through encoder and adaptor, for nothing: see `ForwardRequest`."""
        if self._silent is None:
            mel = self.family.mel(np.zeros(SAMPLE_RATE_HZ, dtype=np.float32))
            if self._trains_encoder():
                self._silent = mel
            else:
                with torch.no_grad():
                    self._silent = self.policy.encode([mel.to(self.device)])[0]
        return self._silent

    def _forget_sounds(self) -> None:
        self._sounds.clear()
        self._silent = None

    @property
    def encoder_name(self) -> str:
        """Names the encoder's present weights: those of the checkpoint, or of the version that moved them last."""
        if self._encoder_moved is None:
            return self._checkpoint_encoder
        return f"{self._checkpoint_encoder}@{self._encoder_moved}"

    @cached_property
    def _checkpoint_encoder(self) -> str:
        return encoder_name(self.family)

    def begin_batch(self, names: Sequence[str]) -> None:
        """The clips that this rank's share of a batch will ask for, until the next one begins."""
        self.encoder_forwards = 0
        self._sounds.hold(names)

    def lacking(self, names: Iterable[str]) -> list[str]:
        """Those of `names` whose states are not here; none while the encoder is being trained."""
        return [] if self._trains_encoder() else self._sounds.lacking(names, encoder=self.encoder_name)

    def take_states(self, clips: Sequence[EncodedClip]) -> None:
        """Keep states that came with the experience. Raises LearnerError: of another encoder or dtype than this one."""
        self._sounds.take(clips, encoder=self.encoder_name)

    def ensure_states(self) -> None:
        """Encode what has not come, once, unless the encoder is being trained."""
        if not self._trains_encoder():
            self._sounds.ensure_states(encoder=self.encoder_name)

    @torch.no_grad()
    def reference_logprobs(self, batch: MicroBatch) -> torch.Tensor:
        """[N] log-probabilities under the checkpoint the run started from."""
        if self._reference is None:
            lent = {name: parameter for name, parameter in self._parameters if self._stays_whole(name)}
            self._reference = Reference(self.spec, family=self.family, device=self.device, lent=lent)
        return self._reference.logprobs(self.request(batch))

    @torch.no_grad()
    def policy_logprobs(self, batch: MicroBatch) -> torch.Tensor:
        """[N] log-probabilities under the present weights, by the forward that training steps on."""
        logprobs, _, _ = self.forward(self.request(batch), last=True)
        self.release_weights()
        return logprobs

    def release_weights(self) -> None:
        """After a forward that no backward follows. Called on every rank.

        At ZeRO stage 3 DeepSpeed 0.19 has begun to fetch weights for the backward; until they are let go, whoever
        gathers them (a snapshot, a save) fails on "Cannot partition a param in flight".
        """
        if self._stage == 3 and self._engine is not None:
            self._engine.empty_partition_cache()

    def _encode(self, mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.encoder_forwards += len(mels)
        with torch.no_grad():
            return self.policy.encode([mel.to(self.device) for mel in mels])

    # ---- engine --------------------------------------------------------------------------------------------------

    def ensure_engine(self, phase: PhaseSettings | None) -> None:
        """Build the engine for the run (None) or a phase, unless it is the one there is."""
        if self._engine is not None and _name(phase) == _name(self.phase):
            return
        if self._engine is not None:
            self._rebuild_policy()
        self.phase, self.step_index = phase, 0
        self._forget_sounds()
        trains_encoder = self._trains_encoder()
        for name, parameter in self._parameters:
            parameter.requires_grad_(trains_encoder or not self.family.frozen(name))
        trainee = Trainee(self.policy, temperature=self.spec.temperature, banned=self.family.tokenizer.ids.banned)
        if self.spec.learner.gradient_checkpointing:
            self.policy.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        if self._stage == 3:
            gather_at_root(trainee, cast("nn.Module", self.policy), decoder=self.policy.decoder)
        self._engine = build_engine(trainee, settings=self.spec.learner, dtype=self.spec.model.dtype, width=self.width)

    def _rebuild_policy(self) -> None:
        """A fresh module with the trained weights: DeepSpeed leaves hooks and flat buffers on the old one.

        What is always divided goes over as each rank's share; an encoder that one phase trains and the next does not is
        divided in one and whole in the other, and goes over whole.
        """
        assert self._engine is not None
        shares = {name: own_share(parameter) for name, parameter in self._parameters if not self.family.frozen(name)}
        with self._whole([named for named in self._parameters if named[0] not in shares]) as whole:
            encoder = {name: tensor.detach().cpu().clone() for name, tensor in whole}
        self._engine.destroy()
        self._engine = None
        self.policy = self._load_policy()
        self._parameters = self._named(self.policy)
        for name, parameter in self._parameters:
            if name in shares:
                put_share(parameter, shares[name])
            else:
                put_whole(parameter, encoder[name])

    @property
    def parameters(self) -> Sequence[tuple[str, nn.Parameter]]:
        """(public name, parameter) of the policy; at ZeRO stage 3 this rank's shards."""
        return self._parameters

    @property
    def trained(self) -> Sequence[tuple[str, nn.Parameter]]:
        """Those of `parameters` that are trained, and therefore travel to the engines."""
        every = self._trains_encoder()
        return [(name, parameter) for name, parameter in self._parameters if every or not self.family.frozen(name)]

    def _named(self, policy: AudioPolicy) -> list[tuple[str, nn.Parameter]]:
        return cast("list[tuple[str, nn.Parameter]]", list(self.family.public_names(policy)))

    @property
    def width(self) -> int:
        """Of the decoder."""
        return full_shape(self.policy.embedding)[-1]

    def _load_policy(self) -> AudioPolicy:
        """At stage 3 divided as it is read: no rank holds the whole module at any time."""
        sharder = None
        if self._stage == 3:
            offload = self.spec.learner.offload_parameters == "cpu"
            config = division_config(dtype=self.spec.model.dtype, offload=offload, frozen=False)
            sharder = Sharder(config, device=self.device, apart=self._stays_whole)
        policy = self.family.load_module(dtype=DTYPES[self.spec.model.dtype], placing=sharder)
        return cast("AudioPolicy", cast("nn.Module", policy).to(self.device).train())

    def _stays_whole(self, name: str) -> bool:
        return self.family.frozen(name) and not self.spec.learner.train_encoder

    def _trains_encoder(self) -> bool:
        return self.spec.learner.train_encoder if self.phase is None else self.phase.train_encoder

    def _live_engine(self) -> DeepSpeedEngine:
        if self._engine is None:
            raise LearnerError("there is no optimizer yet: call prepare, supervised_step or load first")
        return self._engine

    @property
    def _stage(self) -> int:
        return self.spec.learner.zero_stage

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def export(self, path: Path) -> None:
        """Write the policy as a complete checkpoint of its family. Called on every rank; rank 0 writes."""
        dtype = DTYPES[self.spec.model.dtype]
        try:
            with self._whole(self._parameters) as weights:
                if self.rank == 0:
                    self.family.save(self._copy(weights) if self._stage == 3 else self.policy, path, dtype=dtype)
        finally:  # the others wait, also for a rank that could not write
            dist.barrier()

    @torch.no_grad()
    def _copy(self, weights: Iterable[tuple[str, torch.Tensor]]) -> AudioPolicy:
        """The policy in this process's main memory: the sharded one is not all there."""
        policy = self.family.load_module(dtype=DTYPES[self.spec.model.dtype])
        targets = dict(self.family.public_names(policy))
        for name, tensor in weights:
            targets[name].copy_(tensor)
        return policy

    def save(self, path: Path, *, also: Callable[[Path], None] | None = None) -> None:
        """Write everything a resumed run needs to go on as if never stopped, and the exported policy beside it.

        Args:
            path: the checkpoint folder.
            also: called on rank 0 with the folder while it is being written, to add a file.
        """
        if self._engine is None:
            self.ensure_engine(None)
        meta = checkpoint.LearnerMeta(
            version=self.version,
            step_index=self.step_index,
            world_size=self.world_size,
            zero_stage=self._stage,
            phase=None if self.phase is None else asdict(self.phase),
        )
        with checkpoint.staged(path, rank=self.rank) as folder:
            checkpoint.write_engine(self._live_engine(), folder, rank=self.rank, meta=meta)
            self.export(folder / checkpoint.MODEL_FOLDER)
            if also is not None and self.rank == 0:
                also(folder)

    def load(self, path: Path) -> None:
        """Restore weights, optimizer, schedule, random state and version number, in this spec's incarnation.

        The checkpoint may be of another number of ranks, not of another ZeRO stage.

        Raises:
            CheckpointError: incomplete, of another ZeRO stage, or of another model.
        """
        meta = checkpoint.read_meta(path)
        if meta.zero_stage != self._stage:
            raise CheckpointError(
                f"{path} was written at ZeRO stage {meta.zero_stage}, this run has stage {self._stage}, and optimizer "
                f"states do not go from one to the other: set learner.zero_stage={meta.zero_stage}, or start a new run "
                f"from the weights alone with model.path={path / checkpoint.MODEL_FOLDER}"
            )
        self.ensure_engine(None if meta.phase is None else PhaseSettings(**meta.phase))
        if meta.world_size == self.world_size or self._stage == 0:  # where all ranks hold the same
            checkpoint.read_engine(self._live_engine(), path, rank=self.rank)
            if self._stage == 3:
                self._read_unsharded(path / checkpoint.MODEL_FOLDER)
        else:
            read_for_other_ranks(
                self._live_engine(), self._parameters, path, rank=self.rank, step_index=meta.step_index
            )
        checkpoint.read_random_state(path, rank=self.rank % meta.world_size)
        self.step_index = meta.step_index
        self.version = WeightVersion(self.spec.version.incarnation, meta.version.number)
        if self._trains_encoder() or meta.phase is not None:
            # An earlier phase may have moved what this one keeps frozen.
            self._encoder_moved = self.version
        self._forget_sounds()

    def _read_unsharded(self, path: Path) -> None:
        """A frozen encoder that DeepSpeed does not see at stage 3 may have been trained in an earlier phase."""
        copy_stored({name: parameter for name, parameter in self._parameters if not is_sharded(parameter)}, path)

    def schedule(self) -> Schedule:
        """Of the run, or of the phase."""
        learner = self.spec.learner
        if self.phase is None:
            return Schedule(learner.lr, learner.min_lr, learner.warmup_steps, learner.decay_steps)
        decay_steps = self.phase.steps if self.phase.cosine else 0
        return Schedule(self.phase.lr, learner.min_lr, self.phase.warmup_steps, decay_steps)

    def metrics(self, values: dict[str, float]) -> StepMetrics:
        return StepMetrics(version=self.version, values=values)


def _name(phase: PhaseSettings | None) -> str | None:
    return None if phase is None else phase.name
