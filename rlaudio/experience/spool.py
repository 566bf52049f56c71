"""The spool: judged groups as Arrow IPC files, so that what was generated and not yet trained outlives a crash.

One file per group, written by the reward actor that judged it; the driver moves names. A file is named after its group
and its content, is there whole or not at all, and is read only if its bytes have the checksum that the ledger knows.
Rows name clips by hash and do not hold them: those lie in the clip store. Readable with pandas as it lies.
"""

import hashlib
import json
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from rlaudio.errors import SpoolError
from rlaudio.experience.builder import check_schema

_HEADER = b"rlaudio.header"
# Object stores show a file only once its stream is closed, and have no cheap rename.
_ATOMIC_ON_CLOSE = frozenset({"s3", "gcs", "abfs"})


@dataclass(frozen=True, slots=True)
class Spooled:
    """A group's file.

    Attributes:
        name: below the spool's root.
        sha256: of its bytes.
    """

    name: str
    sha256: str
    num_bytes: int


class Spool:
    """A folder of group files. Pickles as its root.

    Args:
        root: a plain path or a `pyarrow.fs` URI, which every reward actor must see at the same place.

    Raises:
        SpoolError: the root cannot be opened.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._filesystem, self._base = _open_root(root)

    def __reduce__(self) -> tuple[object, ...]:
        return Spool, (self.root,)

    def write(self, batch: pa.RecordBatch, *, group: int, header: Mapping[str, Any]) -> Spooled:
        """Write a group's rows and what the driver knows of them.

        Args:
            batch: of the experience schema.
            header: JSON-ready; kept in the file's metadata.

        Raises:
            SpoolError: no space, no access.
        """
        metadata = {**(batch.schema.metadata or {}), _HEADER: json.dumps(header).encode()}
        marked = batch.replace_schema_metadata(metadata)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, marked.schema) as writer:
            writer.write_batch(marked)
        data = sink.getvalue()
        sha256 = hashlib.sha256(data).hexdigest()
        name = f"{group:09d}-{sha256[:16]}.arrow"
        try:
            self._filesystem.create_dir(self._base, recursive=True)
            if self._filesystem.type_name in _ATOMIC_ON_CLOSE:
                self._write(self._path(name), data)
            else:
                partial = f"{self._path(name)}.{uuid.uuid4().hex}.partial"
                self._write(partial, data)
                self._filesystem.move(partial, self._path(name))
        except (OSError, pa.ArrowException) as error:
            raise SpoolError(
                f"{self._path(name)}: cannot be written ({error}); check free space and access to run.spool"
            ) from error
        return Spooled(name, sha256, len(data))

    def read(self, spooled: Spooled) -> tuple[dict[str, Any], pa.RecordBatch]:
        """A group's header and rows.

        Raises:
            SpoolError: gone, or not the bytes that were written. DataError: of another schema version.
        """
        path = self._path(spooled.name)
        try:
            with self._filesystem.open_input_file(path) as stream:
                data = stream.read_buffer()
        except OSError as error:
            raise SpoolError(f"{path}: cannot be read ({error}); the group is played again") from error
        if hashlib.sha256(data).hexdigest() != spooled.sha256:
            raise SpoolError(f"{path}: its bytes are not those that were written; the group is played again")
        with pa.ipc.open_file(data) as reader:
            batch = reader.get_batch(0)
        metadata = dict(batch.schema.metadata)
        header: dict[str, Any] = json.loads(metadata.pop(_HEADER))
        batch = batch.replace_schema_metadata(metadata)
        check_schema(batch)
        return header, batch

    def holds(self, spooled: Spooled) -> bool:
        """Whether the file is there, by its size alone: nothing is read."""
        info = self._filesystem.get_file_info(self._path(spooled.name))
        return bool(info.type == fs.FileType.File and info.size == spooled.num_bytes)

    def remove(self, name: str) -> None:
        """Delete a file; one that is gone already is no error."""
        self._remove(self._path(name))

    def sweep(self, *, keep: Collection[str]) -> int:
        """Delete the files that are not named in `keep`, and what writers left unfinished. How many they were.

        For a start, when nobody writes: a half-written file may be somebody's.
        """
        doomed = []
        for info in self._listed():
            if info.type == fs.FileType.File and info.base_name not in keep:
                doomed.append(info.path)
        for path in doomed:
            self._remove(path)
        return len(doomed)

    def num_bytes(self) -> int:
        """Of everything that lies here."""
        return sum(info.size or 0 for info in self._listed())

    def _listed(self) -> list[fs.FileInfo]:
        selector = fs.FileSelector(self._base, allow_not_found=True)
        listed: list[fs.FileInfo] = self._filesystem.get_file_info(selector)
        return listed

    def _remove(self, path: str) -> None:
        try:
            self._filesystem.delete_file(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise SpoolError(f"{path}: cannot be deleted ({error}); check access to run.spool") from error

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _write(self, path: str, data: pa.Buffer) -> None:
        with self._filesystem.open_output_stream(path) as stream:
            stream.write(data)


def is_local(root: str) -> bool:
    """Whether a root is a path of this machine, be it written as a path or as a file:// URI."""
    return "://" not in root or root.startswith("file://")


def _open_root(root: str) -> tuple[fs.FileSystem, str]:
    if "://" not in root:
        return fs.LocalFileSystem(), str(Path(root).absolute())
    try:
        filesystem, base = fs.FileSystem.from_uri(root)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise SpoolError(
            f"run.spool {root!r} cannot be opened ({error}); use a path or a file://, s3:// or gs:// URI"
        ) from error
    return filesystem, base.rstrip("/")
