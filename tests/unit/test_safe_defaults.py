"""Safe unless asked: secrets are not written down, nothing listens beyond loopback, no file can bring code."""

import ast
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlaudio import config_loader
from rlaudio.cli import main as cli
from rlaudio.cli.train import _flat
from rlaudio.config import RunConfig, SourceSettings
from rlaudio.config_checks import run_problems, secret_problems
from rlaudio.config_loader import load_config, to_yaml
from rlaudio.data.records import read_records
from rlaudio.errors import CheckpointError, ConfigError, DataError
from rlaudio.recipes.checkpoints import CheckpointStore, DriverState

PACKAGE = Path(config_loader.__file__).parent
ROOT = PACKAGE.parent


def sources() -> Iterator[tuple[str, str]]:
    for folder in (PACKAGE, ROOT / "examples", ROOT / "bench", ROOT / "scripts"):
        for path in sorted(folder.rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """(file:line, dotted name of what is called, call)."""
    for name, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call):
                yield f"{name}:{node.lineno}", ast.unparse(node.func), node


# ---- secrets ------------------------------------------------------------------------------------------------------


def test_a_secret_in_a_configuration_is_refused_and_not_repeated() -> None:
    config = RunConfig()
    config.rewards.sources = [SourceSettings("a", "m:A", options={"client": {"api_key": "sk-123456"}})]
    config.tracking.uri = "postgresql://me:hunter22@db/mlflow"
    config.rewards.judge_model.endpoint.extra_body = {"headers": [{"Authorization_token": "tok-123456"}]}
    found = "\n".join(run_problems_of(config))
    for key in (
        "rewards.sources[0].options.client.api_key",
        "tracking.uri",
        "rewards.judge_model.endpoint.extra_body.headers[0].Authorization_token",
    ):
        assert f"{key} holds" in found
    assert not {secret for secret in ("sk-123456", "hunter22", "tok-123456") if secret in found}


def run_problems_of(config: RunConfig) -> list[str]:
    found = list(secret_problems(config))
    assert set(found) <= set(run_problems(config)), "a run does not look for secrets"
    return found


def test_the_defaults_hold_no_secret() -> None:
    assert list(secret_problems(RunConfig())) == []


def test_an_overridden_secret_is_masked_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run: {name: x}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, tmp_path / "c.yaml", ["model.options.api_key=sk-123456", "tracking.uri=http://a:pw12@b"])
    assert "sk-123456" not in str(caught.value) and "pw12" not in str(caught.value)
    assert "model.options.api_key=***" in str(caught.value)


def test_what_mlflow_is_told_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "tok-123456")
    config = RunConfig()
    config.tracking.experiment = "with tok-123456"
    assert _flat(to_yaml(config))["tracking.experiment"] == "with ***"


def test_errors_are_printed_without_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_TOKEN", "tok-123456")
    assert cli.main(["train", "/nowhere/tok-123456.yaml"]) == 2
    assert "tok-123456" not in capsys.readouterr().err


# ---- what runs code, what listens ---------------------------------------------------------------------------------


def test_no_model_may_bring_code() -> None:
    found = []
    for place, name, call in calls():
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) != "False":
                found.append(f"{place}: {name}(trust_remote_code={ast.unparse(keyword.value)})")
    assert not found
    strings = [place for place, text in sources() if re.search(r"trust[_-]remote[_-]code[\"']?\s*[:=]\s*True", text)]
    assert not strings


def test_pickles_are_read_by_nobody() -> None:
    """DeepSpeed's own resume files, as they are or dealt to other ranks, are the one exception."""
    hands_over = {"rlaudio/learner/checkpoint.py", "rlaudio/learner/universal.py"}
    found = []
    for place, name, call in calls():
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name.endswith(("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load")):
            found.append(place)
        if name.endswith("torch.load") and keywords.get("weights_only") != "True":
            found.append(place)
        if keywords.get("allow_pickle") == "True":
            found.append(place)
        if name.endswith("load_checkpoint") and place.split(":")[0] not in hands_over:
            found.append(place)
    assert not found


def test_nothing_listens_beyond_loopback_unless_asked() -> None:
    assert not [place for place, text in sources() if re.search(r"[\"'](0\.0\.0\.0|::)[\"']", text)]
    starts = [(place, call) for place, name, call in calls() if name == "ray.init"]
    assert starts
    for place, call in starts:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        local = keywords.get("address") in (None, "'local'")
        assert not local or keywords.get("include_dashboard") == "False", place
        assert "dashboard_host" not in keywords, place


def test_resume_files_are_the_runs_own(tmp_path: Path) -> None:
    """DeepSpeed reads pickles: nothing that another wrote, and nothing that lies elsewhere, comes to it."""
    loads = {place.split(":")[0] for place, name, _ in calls() if name == "learner.load"}
    takes = {f"rlaudio/recipes/{name}.py" for name in ("training", "sft", "replay")}
    assert loads == takes, "each takes what `CheckpointStore` gave"

    def damaged(damage: Callable[[Path, Path], object]) -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        store = CheckpointStore(folder / "run")
        saved = store.begin(2)
        (saved / "engine").mkdir()
        (saved / "engine" / "states.pt").write_bytes(b"pickle")
        store.finish(saved, DriverState(step=2, incarnation=0, number=2, prompts={}))
        assert store.examined(2) == folder / "run" / "step-000002"
        damage(store.examined(2), elsewhere)
        with pytest.raises(CheckpointError) as examined:
            store.examined(2)
        with pytest.raises(CheckpointError) as latest:
            store.latest()
        assert str(examined.value).split(": step-")[0] in str(latest.value)
        return str(examined.value)

    assert "was put there later" in damaged(lambda own, _: (own / "engine" / "more.pt").write_bytes(b"x"))
    assert "is not what was saved" in damaged(lambda own, _: (own / "engine" / "states.pt").write_bytes(b"other!"))
    for lent in ("engine/states.pt", "engine", "."):

        def lend(own: Path, elsewhere: Path, lent: str = lent) -> None:
            moved = (own / lent).rename(elsewhere / "moved")  # the very bytes that the manifest knows
            (own / lent if lent != "." else own).symlink_to(moved)

        assert "is a link" in damaged(lend), lent


# ---- sizes and paths ----------------------------------------------------------------------------------------------


def test_a_huge_configuration_is_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: b\n" * 300_000)
    with pytest.raises(ConfigError, match="no configuration needs more"):
        load_config(RunConfig, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "uri",
    ["../x.wav", "/etc/passwd", "a/../../x.wav", "file:///etc/passwd", "s3://bucket/x.wav", "..\\x.wav", "a/..", ".."],
)
def test_a_record_cannot_name_what_lies_outside(tmp_path: Path, uri: str) -> None:
    path = tmp_path / "r.jsonl"
    part = f'{{"audio": "{uri}", "sha256": "{"0" * 64}", "sample_rate": 16000}}'.replace("\\", "\\\\")
    path.write_text(f'{{"id": "r", "task": "t", "messages": [{{"role": "user", "content": [{part}]}}]}}\n')
    with pytest.raises(DataError, match="does not leave it"):
        read_records(path)
