"""Layouts by name; another is `package.module:Class` of the same protocol."""

from rlaudio.data.importers.audiomcq import AudioMcq
from rlaudio.data.importers.avqa import Avqa, AvqaTagged
from rlaudio.data.importers.base import Importer
from rlaudio.data.importers.multi_challenge import MultiChallenge
from rlaudio.data.importers.spokenwoz import SpokenWoz
from rlaudio.data.importers.uro_bench import UroBench
from rlaudio.errors import ConfigError
from rlaudio.registry import load_object

IMPORTERS: dict[str, type[Importer]] = {
    "avqa": Avqa,
    "avqa-tagged": AvqaTagged,
    "audiomcq": AudioMcq,
    "spokenwoz": SpokenWoz,
    "uro-bench": UroBench,
    "multichallenge": MultiChallenge,
}


def importer_of(name: str) -> Importer:
    """Raises ConfigError: there is no such layout or class."""
    if ":" in name:
        made: Importer = load_object(name)()
        return made
    if name not in IMPORTERS:
        raise ConfigError(f"--from {name!r} is no known layout: use {', '.join(IMPORTERS)} or `package.module:Class`")
    return IMPORTERS[name]()
