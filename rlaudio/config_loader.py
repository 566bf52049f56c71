"""From YAML and `key=value` to a typed configuration, with errors that a person can act on.

Generic over any dataclass schema; `rlaudio.config` has ours. OmegaConf merges and converts; this module finds what is
wrong before a run starts and says it in one error. Fields marked `metadata={"path": True}` hold paths.
"""

import dataclasses
import difflib
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlaudio.errors import ConfigError
from rlaudio.secrets import MASK, is_secret_name, masked

T = TypeVar("T")

MAX_CONFIG_BYTES = 1 << 20
"""YAML takes many times its size in memory."""


def load_config(
    schema: type[T],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    check: Callable[[T], Iterable[str]] | None = None,
) -> T:
    """Read a YAML file over the schema's defaults, then `key=value` overrides over both.

    Args:
        schema: a dataclass; nested dataclasses, lists and dicts of them, optionals, literals and enums may occur in it.
        path: the YAML file. Relative paths in the configuration mean its folder, wherever they were written.
        overrides: `key.sub=value`, the value read as YAML; `key[0].sub=value` reaches into lists.
        check: called with the instance; one sentence for each thing that is wrong with its values.

    Returns:
        An instance of `schema` with every mandatory value set, every `${...}` resolved and every path absolute.

    Raises:
        ConfigError: the file cannot be read; keys are unknown or values mistyped; mandatory values are missing; `check`
            found something. All that is wrong of one kind is listed.
    """
    path = Path(path).absolute()
    tree = _read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    plain = OmegaConf.to_container(tree, resolve=False)
    problems = [*_unknown_keys(schema, plain), *_type_mismatches(schema, tree)]
    if problems:
        raise ConfigError(_complaint(path, overrides, problems))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), tree)
        missing = sorted(OmegaConf.missing_keys(merged))
        config: T | None = None if missing else _resolve_paths(OmegaConf.to_object(merged), base=path.parent)
    except (OmegaConfBaseException, ValueError, ConfigError) as error:
        # An interpolation that points nowhere, or a __post_init__ that found settings at odds.
        raise ConfigError(_complaint(path, overrides, [_one_line(error)])) from error
    problems = [f"{key} is mandatory and not set: add it to the file or pass {key}=..." for key in missing]
    if config is not None:
        problems += check(config) if check else ()
        if not problems:
            return config
    raise ConfigError(_complaint(path, overrides, problems))


def peek(path: str | Path, key: str, overrides: Sequence[str] = (), *, default: str) -> object:
    """One value at the top of a file, before it is known what else may stand there. Raises ConfigError."""
    tree = _read_yaml(Path(path).absolute())
    for override in overrides:
        if override.partition("=")[0].strip() == key:
            _apply_override(tree, override)
    return tree.get(key, default)


def read_plain(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A file with its overrides as it is written: nothing is checked, no `${...}` resolved. Raises ConfigError."""
    tree = _read_yaml(Path(path).absolute())
    for override in overrides:
        _apply_override(tree, override)
    plain: Any = OmegaConf.to_container(tree, resolve=False)
    return dict(plain)


def to_yaml(config: object) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(config)))


def code_path(config_path: str | Path) -> str:
    """Make modules beside the configuration file importable here and in child processes, once; returns the folder.

    Ray actors of a cluster need it too: pass it on as PYTHONPATH in the runtime environment's `env_vars`.
    """
    folder = str(Path(config_path).absolute().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if folder not in inherited:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *inherited])
    return folder


# ---- reading ------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> DictConfig:
    try:
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} has {size} bytes: no configuration needs more than {MAX_CONFIG_BYTES}")
        tree = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: the configuration cannot be read ({error.strerror}): check the path") from error
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(
            f"{path}: a configuration is a mapping of `key: value`, this file holds a list or a single value"
        )
    return tree


def _apply_override(tree: DictConfig, override: str) -> None:
    key, separator, _ = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {override!r} is not `key=value`: write for example run.seed=1")
    _require_place(tree, key.strip(), override=override)
    try:
        # from_dotlist reads the value as YAML; a neutral key keeps it from splitting a key that reaches into a list.
        value = OmegaConf.from_dotlist(["value=" + override[len(key) + 1 :]])._get_node("value")
        # A list stands in place of what was there, and where it does not belong the types tell.
        mappings = isinstance(value, DictConfig) and isinstance(OmegaConf.select(tree, key.strip()), DictConfig)
        OmegaConf.update(tree, key.strip(), value, merge=mappings, force_add=True)
    except (OmegaConfBaseException, YAMLError, ValueError, IndexError, TypeError, AssertionError) as error:
        raise ConfigError(f"override {override!r} cannot be applied: {_one_line(error)}") from error


def _require_place(tree: DictConfig, key: str, *, override: str) -> None:
    """Raise ConfigError when `key` reaches into a list where there is no entry."""
    node: object = tree
    reached = ""
    for part in re.findall(r"[^.\[\]]+", key):
        if isinstance(node, ListConfig):
            if not part.isdecimal() or int(part) >= len(node):
                entries = f"{reached}[0]" + (f" to {reached}[{len(node) - 1}]" if len(node) > 1 else "")
                held = f"has {entries}" if len(node) else "is empty"
                raise ConfigError(
                    f"override {override!r}: {reached} {held}, there is no {reached}[{part}]; to change how many there "
                    f"are, give the whole list as {reached}=[...]"
                )
            node, reached = node._get_node(int(part)), f"{reached}[{part}]"
        elif isinstance(node, DictConfig):
            node, reached = node._get_node(part), f"{reached}.{part}".lstrip(".")


# ---- finding what is wrong ----------------------------------------------------------------------------------------


def _unknown_keys(schema: Any, value: object, *, prefix: str = "") -> Iterator[str]:
    """One sentence per key of `value` that the schema does not have, deep."""
    if dataclasses.is_dataclass(schema) and isinstance(value, Mapping):
        hints = get_type_hints(schema)
        known = {field.name: hints[field.name] for field in dataclasses.fields(schema)}
        for key, item in value.items():
            name = f"{prefix}{key}"
            if key in known:
                yield from _unknown_keys(known[key], item, prefix=f"{name}.")
            else:
                yield f"{name} is not a setting{_nearest_key(str(key), known, prefix=prefix, schema=schema)}"
        return
    origin, arguments = get_origin(schema), get_args(schema)
    if origin in (Union, types.UnionType):
        for alternative in arguments:
            yield from _unknown_keys(alternative, value, prefix=prefix)
    elif origin is dict and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _unknown_keys(arguments[1], item, prefix=f"{prefix}{key}.")
    elif origin in (list, tuple) and isinstance(value, Sequence) and not isinstance(value, str):
        for index, item in enumerate(value):
            yield from _unknown_keys(arguments[0], item, prefix=f"{prefix.removesuffix('.')}[{index}].")


def _nearest_key(wanted: str, known: Mapping[str, Any], *, prefix: str, schema: Any) -> str:
    """The nearest known neighbour: in the same section first, else the same name in another section."""
    if match := difflib.get_close_matches(wanted, known, n=1, cutoff=0.6):
        return f": did you mean {prefix}{match[0]}?"
    elsewhere = [f"{prefix}{path}" for path in _leaf_paths(schema) if path.rsplit(".", 1)[-1] == wanted]
    if elsewhere:
        return f": did you mean {' or '.join(elsewhere[:3])}?"
    return f"; the settings here are {', '.join(known)}"


def _leaf_paths(schema: Any, *, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _leaf_paths(hints[field.name], prefix=f"{prefix}{field.name}.")


def _type_mismatches(schema: type, tree: DictConfig) -> Iterator[str]:
    """One sentence per value that does not fit its type."""
    for key, expected, value in _typed_leaves(schema, OmegaConf.to_container(tree, resolve=False)):
        if isinstance(value, str) and ("${" in value or value == "???"):
            continue  # looked at when it is resolved, or as missing
        if not _fits(expected, value):
            yield f"{key} = {value!r} is not {_type_name(expected)}"


def _typed_leaves(schema: Any, value: object, *, key: str = "") -> Iterator[tuple[str, Any, object]]:
    """(full key, expected type, value) for everything in `value` that the schema types, containers opened."""
    alternatives = get_args(schema) if get_origin(schema) in (Union, types.UnionType) else (schema,)
    if value is None and type(None) in alternatives:
        return
    alternatives = tuple(alternative for alternative in alternatives if alternative is not type(None))
    if len(alternatives) == 1:
        schema = alternatives[0]
    origin, arguments = get_origin(schema), get_args(schema)
    dot = f"{key}." if key else ""
    if dataclasses.is_dataclass(schema) and isinstance(value, Mapping):
        hints = get_type_hints(schema)
        for name, item in value.items():
            if name in hints:
                yield from _typed_leaves(hints[name], item, key=f"{dot}{name}")
    elif origin is dict and isinstance(value, Mapping):
        for name, item in value.items():
            yield from _typed_leaves(arguments[1], item, key=f"{dot}{name}")
    elif origin in (list, tuple) and isinstance(value, list):
        for index, item in enumerate(value):
            yield from _typed_leaves(arguments[0], item, key=f"{key}[{index}]")
    elif schema is not Any:
        yield key, schema, value


def _fits(expected: Any, value: object) -> bool:
    """Whether OmegaConf converts `value` to `expected`."""
    if dataclasses.is_dataclass(expected) or get_origin(expected) in (dict, list, tuple):
        return False  # a single value stands where a section or a list belongs
    probe = dataclasses.make_dataclass("Probe", [("value", expected)])
    try:
        OmegaConf.merge(OmegaConf.structured(probe), {"value": value})
    except OmegaConfBaseException:
        return False
    return True


def _type_name(expected: Any) -> str:
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path"}
    if expected in names:
        return names[expected]
    if dataclasses.is_dataclass(expected):
        return f"a section with the settings {', '.join(field.name for field in dataclasses.fields(expected))}"
    origin = get_origin(expected)
    if origin in (list, tuple):
        return "a list"
    if origin is dict:
        return "a mapping"
    if origin is Literal:
        return f"one of {', '.join(map(repr, get_args(expected)))}"
    if isinstance(expected, type) and issubclass(expected, Enum):
        return f"one of {', '.join(expected.__members__)}"
    return str(getattr(expected, "__name__", expected))


def _complaint(path: Path, overrides: Sequence[str], problems: Sequence[str]) -> str:
    place = f"{path}" + (f" with {' '.join(_shown(one) for one in overrides)}" if overrides else "")
    return f"{place}: " + (problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems))


def _shown(override: str) -> str:
    key, separator, _ = override.partition("=")
    return f"{key}={MASK}" if separator and is_secret_name(key) else masked(override)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---- paths --------------------------------------------------------------------------------------------------------


def _resolve_paths(value: Any, *, base: Path) -> Any:
    """A copy of a configuration object in which every field marked as a path is absolute."""
    if isinstance(value, list | tuple):
        return type(value)(_resolve_paths(item, base=base) for item in value)
    if isinstance(value, dict):
        return {key: _resolve_paths(item, base=base) for key, item in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changed = {}
    for field in dataclasses.fields(value):
        old = getattr(value, field.name)
        changed[field.name] = (
            _absolute(old, base=base) if field.metadata.get("path") else _resolve_paths(old, base=base)
        )
    return dataclasses.replace(value, **changed)


def _absolute(value: Any, *, base: Path) -> Any:
    """Paths become absolute; an empty one (not set) and a URI (`scheme://`) stay as they are."""
    if isinstance(value, list | tuple):
        return type(value)(_absolute(item, base=base) for item in value)
    if isinstance(value, dict):
        return {key: _absolute(item, base=base) for key, item in value.items()}
    if value is None or str(value) == "" or "://" in str(value):
        return value
    return type(value)(os.path.normpath(base / Path(value).expanduser()))
