"""The `rlaudio` command: one file per subcommand, heavy imports deferred to the one that runs."""

import argparse
import sys
from collections.abc import Sequence

from rlaudio.cli import cluster, submit
from rlaudio.cli.data import add_data_commands
from rlaudio.errors import RlaudioError
from rlaudio.secrets import masked

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; an expected error is one line on stderr and exit code 2, Ctrl-C one line and 130."""
    parser = argparse.ArgumentParser(prog="rlaudio", description="Reinforcement learning for spoken dialogue models.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("train", "what the file's `recipe` says: rl (play, judge, learn, evaluate), sft, reward_model"),
        ("doctor", "prove that engine and trainer of a run agree, with numbers; exit code 1 where they do not"),
        ("sft", "supervised training in phases: mid-training, cold start"),
        ("submit", "run on a Ray cluster: submit, follow, stop, list jobs"),
        ("cluster", "print a cluster's manifest, sized from the configuration"),
        ("judge", "how good a judge is: accuracy, position and length bias, on your sets and public ones"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", help="YAML file", nargs="?" if name == "submit" else None)
        command.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
        if name == "train":
            command.add_argument("--resume", metavar="RUN", help="go on with this run folder from its last checkpoint")
        if name in ("train", "sft"):
            command.add_argument(
                "--tiny",
                action="store_true",
                help="the same recipe on a CPU in minutes: tiny checkpoints, few dialogues",
            )
        if name == "submit":
            submit.add_arguments(command)
        if name == "cluster":
            cluster.add_arguments(command)
        if name == "doctor":
            command.add_argument("--static", action="store_true", help="compute from the settings alone, start nothing")
    add_data_commands(commands)
    scale = commands.add_parser("scale", help="change the number of a run's actors while it goes on, or show it")
    scale.add_argument("run", help="its folder, or its name on the cluster that RAY_ADDRESS names")
    scale.add_argument("overrides", nargs="*", metavar="pool=number", help="rollout=N, reward=N; none only shows")
    scale.add_argument("--no-wait", action="store_true", help="return when the run has been told")
    scale.add_argument("--deadline", type=float, default=600.0, metavar="S", help="seconds to wait for the sizes")
    command = commands.add_parser("audit", help="whether every prompt group of a run ended once; exit code 1 if not")
    command.add_argument("run", help="run folder, of a run that lives or is dead")
    command = commands.add_parser("replay", help="train a learner on a run's experience again, in a new run folder")
    command.add_argument("run", help="run folder of a run with run.keep_spool=true")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="learner and algorithm settings to try")
    command.add_argument(
        "--from", dest="first", type=int, default=0, metavar="STEP", help="from its checkpoint of STEP"
    )
    command.add_argument("--to", dest="last", type=int, metavar="STEP", help="end before this step")
    # argparse takes no `key=value` behind an option unless it is told where to look.
    arguments, behind = parser.parse_known_args(argv)
    strange = [argument for argument in behind if argument.startswith("-") or "=" not in argument]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if behind:
        more = getattr(arguments, "overrides", getattr(arguments, "paths", None))
        if more is None:
            parser.error(f"{arguments.command} takes no settings: {' '.join(behind)}")
        more.extend(behind)
    try:
        if arguments.command == "audit":
            from rlaudio.cli.audit import audit_command

            return audit_command(arguments.run)
        if arguments.command == "replay":
            from rlaudio.cli.replay import replay_command

            return replay_command(
                arguments.run, arguments.overrides, first_step=arguments.first, last_step=arguments.last
            )
        if arguments.command == "data":
            code: int = arguments.run(arguments)
            return code
        if arguments.command == "train":
            from rlaudio.cli.recipes import recipe_command

            return recipe_command(arguments.config, arguments.overrides, resume=arguments.resume, tiny=arguments.tiny)
        if arguments.command == "judge":
            from rlaudio.cli.judge import judge_command

            return judge_command(arguments.config, arguments.overrides)
        if arguments.command == "doctor":
            from rlaudio.cli.doctor import doctor_command

            return doctor_command(arguments.config, arguments.overrides, static=arguments.static)
        if arguments.command == "scale":
            from rlaudio.cli.scale import scale_command

            return scale_command(
                arguments.run, arguments.overrides, wait=not arguments.no_wait, deadline_s=arguments.deadline
            )
        if arguments.command == "submit":
            return submit.submit_command(arguments)
        if arguments.command == "cluster":
            return cluster.cluster_command(arguments)
        from rlaudio.cli.sft import sft_command

        return sft_command(arguments.config, arguments.overrides, tiny=arguments.tiny)
    except RlaudioError as error:
        print(masked(f"{type(error).__name__}: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # a command that has something to save does so and says it
        print(f"stopped: rlaudio {arguments.command} wrote nothing more", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
