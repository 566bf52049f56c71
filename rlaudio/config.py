"""RunConfig: every setting of a run, with the vetted default. YAML and `key=value` are merged over it by OmegaConf.

Paths are resolved against the configuration file's folder. Objects are named as `package.module:Class`; code beside the
configuration file can be imported. Which values a run can be started with says `rlaudio.config_checks`.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from rlaudio.algorithm_facts import ALGORITHMS, CUSTOM, AlgorithmFacts

PATH = {"path": True}
PLACE = {"path": True, "content": False}
"""A path of which the content decides nothing: results go there, or what lies there is named by its own hash."""


@dataclass
class RunSettings:
    name: str = MISSING
    root: str = field(default="runs", metadata=PLACE)  # run folders are made here
    seed: int = 0
    # Batches of groups; each takes epochs * minibatches optimizer steps. 0 evaluates the held-out sets only.
    steps: int = 100
    checkpoint_every: int = 50  # steps; the last step is always saved
    stop_deadline_s: float = 300.0  # after SIGTERM, for the step under way, the checkpoint and the end of all actors
    # Every node sees run.root, and run.spool, at the same path: needed on several nodes
    shared_root: bool = False
    # Folder for the ledger, on a disk of the driver's own machine: no network file system. Empty: the run folder
    ledger: str = field(default="", metadata=PLACE)
    # Where judged groups lie until they are trained on, a path or `pyarrow.fs` URI. Empty: in the run folder
    spool: str = field(default="", metadata=PLACE)
    spool_mb: int = 4096  # of all groups that lie there; after a crash those beyond it are played again. 0: no bound
    keep_spool: bool = False  # groups stay there after training, for `rlaudio replay`; without bound


@dataclass
class ModelSettings:
    path: str = field(default=MISSING, metadata=PATH)
    family: str = "rlaudio.models.step_audio:StepAudio"
    dtype: str = "float32"  # of the trainer and the engine; bfloat16 on GPUs
    options: dict[str, Any] = field(default_factory=dict)  # of the family's constructor, by name


@dataclass
class MixtureSettings:
    """One part of a mixture: its share of what is drawn. The shares sum to 1."""

    path: str = field(default=MISSING, metadata=PATH)
    weight: float = MISSING
    name: str = ""  # empty: the file's name without its ending


@dataclass
class AugmentSettings:
    """What is done to users' sounds in training, never in evaluation; see `rlaudio/audio/augment.py`.

    Of each operation the least and the greatest amount; an empty list leaves it out.
    """

    share: float = 0.0  # of the sounds that an operation is applied to, each operation by itself; 0: none
    speed: list[float] = field(default_factory=list)  # factors, for example [0.9, 1.1]; changes the pitch as well
    reverberation_s: list[float] = field(default_factory=list)  # seconds to fall by 60 dB, for example [0.1, 0.6]
    noise_snr_db: list[float] = field(default_factory=list)  # dB of the voice over pink noise, for example [5, 25]
    telephone_bits: list[float] = field(default_factory=list)  # of mu-law at 8 kHz, for example [8, 8]
    # Task -> what its answers depend on: rate, pitch, timbre, loudness, noise. Operations that change it are left out,
    #   as for the `keep` of a record
    keep: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class DataSettings:
    """What a run reads. `rlaudio data check CONFIG` lists everything that is wrong with it."""

    train: str = field(default="", metadata=PATH)  # JSONL of prompt records
    mixture: list[MixtureSettings] = field(default_factory=list)  # instead of `train`: several such files, weighted
    clips: str = field(default=MISSING, metadata=PLACE)  # root of the content-addressed clip store
    heldout: dict[str, str] = field(default_factory=dict, metadata=PATH)  # name -> JSONL, evaluated before and after
    licenses: list[str] = field(default_factory=list)  # that records may be under; empty: any
    max_clip_s: float = 0.0  # longest sound; 0: an hour
    # Held-out records whose users say word for word what is trained on: "refuse", "warn" or "allow". A sound that is
    #   trained on is always refused.
    same_words: str = "warn"
    verify: str = "headers"  # before a run: of every sound the header, or all of its "sounds" (hash and samples)
    augment: AugmentSettings = field(default_factory=AugmentSettings)


@dataclass
class SamplingSettings:
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 48  # per turn, reasoning included


@dataclass
class EngineConfig:
    kind: str = "in_process"  # "in_process" (CPU, no child process) or "async_llm" (GPUs, tensor parallel)
    max_model_len: int = 512
    max_num_seqs: int = 64
    kv_cache_mb: int = 64  # CPU only
    gpu_memory_utilization: float = 0.9  # GPU only
    tensor_parallel: int = 1


@dataclass
class RolloutSettings:
    actors: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    engine: EngineConfig = field(default_factory=EngineConfig)
    start_deadline_s: float = 300.0
    group_deadline_s: float = 300.0
    # After a time-out the actor is asked whether it lives, and left out when it does not say so within this.
    alive_deadline_s: float = 60.0
    attempts: int = 2  # tries of one group before it is dropped
    encode_once: bool = True  # clips are encoded in the actor and their states travel; off when the encoder is trained
    encoder_device: str = ""  # where that encoder lives: "cpu", "cuda", or empty for the actor's own device
    encoder_cache_mb: int = 1024  # states kept per actor


@dataclass
class OnlySettings:
    """Of which records, and of which of their turns, a source speaks. An empty list leaves nothing out."""

    tasks: list[str] = field(default_factory=list)
    axes: list[str] = field(default_factory=list)
    # What a turn's user message must have: answer, choices, constraints, reference_response, rubric
    needs: list[str] = field(default_factory=list)


@dataclass
class ScheduleSettings:
    """How a source's weight moves over the steps; see `rlaudio/rewards/schedule.py`."""

    kind: str = "constant"  # "linear" from `start` at step `begin` to the weight at `end`; "warm_up" over `end` steps
    start: float = 0.0
    begin: int = 0
    end: int = 0


@dataclass
class SourceSettings:
    """One reward source. `judge` implements `rlaudio.rewards.base:Judge`; `options` go to its constructor by name."""

    name: str = MISSING
    judge: str = MISSING
    weight: float = 1.0  # 0 measures only: curves and reports have it, training knows nothing of it
    options: dict[str, Any] = field(default_factory=dict)
    # Within the group: "centre", "std" (also divided by the deviation), "none". Empty: "centre" where the algorithm
    #   compares siblings, else "none".
    normalise: str = ""
    only: OnlySettings = field(default_factory=OnlySettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)  # held-out rewards are always of `weight`

    @property
    def is_measured(self) -> bool:
        """It is judged and plotted, and moves no reward: nothing that it fails at costs a sibling."""
        return self.weight == 0 and self.schedule.kind == "constant"


@dataclass
class ServedModelSettings:
    """A model that is served beside the policy or the sources."""

    path: str = field(default="", metadata=PATH)  # empty: none in this run
    family: str = "rlaudio.models.step_audio:StepAudio"
    dtype: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)  # of the family's constructor, by name
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass
class EndpointSettings:
    """A model behind an OpenAI-compatible endpoint, instead of `path`."""

    url: str = ""  # for example http://host:8000/v1; empty: no endpoint
    model: str = ""  # as the endpoint knows it
    key_env: str = "OPENAI_API_KEY"  # variable that holds the key, set on the nodes; empty: the endpoint needs none
    timeout_s: float = 30.0  # of one request
    attempts: int = 4  # of one request, when the endpoint is silent, busy (429) or broken (5xx)
    backoff_s: float = 0.5  # pause before the second attempt; doubled each time, or what the endpoint asks for
    extra_body: dict[str, Any] = field(default_factory=dict)  # sent along with every request


@dataclass
class JudgeModelSettings(ServedModelSettings):
    """The generative judge, or what a simulated user thinks with: a served checkpoint, or an endpoint."""

    endpoint: EndpointSettings = field(default_factory=EndpointSettings)


@dataclass
class DialogueSettings:
    user: str = "rlaudio.dialogue.users:ScriptedUser"
    user_options: dict[str, Any] = field(default_factory=dict)  # of its constructor, by name
    # What a simulated user thinks with: an endpoint, or a checkpoint that every rollout actor serves beside the policy.
    user_model: JudgeModelSettings = field(default_factory=JudgeModelSettings)
    max_turns: int = 8
    keep_thinking: bool = False  # True leaves earlier reasoning in the history
    unclosed_thinking: str = (
        "end"  # a turn that never closes its reasoning: "end" the dialogue, or "continue" with an empty reply
    )
    seconds_per_turn: float = 120.0  # deadline, of the user's move and of the reply each


@dataclass
class RewardSettings:
    actors: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    sources: list[SourceSettings] = field(default_factory=list)
    judge_model: JudgeModelSettings = field(default_factory=JudgeModelSettings)
    # A frozen policy for judges with `reference: policy`: usually the checkpoint that training starts from.
    reference_model: ServedModelSettings = field(default_factory=ServedModelSettings)
    slow_after_s: float = 30.0  # a judge that has been silent for so long is told of, and again each time it doubles
    min_siblings: float = 0.5  # share of a group that must survive bad judgments
    start_deadline_s: float = 300.0
    group_deadline_s: float = 300.0
    alive_deadline_s: float = 60.0  # see rollout.alive_deadline_s
    shuffle: bool = False  # control: rewards are permuted among siblings, so nothing can be learned


@dataclass
class CriticSettings:
    """The value head of `algorithm.name=ppo`; no other algorithm has one. As in the reports: no discount, lambda 1."""

    lr: float = 1e-3  # of the head, which starts from nothing; flat
    discount: float = 1.0  # per token
    gae_lambda: float = 1.0  # 1: Monte Carlo returns against the value; lower trusts later values instead
    value_clip: float = 0.2  # the value may move so far from the one in `prepare` before its error counts in full
    decoder_coef: float = 0.0  # weight at which the value loss also moves the decoder; 0 trains the head alone


@dataclass
class AlgorithmSettings:
    """The algorithm. An empty choice or null means: as published, see `rlaudio/algorithm_facts.py`."""

    # grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, ppo, or `package.module:Class`
    name: str = "grpo"
    group_size: int = 8  # siblings per prompt
    groups_per_step: int = 8
    max_staleness: int = 1  # batches that weights may move on while a group is made; 0 is synchronous
    # A slow group may be overtaken by so many that were admitted after it. 0: strictly in order
    look_ahead: int = 0
    # What overtaking made older than max_staleness: "wait" trains on it, so the bound is max_staleness +
    #   ceil(look_ahead / groups_per_step); "drop" drops it, and max_staleness stays the bound.
    too_old: str = "wait"
    epochs: int = 1
    minibatches: int = 1  # optimizer steps per epoch
    max_dropped_in_a_row: int = 200
    max_divergences_in_a_row: int = 3  # batches without a finite loss and gradient are left out; so many end the run
    dynamic_sampling: bool | None = None  # leave out groups whose siblings agree; null: where siblings are compared

    # Credit: "turn" gives a turn its own and all later rewards, "dialogue" gives every turn the whole dialogue's.
    credit: str = "turn"
    scale_advantages: bool | None = None  # divide by the standard deviation (of the group, or of the batch)
    average: str = ""  # every "dialogue" weighs the same, every "token" does, or sums are divided by a "constant"
    constant_tokens: int = 1024  # that constant
    # A turn longer than max - buffer tokens loses up to 1 of its reward, linearly over the buffer. 0: off
    overlong_max_tokens: int = 0
    overlong_buffer_tokens: int = 0

    # The ratio is kept in [1 - clip_low, 1 + clip_high].
    clip_low: float | None = None
    clip_high: float | None = None

    # KL to the frozen start. "k1" log ratio, "k2" half its square, "k3" exp(d) - d - 1.
    kl_coef: float = 0.001  # 0 leaves the reference out
    kl_in: str = "loss"  # or "reward"
    kl_estimator: str = "k3"

    # What was recorded when a token was sampled is neither today's policy nor the trainer's arithmetic.
    # "truncated": clip around the trainer's own log-probs before the step, and weigh every token by
    #   min(trainer's / recorded, importance_cap): corrects age and trainer/engine mismatch at once.
    # "ratio": clip around the recorded log-probs, as PPO was published. "none": recorded log-probs are not looked at.
    correction: str = "truncated"
    importance_cap: float = 2.0
    # A turn whose mean ratio (geometric, trainer's / recorded) leaves [mask_low, mask_high] is not trained on. 0: off
    mask_low: float = 0.0
    mask_high: float = 0.0

    critic: CriticSettings = field(default_factory=CriticSettings)

    @property
    def facts(self) -> AlgorithmFacts:
        return ALGORITHMS.get(self.name, CUSTOM)

    @property
    def has_critic(self) -> bool:
        return self.facts.baseline == "critic"

    @property
    def compares_siblings(self) -> bool:
        return self.facts.baseline == "group"

    @property
    def drops_groups_without_signal(self) -> bool:
        """A group in which all siblings earn the same teaches nothing where siblings are compared."""
        return self.compares_siblings if self.dynamic_sampling is None else self.dynamic_sampling

    @property
    def credits_tokens(self) -> bool:
        """Whether advantages take what the model says of the sampled tokens, and so differ within a turn."""
        return self.has_critic or (self.needs_reference and self.kl_in == "reward")

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def needs_proximal(self) -> bool:
        """Whether log-probabilities are computed before the first step: with one step they are those of the step."""
        return self.correction != "ratio" and self.epochs * self.minibatches > 1


@dataclass
class LearnerSettings:
    ranks: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    lr: float = 1e-6
    min_lr: float = 0.0  # cosine end, when decay_steps > 0
    warmup_steps: int = 0  # optimizer steps
    decay_steps: int = 0  # optimizer steps; 0 keeps the rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    zero_stage: int = 0
    # Optimizer states and their float32 gradient in the rank's main memory, stepped there by torch. From stage 1 on
    offload_optimizer: str = "none"  # or "cpu"
    # A rank's share of the weights in main memory, fetched layer by layer. At stage 3 only
    offload_parameters: str = "none"  # or "cpu"
    # The frozen start that the KL is against: "whole" on every rank, "sharded" over the ranks, or "offload": sharded,
    # in main memory. Empty: sharded at stage 3, else whole.
    reference: str = ""
    micro_batch_tokens: int = 8192  # padded cells per forward
    gradient_checkpointing: bool = False  # decoder layers run again in the backward pass instead of being remembered
    train_encoder: bool = False  # only to make an encoder from nothing
    step_deadline_s: float = 600.0
    start_deadline_s: float = 300.0
    # Of the ranks, all together, when one is lost: from the last checkpoint. So often without a new checkpoint in
    #   between, then the run ends. 0: at the first loss. Before each there is a pause as of any actor: `supervision`
    max_restarts: int = 3
    # Of ranks that go on when a restart finds no room for all within start_deadline_s. 0: all or none
    least_ranks: int = 0


@dataclass
class SyncSettings:
    transport: str = "object_store"  # "object_store" (Ray; the CPU default), "collective" (NCCL, or gloo on CPUs)
    delta: bool = False  # send only bfloat16 elements that changed; learner and engines keep a copy to compare with
    deadline_s: float = 120.0  # for new weights to be live on an engine; it is left out after that
    # When an engine swaps: "in_flight" between two tokens, running turns go on; "turn_ends" when all running turns have
    #   ended; "dialogue_ends" when all running dialogues have; "abort" takes running turns out and resumes each behind
    #   what it has sampled (what follows has another seed). What waits for the swap does so within `deadline_s`.
    swap: str = "in_flight"
    # "in_flight" computes the KV cache of running turns again. True keeps it, for long dialogues: what a turn samples
    #   after the swap then belongs to no version (`VersionSpan.mixed`); its recorded log-probs are the only truth.
    keep_kv_cache: bool = False


@dataclass
class SupervisionSettings:
    """How rollout and reward actors that are lost come back; see `rlaudio/actors/supervisor.py`."""

    # Of one place within window_s: one loss more and the place is given up. 0: nobody is started again
    max_restarts: int = 5
    window_s: float = 900.0
    first_pause_s: float = 1.0  # before the first restart, of ranks too, doubled with every loss up to longest_pause_s
    longest_pause_s: float = 60.0
    place_deadline_s: float = 1800.0  # for Ray to find room for an actor, nodes that an autoscaler adds included
    drain_deadline_s: float = 120.0  # for an actor that leaves to end what it plays; other actors play the rest
    # Ray's autoscaler adds nodes for actors that there is no room for: a bigger size is waited for, not refused
    new_nodes: bool = False


@dataclass
class AutoscaleSettings:
    """Pools that follow the queue; see `rlaudio/actors/autoscale.py`. [least, most] actors; empty: as configured."""

    rollout: list[int] = field(default_factory=list)
    reward: list[int] = field(default_factory=list)
    look_s: float = 30.0  # what is seen in so long is one look
    cooldown_s: float = 180.0  # between two changes, and for a change to show


@dataclass
class EvaluationSettings:
    max_dialogues: int = 0  # per held-out set; 0 is all
    bootstrap: int = 2000
    examples: int = 12  # dialogues per set in the listening page
    silence: bool = False  # control: every sound is replaced by one second of silence
    voice: str = ""  # `package.module:Class` that speaks both replies in the listening page


@dataclass
class DoctorSettings:
    before_train: bool = True  # `rlaudio train` runs the quick checks first
    on_failure: str = "stop"  # "stop" refuses to train, "warn" says what failed and goes on


@dataclass
class TrackingSettings:
    mlflow: bool = True
    uri: str = ""  # empty: sqlite in the run root
    experiment: str = "rlaudio"
    parent: str = ""  # id of the MLflow run that this one is a part of


@dataclass
class TrapSettings:
    """The alert for verified reward that rises while preference falls; see `rlaudio/observe/trap.py`."""

    reference_steps: int = 20  # the frozen start
    window_steps: int = 20  # steps per look
    false_alarm: float = 0.01  # of a whole run in which not both truly moved
    min_effect: float = 0.5  # smallest change of either, in deviations of a step at the start
    verified: list[str] = field(default_factory=list)  # source names; empty: by their classes
    preference: list[str] = field(default_factory=list)  # the same


@dataclass
class ClusterSettings:
    """The machines a run is meant for: `rlaudio doctor --static` computes with them, Ray counts the real ones."""

    nodes: int = 0  # 0: this machine alone, without GPUs
    gpus_per_node: int = 0
    gpu: str = ""  # its name, for the table
    gpu_memory_gb: float = 0.0  # of one GPU, as it is sold; counted as 10^9 bytes
    cpus_per_node: int = 0
    memory_gb: float = 0.0  # of one node, 10^9 bytes
    room_deadline_s: float = 600.0  # how long a run waits for room on the cluster it joined: nodes may have to start


@dataclass
class RunConfig:
    recipe: str = "rl"  # what `rlaudio train` does with this file
    run: RunSettings = field(default_factory=RunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    dialogue: DialogueSettings = field(default_factory=DialogueSettings)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    rewards: RewardSettings = field(default_factory=RewardSettings)
    algorithm: AlgorithmSettings = field(default_factory=AlgorithmSettings)
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    sync: SyncSettings = field(default_factory=SyncSettings)
    supervision: SupervisionSettings = field(default_factory=SupervisionSettings)
    autoscale: AutoscaleSettings = field(default_factory=AutoscaleSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    doctor: DoctorSettings = field(default_factory=DoctorSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    trap: TrapSettings = field(default_factory=TrapSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)


# ---- supervised fine-tuning ---------------------------------------------------------------------------------------


@dataclass
class PhaseSettings:
    """One phase of supervised training: what is trained on what, for how long."""

    name: str = MISSING
    data: str = field(default="", metadata=PATH)  # JSONL of records with given assistant turns
    # Instead of `data`: several such files, for example sound and text. Weights are shares of the rows of every step.
    mixture: list[MixtureSettings] = field(default_factory=list)
    steps: int = MISSING
    rows_per_step: int = 64
    lr: float = 1e-3
    warmup_steps: int = 50
    cosine: bool = True  # the rate falls to learner.min_lr over `steps`
    lm_weight: float = 1.0
    ctc_weight: float = 0.0  # CTC on the spoken words through adaptor and tied embedding
    pseudo_audio: bool = (
        False  # word embeddings stretched over speech timing instead of sound: the decoder's first lessons
    )
    train_encoder: bool = False
    stop_at_loss: float = 0.0  # end the phase early at this smoothed loss; 0 never


@dataclass
class SftRunSettings:
    name: str = MISSING
    root: str = field(default="runs", metadata=PLACE)
    seed: int = 0
    output: str = field(default=MISSING, metadata=PLACE)  # the finished checkpoint
    checkpoint_every: int = 100  # steps; 0: none but at Ctrl-C


@dataclass
class SftConfig:
    """The supervised recipe: mid-training and cold start on the same learner group as RL."""

    recipe: str = "sft"
    run: SftRunSettings = field(default_factory=SftRunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    clips: str = field(default="", metadata=PLACE)
    phases: list[PhaseSettings] = field(default_factory=list)
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
