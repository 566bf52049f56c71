"""What a configuration names beyond values: classes and their options, and records at odds with the settings.

Loads the code that the configuration names, so `config_loader.code_path` comes first; builds nothing but the voice.
"""

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlaudio.config import ModelSettings, RunConfig, ServedModelSettings, SftConfig, SourceSettings
from rlaudio.dialogue.users import played_turns
from rlaudio.errors import ConfigError, RlaudioError
from rlaudio.evals.summary import ALL_TASKS
from rlaudio.registry import load_object
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.generative import GenerativeJudge
from rlaudio.rewards.scope import speaks_of
from rlaudio.rewards.verifier import Verifier
from rlaudio.types import PromptRecord


def object_problems(config: RunConfig | SftConfig) -> list[str]:
    """One sentence per class that cannot be loaded, option that it does not take, and voice that cannot be built."""
    problems = list(family_problems(config.model, key="model"))
    if isinstance(config, SftConfig):
        return problems
    judge_model = config.rewards.judge_model
    if judge_model.path:
        problems += family_problems(judge_model, key="rewards.judge_model")
    if config.rewards.reference_model.path:
        problems += family_problems(config.rewards.reference_model, key="rewards.reference_model")
    if ":" in config.algorithm.name:
        problems += _call_problems("algorithm.name", config.algorithm.name, given=1)
    problems += _user_problems(config)
    for index, source in enumerate(config.rewards.sources):
        key = f"rewards.sources[{index}]"
        problems += _call_problems(
            f"{key}.judge", source.judge, given=1, own=("name",), options=source.options, options_key=f"{key}.options"
        )
    if not problems:
        problems += _verifier_problems(config.rewards.sources)
    problems += judge_problems(config)
    if config.evaluation.voice:
        problems += _voice_problems(config.evaluation.voice)
    return problems


def _user_problems(config: RunConfig) -> Iterator[str]:
    dialogue = config.dialogue
    found = list(
        _call_problems(
            "dialogue.user", dialogue.user, given=1, options=dialogue.user_options, options_key="dialogue.user_options"
        )
    )
    if not found and not hasattr(load_object(dialogue.user), "move"):
        found.append(f"dialogue.user is {dialogue.user!r}, which has no `move`: name a `rlaudio.dialogue.users.User`")
    yield from found
    if not found and (check := getattr(load_object(dialogue.user), "setting_problems", None)):
        yield from check(dialogue.user_options, dialogue)
    if dialogue.user_model.path:
        yield from family_problems(dialogue.user_model, key="dialogue.user_model")


def record_problems(
    config: RunConfig, heldout: Mapping[str, Sequence[PromptRecord]], train: Sequence[PromptRecord] = ()
) -> list[str]:
    """Records that the report, the settings or the reward sources have no place for, one sentence per set and kind."""
    sets = {_train_key(config): train, **{f"data.heldout.{name}": records for name, records in heldout.items()}}
    # A rule of an unknown kind has no scope: what verifiers say of records comes first.
    judged = list(_judged_problems(config, sets))
    return [
        *(judged or [*scope_problems(config, sets), *_alone_problems(config, sets)]),
        *_played_problems(config, heldout),
        *_improvised_problems(config, sets),
    ]


def set_problems(
    config: RunConfig, heldout: Mapping[str, Sequence[PromptRecord]], train: Sequence[PromptRecord], *, scopes: bool
) -> list[str]:
    """Of `record_problems` what is said of whole sets; `scopes` leaves out or in what sources speak of."""
    sets = {_train_key(config): train, **heldout}
    scoped = scope_problems(config, sets) if scopes else ()
    return [*scoped, *_played_problems(config, heldout), *_improvised_problems(config, sets)]


def _improvised_problems(config: RunConfig, sets: Mapping[str, Sequence[PromptRecord]]) -> Iterator[str]:
    if getattr(load_object(config.dialogue.user), "improvises", False):
        return
    for key, records in sets.items():
        if found := [record.id for record in records if record.user is not None]:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            yield (
                f"{key}: record {found[0]!r}{more} is to be improvised, and dialogue.user is {config.dialogue.user}: "
                "set it to rlaudio.dialogue.simulated:SimulatedUser, or leave the records out"
            )


def _played_problems(config: RunConfig, heldout: Mapping[str, Sequence[PromptRecord]]) -> Iterator[str]:
    limit = config.dialogue.max_turns
    for name, records in heldout.items():
        if taken := [record.id for record in records if record.task == ALL_TASKS]:
            yield (
                f"data.heldout.{name}: record {taken[0]!r} has the task {ALL_TASKS!r}, which report.json uses for the "
                "whole set: rename the task"
            )
        longest = max(records, key=lambda record: len(played_turns(record)))
        if (turns := len(played_turns(longest))) > limit:
            yield (
                f"dialogue.max_turns is {limit} and record {longest.id!r} of data.heldout.{name} asks for {turns}: the "
                f"rest would count as wrong, set dialogue.max_turns={turns} or shorten the record"
            )


def _train_key(config: RunConfig) -> str:
    return "data.mixture" if config.data.mixture else "data.train"


def require_records(
    config: RunConfig, heldout: Mapping[str, Sequence[PromptRecord]], train: Sequence[PromptRecord] = ()
) -> None:
    """Raises ConfigError with every problem of `record_problems`."""
    if problems := record_problems(config, heldout, train):
        raise ConfigError("; ".join(problems))


def unjudged_records(config: RunConfig, records: Iterable[PromptRecord]) -> Iterator[tuple[PromptRecord, str, str]]:
    """(record, source, problem) where a record names a source that the run has not, or one of its cannot judge it.

    A source says what it cannot judge by a class method `record_problems(record, options)`, if it has one.
    """
    sources = config.rewards.sources
    known = {source.name for source in sources}
    checks = {source.name: getattr(load_object(source.judge), "record_problems", None) for source in sources}
    for record in records:
        for name in sorted(set(record.sources) - known):
            match = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {match[0]!r}?" if match else f"the run has {', '.join(sorted(known))}"
            yield record, name, f"its `sources` name {name!r}, {meant}"
        for source in sources:
            check = checks[source.name]
            if check is None or not speaks_of(source, record):
                continue
            for problem in check(record, source.options):
                yield record, source.name, f"source {source.name!r}: {problem}"


def _judged_problems(config: RunConfig, sets: Mapping[str, Sequence[PromptRecord]]) -> Iterator[str]:
    """What `unjudged_records` finds; of many records with one problem the first is named."""
    for key, records in sets.items():
        found: dict[tuple[str, str], list[str]] = {}
        for record, name, problem in unjudged_records(config, records):
            found.setdefault((name, problem), []).append(record.id)
        for (_, problem), ids in found.items():
            more = f" (and {len(ids) - 1} more)" if len(ids) > 1 else ""
            yield f"{key}: record {ids[0]!r}{more}: {problem}"


def judge_problems(config: RunConfig) -> list[str]:
    """Options of judges that cannot be meant, and models that they need and the run has not.

    A source's class says what it makes of its options by a class method `setting_problems(options, rewards)`, if it has
    one. A class that cannot be loaded is told of by `object_problems`.
    """
    rewards, problems = config.rewards, list[str]()
    for index, source in enumerate(rewards.sources):
        try:
            made = load_object(source.judge)
        except ConfigError:
            continue
        if check := getattr(made, "setting_problems", None):
            problems += [f"rewards.sources[{index}].options.{said}" for said in check(source.options, rewards)]
        served = rewards.judge_model.path or rewards.judge_model.endpoint.url
        if isinstance(made, type) and issubclass(made, GenerativeJudge) and not served:
            problems.append(
                f"rewards.sources[{index}] ({source.name!r}) needs a judge model: set rewards.judge_model.path to a "
                "checkpoint folder, or rewards.judge_model.endpoint to where one is served"
            )
    return problems


def _verifier_problems(sources: Sequence[SourceSettings]) -> Iterator[str]:
    """What verifiers say of their options: they need no model, so they are built here as they will be in the actor."""
    for index, source in enumerate(sources):
        made = load_object(source.judge)
        if isinstance(made, type) and issubclass(made, Verifier):
            try:
                made(JudgeServices(), name=source.name, **source.options)
            except RlaudioError as error:
                yield f"rewards.sources[{index}].options: {error}"


def scope_problems(config: RunConfig, sets: Mapping[str, Sequence[PromptRecord]]) -> Iterator[str]:
    """Tasks and axes of a source's `only` that no record has."""
    records = [record for some in sets.values() for record in some]
    known = {"tasks": {record.task for record in records}, "axes": {record.axis for record in records if record.axis}}
    for index, source in enumerate(config.rewards.sources):
        for what, names in (("tasks", source.only.tasks), ("axes", source.only.axes)):
            for name in names if records else ():
                if name not in known[what]:
                    match = difflib.get_close_matches(name, known[what], n=1)
                    meant = f"did you mean {match[0]!r}?" if match else f"there are {sorted(known[what])}"
                    yield f"rewards.sources[{index}].only.{what} names {name!r}, which no record has: {meant}"


def unscoped_records(config: RunConfig, records: Iterable[PromptRecord]) -> list[PromptRecord]:
    """Records that no source speaks of."""
    sources = config.rewards.sources
    return [record for record in records if sources and not any(speaks_of(source, record) for source in sources)]


def _alone_problems(config: RunConfig, sets: Mapping[str, Sequence[PromptRecord]]) -> Iterator[str]:
    for key, some in sets.items():
        if alone := [record.id for record in unscoped_records(config, some)]:
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            yield f"{key}: record {alone[0]!r}{more} is judged by no source: widen a source's `only`, or leave it out"


def family_problems(settings: ModelSettings | ServedModelSettings, *, key: str) -> Iterator[str]:
    """Whether the family can be loaded, and takes the options."""
    yield from _call_problems(
        f"{key}.family", settings.family, given=1, options=settings.options, options_key=f"{key}.options"
    )


def _call_problems(
    key: str,
    name: str,
    *,
    given: int,
    own: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    options_key: str = "",
) -> Iterator[str]:
    """Whether `name` can be called with `given` positional arguments, those of rlaudio's `own`, and the options."""
    options = options or {}
    try:
        made = load_object(name)
    except ConfigError as error:
        yield f"{key}: {error}"
        return
    if not callable(made):
        yield f"{key} is {name!r}, a {type(made).__name__}: name a class"
        return
    try:
        signature = inspect.signature(made)
    except ValueError:  # some classes written in C do not tell; they complain when they are built
        return
    parameters = list(signature.parameters.values())
    named = [parameter for parameter in parameters if parameter.kind not in (_POSITIONAL, *_VARIADIC)]
    known = [parameter.name for parameter in named if parameter not in parameters[:given] and parameter.name not in own]
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    wrong = [option for option in options if option in own or not (open_ended or option in known)]
    for option in wrong:
        match = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
        meant = f": did you mean {match[0]}?" if match else f"; it takes {', '.join(known) or 'no options'}"
        yield f"{options_key}.{option} is not an option of {name}{meant}"
    if wrong:
        return
    try:
        signature.bind(*[None] * given, **dict.fromkeys(own), **options)
    except TypeError as error:
        yield f"{key}: {name} cannot be built ({error})" + (f": see {options_key}" if options_key else "")


_POSITIONAL = inspect.Parameter.POSITIONAL_ONLY
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _voice_problems(name: str) -> Iterator[str]:
    """The voice speaks after the training: whether it can be built is known before."""
    if problems := list(_call_problems("evaluation.voice", name, given=0)):
        yield from problems
        return
    try:
        load_object(name)()
    except Exception as error:  # whatever a user's class raises
        yield (
            f"evaluation.voice: {name} cannot be built ({type(error).__name__}: {error}): put it right, or leave "
            "evaluation.voice out"
        )
