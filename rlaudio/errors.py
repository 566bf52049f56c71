"""The one error tree. Every error names the value, the place, and what to do next.

RlaudioError
├── ConfigError          a setting is unknown, mistyped or contradicts another
├── DataError            a record cannot be used as it lies (file, line, field)
├── AudioError           a sound cannot be decoded or breaks a limit
├── CheckpointError      a model or resume checkpoint is incomplete, misshapen or unsafe
├── ResourceError        the machine lacks memory, disk, a port or a matching package
├── ClusterError         a Ray cluster cannot be reached, refuses, or has no room
├── RunFolderError       a run folder cannot be written, or is not a run
├── EngineError          the generation engine failed or answered something impossible
│   ├── EngineDeadError  the engine will answer nothing more: its actor is left out
│   └── RolloutError     a dialogue could not be played: data for the loop, not a crash
│       └── TurnTimeoutError     a turn outlived its deadline: slow, or its engine hangs
├── JudgeError           a judgment could not be had: data for the loop, not a crash
│   ├── VerdictError     the judge answered, but not with a verdict
│   └── VerdictTimeoutError  the judge model gave nothing in time: slow, or its engine hangs
├── DoctorError          engine and trainer do not agree: training refuses to start
├── LearnerError         a training step failed
│   └── DivergenceError  loss or gradient is not finite
├── WeightSyncError      weights did not reach an engine whole and in time
├── LedgerError          the ledger cannot be written or read, or is told what cannot be
├── SpoolError           the spool cannot be written, or a group in it is gone or damaged
├── StalenessError       a token older than the window promises: a bug, never data
└── StarvedError         the window was fed nothing but drops
"""


class RlaudioError(Exception):
    """Base of every error that rlaudio raises on purpose."""


class ConfigError(RlaudioError):
    """A setting is unknown, mistyped, missing, or contradicts another."""


class DataError(RlaudioError):
    """A record cannot be used as it lies: names file, line and field."""


class AudioError(RlaudioError):
    """A sound cannot be decoded or breaks a limit: names file and reason."""


class CheckpointError(RlaudioError):
    """A checkpoint is incomplete, misshapen or unsafe: names file and tensor."""


class ResourceError(RlaudioError):
    """The machine lacks memory, disk, a port or a matching package."""


class ClusterError(RlaudioError):
    """A Ray cluster cannot be reached, refuses what is asked of it, or has no room: names address or resources."""


class RunFolderError(RlaudioError):
    """A run folder cannot be written, or the path given is not a run."""


class EngineError(RlaudioError):
    """The generation engine failed, or answered something impossible."""


class EngineDeadError(EngineError):
    """The engine has ended and will answer nothing more: its actor must be replaced."""


class RolloutError(EngineError):
    """A dialogue could not be played. Data for the loop: the group is dropped with this reason."""


class TurnTimeoutError(RolloutError):
    """A turn outlived its deadline. Its dialogue was slow, or its engine hangs: the pool finds out which."""


class JudgeError(RlaudioError):
    """A judgment could not be had. Data for the loop: the sibling or group is dropped."""


class VerdictError(JudgeError):
    """The judge answered without a readable verdict. Counted by kind, never scored as 0.

    Attributes:
        kind: "unparsable", "contradictory" (more than one verdict) or "truncated" (the answer was cut off).
    """

    def __init__(self, message: str, *, kind: str = "unparsable") -> None:
        super().__init__(message)
        self.kind = kind


class VerdictTimeoutError(JudgeError):
    """The judge model gave nothing within its deadline. It was slow, or hangs: the pool finds out which.

    Attributes:
        partial: what is known without it, where that is of use: what the other sources said of a held-out dialogue.
    """

    def __init__(self, message: str, *, partial: object = None) -> None:
        super().__init__(message)
        self.partial = partial


class DoctorError(RlaudioError):
    """Engine and trainer do not agree, so training refuses to start: names the failed checks."""


class LearnerError(RlaudioError):
    """A training step failed."""


class DivergenceError(LearnerError):
    """Loss or gradient is not finite."""


class WeightSyncError(RlaudioError):
    """Weights did not reach an engine whole and in time: names actor, rank and tensor."""


class LedgerError(RlaudioError):
    """The ledger cannot be written or read, or is told of something that cannot have happened to a group."""


class SpoolError(RlaudioError):
    """The spool cannot be written, or a group in it is gone or damaged: names the file."""


class StalenessError(RlaudioError):
    """A group is older than the window promises. Slots and order rule it out: an internal error, never data."""


class StarvedError(RlaudioError):
    """Group after group was dropped, so nothing is left to train on."""
