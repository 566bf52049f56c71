"""`rlaudio data check|curate|import|speak`: everything about data sets that has no training in it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_data_commands(commands: _SubParsersAction[Any]) -> None:
    """Give `rlaudio` its `data` subcommands; each sets `run`, which takes the parsed arguments and returns a code."""
    data = commands.add_parser("data", help="check, import and make data sets")
    verbs = data.add_subparsers(dest="verb", required=True)
    check = verbs.add_parser("check", help="list everything that is wrong with data, with file, line and fix")
    check.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a run's YAML file (and key=value), or JSONL files; `name=FILE` names a split, `train` is trained on",
    )
    check.add_argument("--clips", metavar="ROOT", help="root of the clip store; the files' own folder by default")
    check.add_argument("--license", action="append", default=[], metavar="NAME", help="allowed; may be repeated")
    check.add_argument("--max-clip-s", type=float, default=0.0, metavar="S", help="longest sound; 0: an hour")
    check.add_argument("--same-words", choices=("refuse", "warn", "allow"), help="as data.same_words")
    check.add_argument("--headers", action="store_true", help="of sounds only the headers, as a run does by default")
    check.add_argument("--processes", type=int, default=0, metavar="N", help="that decode; 0: one per core")
    check.add_argument("--no-cache", action="store_true", help="look at sounds again that were right before")
    check.add_argument("--json", action="store_true", help="one JSON object on stdout")
    check.set_defaults(run=_check)
    curate = verbs.add_parser("curate", help="keep the records that a policy gets right sometimes: 3 to 6 of 8 times")
    curate.add_argument("config", help="YAML file: that of an RL run will do")
    curate.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    curate.add_argument("--resume", metavar="RUN", help="go on with this run folder: what was rolled out is kept")
    curate.set_defaults(run=_curate)
    bring = verbs.add_parser("import", help="make records and clips of a local copy of a public set")
    bring.add_argument("--from", dest="layout", required=True, metavar="LAYOUT", help="a name, or package.module:Class")
    # Not nargs=2 with two names: argparse of Python 3.11 fails where it should say what is missing.
    bring.add_argument("paths", action="append", metavar="SRC", help="the copy")
    bring.add_argument("paths", action="append", metavar="OUT", help="the new data root")
    bring.add_argument("--license", metavar="NAME", help="of the copy, in place of the one that is known of the set")
    bring.set_defaults(run=_import)
    speak = verbs.add_parser("speak", help="let voices say the users' texts of records")
    speak.add_argument("paths", action="append", metavar="TEXTS", help="JSONL of records")
    speak.add_argument("paths", action="append", metavar="OUT", help="the new data root")
    speak.add_argument(
        "--voice",
        action="append",
        required=True,
        metavar="CLASS [{OPTIONS}]",
        help="package.module:Class of a rlaudio.audio.voice:Voice, and its options as YAML; of several one a record",
    )
    speak.add_argument("--language", metavar="TAG", help='what is spoken, for example "en"')
    speak.add_argument("--seed", type=int, default=0, help="decides which voice speaks which record")
    speak.set_defaults(run=_speak)


def _check(arguments: argparse.Namespace) -> int:
    from rlaudio.cli.data_check import check_command

    return check_command(arguments)


def _curate(arguments: argparse.Namespace) -> int:
    from rlaudio.cli.data_curate import curate_command

    return curate_command(arguments.config, arguments.overrides, resume=arguments.resume)


def _import(arguments: argparse.Namespace) -> int:
    from rlaudio.cli.data_make import import_command

    return import_command(arguments)


def _speak(arguments: argparse.Namespace) -> int:
    from rlaudio.cli.data_make import speak_command

    return speak_command(arguments)
