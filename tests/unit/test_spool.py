"""The spool: a group comes back bit for bit with what was known of it, or not at all."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rlaudio.actors.reward import ScoredHeader
from rlaudio.actors.spooling import counts_of, header_from_json, header_to_json
from rlaudio.config import RunConfig, RunSettings
from rlaudio.errors import ConfigError, SpoolError
from rlaudio.experience.builder import played_batch
from rlaudio.experience.spool import Spool
from rlaudio.observe.metrics import GroupStats
from rlaudio.recipes.restoring import require_shared_roots
from rlaudio.runs import RunFolder
from rlaudio.types import Dialogue, Message, PromptRecord, TextPart, Turn, VersionSpan, WeightVersion

STATS = GroupStats(
    num_dialogues=1, num_turns=1, rewards={"odd": 0.1}, num_response_tokens=4, num_parsable=1, num_correct=0, ages=(3,)
)  # fmt: skip


def batch(group: int) -> pa.RecordBatch:
    ids = np.arange(4, dtype=np.int32)
    spans = (VersionSpan(WeightVersion(1, 7), 0, 4),)
    turn = Turn(0, ids[:3], ids, ids.astype(np.float32) / 3, spans, (), "so", "yes", "stop")
    record = PromptRecord("p", "t", (Message("user", (TextPart("hi"),)),))
    return played_batch(record, [Dialogue("p", group, 0, (turn,))])


def test_rows_and_header_come_back_as_they_were(tmp_path: Path) -> None:
    spool = Spool((tmp_path / "spool").as_uri())
    header = ScoredHeader(True, (WeightVersion(1, 6), WeightVersion(1, 7)), STATS)
    spooled = spool.write(batch(3), group=3, header=header_to_json(header))
    assert spool.holds(spooled) and spool.write(batch(3), group=3, header=header_to_json(header)) == spooled
    written, rows = spool.read(spooled)
    assert rows.equals(batch(3), check_metadata=True)
    assert ScoredHeader(**header_from_json(written)) == header
    counts = counts_of(rows)
    assert (counts.num_turns, counts.prompt_tokens, counts.response_tokens) == (1, 3, 4)
    assert [path.name for path in (tmp_path / "spool").iterdir()] == [spooled.name], "nothing half-written is left"


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_file_that_is_not_what_was_written_is_refused(tmp_path: Path, damage: str) -> None:
    spool = Spool(str(tmp_path))
    spooled = spool.write(batch(3), group=3, header={})
    path = tmp_path / spooled.name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if damage == "changed" else data[:-9])
    if damage == "gone":
        path.unlink()
    with pytest.raises(SpoolError, match="the group is played again"):
        spool.read(spooled)
    assert spool.holds(spooled) == (damage == "changed"), "a size alone does not tell"


def test_what_no_group_asks_for_is_swept_away(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path))
    kept, ended = (spool.write(batch(group), group=group, header={}) for group in (3, 4))
    spool.write(batch(3), group=3, header={"of": "the issue before"})
    (tmp_path / f"{kept.name}.0f.partial").write_text("half")
    assert spool.sweep(keep={kept.name}) == 3
    assert spool.holds(kept) and not spool.holds(ended) and spool.num_bytes() == kept.num_bytes
    spool.remove(ended.name)


def test_roots_of_one_machine_are_refused_on_several() -> None:
    folder = RunFolder(Path("/runs/one"))
    for spool, names in (("", "run.root .*run.spool"), ("s3://bucket/spool", "run.root")):
        config = RunConfig(run=RunSettings(name="one", root="/runs", spool=spool))
        require_shared_roots(config, folder, num_nodes=1)
        with pytest.raises(ConfigError, match=rf"3 nodes, and {names}"):
            require_shared_roots(config, folder, num_nodes=3)
        config.run.shared_root = True
        require_shared_roots(config, folder, num_nodes=3)
