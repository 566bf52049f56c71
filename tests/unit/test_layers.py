"""Imports point downwards only, and the pure half of the package stays free of Ray, vLLM and DeepSpeed."""

import ast
import graphlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(importlib.util.find_spec("rlaudio").origin).parent  # type: ignore[union-attr, arg-type]

PURE = (
    "rlaudio.types",
    "rlaudio.errors",
    "rlaudio.config",
    "rlaudio.registry",
    "rlaudio.config_loader",
    "rlaudio.config_judges",
    "rlaudio.config_stages",
    "rlaudio.config_checks",
    "rlaudio.config_checks_judges",
    "rlaudio.config_checks_stages",
    "rlaudio.config_objects",
    "rlaudio.preflight",
    "rlaudio.runs",
    "rlaudio.fingerprint",
    "rlaudio.collecting",
    "rlaudio.audio",
    "rlaudio.data",
    "rlaudio.dialogue",
    "rlaudio.experience",
    "rlaudio.rewards",
    "rlaudio.learner.loss",
    "rlaudio.learner.advantage",
    "rlaudio.learner.algorithms.catalog",
)

LAYERS: tuple[tuple[str, ...], ...] = (
    ("types", "errors", "algorithm_facts"),
    (
        "config",
        "config_judges",
        "config_stages",
        "registry",
        "config_loader",
        "secrets",
        "preflight",
        "runs",
        "fingerprint",
        "aio",
        "collecting",
        "engines.base",
        "models.base",
    ),  # contracts and tools
    ("audio",),
    # `evals.summary` and `observe.metrics` are what actors report: pure records of numbers, so they lie below them.
    (
        "data",
        "dialogue",
        "experience",
        "rewards",
        "learner.loss",
        "learner.advantage",
        "learner.credit",
        "learner.correction",
        "learner.algorithms",
        "evals.stats",
        "evals.summary",
        "config_checks",
        "config_checks_judges",
        "config_checks_stages",
        "config_objects",
        "observe.metrics",
    ),
    ("models", "weights", "engines", "actors", "learner"),
    ("observe", "evals", "doctor"),
    ("loop", "recipes", "jobs", "manifests"),
    ("cli",),
)
"""From the bottom up. The longest fitting prefix of a module's name decides."""


def modules() -> dict[str, Path]:
    """Dotted name below `rlaudio` -> file, for every module there is."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer_of(module: str) -> int:
    entries = [
        (len(entry), level)
        for level, layer in enumerate(LAYERS)
        for entry in layer
        if f"{module}.".startswith(f"{entry}.")
    ]
    assert entries, f"rlaudio.{module} belongs to no layer: add it to LAYERS"
    return max(entries)[1]


def imported(tree: ast.AST, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module below `rlaudio`) of each import, deferred and type-checking ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("rlaudio."):
                    yield node.lineno, alias.name.removeprefix("rlaudio.")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "rlaudio":
            base = (node.module or "").removeprefix("rlaudio").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                if inner in known or base:
                    yield node.lineno, inner if inner in known else base


def edges() -> Iterator[tuple[str, int, str]]:
    """(importing module, line, imported module) over the whole package."""
    found = modules()
    for module, path in found.items():
        for line, target in imported(ast.parse(path.read_text()), set(found)):
            if module and target:
                yield module, line, target


def test_imports_point_downwards() -> None:
    upwards = [
        f"rlaudio.{module}:{line} imports rlaudio.{target}, which is above it"
        for module, line, target in edges()
        if layer_of(target) > layer_of(module)
    ]
    assert not upwards, "\n".join(upwards)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, _, target in edges():
        graph.setdefault(module, set()).add(target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these import each other: {' <- '.join(error.args[1])}")


def test_imports_are_absolute() -> None:
    relative = [
        f"rlaudio.{module}:{node.lineno}"
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert not relative


def test_the_reader_of_imports_sees_every_form() -> None:
    source = """
import rlaudio.loop
from rlaudio import cli
from rlaudio.actors.pool import Pool
def deferred():
    from rlaudio.evals import stats
"""
    known = {"loop", "cli", "actors", "actors.pool", "evals", "evals.stats"}
    assert [target for _, target in sorted(imported(ast.parse(source), known))] == [
        "loop",
        "cli",
        "actors.pool",
        "evals.stats",
    ]


def test_the_pure_half_imports_without_ray_vllm_and_deepspeed() -> None:
    pure = [
        f"rlaudio.{module}".removesuffix(".")
        for module in modules()
        if module and f"rlaudio.{module}.".startswith(tuple(f"{p}." for p in PURE))
    ]
    assert len(pure) >= len(PURE) - 2
    program = (
        f"import importlib, sys\nfor name in {pure!r}:\n    importlib.import_module(name)\n"
        "print(*sorted({'ray', 'vllm', 'deepspeed', 'mlflow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
