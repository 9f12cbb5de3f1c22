"""Starts all ranks of a run, here or by Slurm: ``python scripts/launch.py cluster=slurm KEY=VALUE ...``.

launch.py KEY=VALUE ...                                     start, or submit
launch.py fill KEY=VALUE ...                                submit the array job that fills the reference store
launch.py status|logs [--follow]|cancel|requeue run.name=NAME   of a run that was submitted
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from nemo_aapo.cli.main import config_main, exit_code
from nemo_aapo.config import Config, check_overrides
from nemo_aapo.config.command_line import read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.errors import ConfigError
from nemo_aapo.launch import local
from nemo_aapo.launch.slurm import control, logs, submit
from nemo_aapo.launch.slurm.paths import Places
from nemo_aapo.launch.slurm.script import Site
from nemo_aapo.models.directory import check_model
from nemo_aapo.run.directory import check_run_directory

TRAIN = Path(__file__).with_name("train.py")
SITE = Site(sys.executable, TRAIN.resolve().parents[1], Path.cwd())
FOLLOW_S = 1.0
ASK_SLURM_S = 10.0


def check(config: Config) -> None:
    """Refuse here what every rank would refuse: model, layout, run directory."""
    check_model(config, config.trainer.num_nodes * config.trainer.devices)
    check_run_directory(config)


def launch(config: Config, tree: dict[str, Any]) -> int:
    if config.cluster.kind == "slurm":
        return submit.submit_training(config, tree, SITE)
    if config.cluster.kind == "interactive":
        return submit.run_interactively(config, tree, SITE)
    command = [sys.executable, str(TRAIN), *sys.argv[1:]]
    if config.dry_run:
        print(f"{config.trainer.devices} ranks of: {' '.join(command)}")
        return 0
    return local.launch(config, command)


def fill(config: Config, tree: dict[str, Any]) -> int:
    if config.cluster.kind != "slurm":
        raise ConfigError("launch.py fill submits an array job: it needs cluster=slurm")
    return submit.submit_fill(config, tree, SITE)


def run_directory(words: list[str]) -> Places:
    """Where the run is that the words name; they need not say all that a start needs."""
    command = read_command_line(words)
    check_overrides(command.overrides, command.groups())
    return Places(Path(compose(command)["run"]["dir"]).absolute())


def show_logs(places: Places, follow: bool) -> str:
    """The end of all logs; with ``follow`` also what is added, until no job of the run is left."""
    tail = logs.Tail(places.logs, from_end=True)
    text = "\n".join(logs.last_lines(places.logs))
    if not follow:
        return text
    print(text)
    asked = 0.0
    while True:
        for line in tail.lines():
            print(line, flush=True)
        if time.monotonic() - asked > ASK_SLURM_S:
            asked = time.monotonic()
            if all(state.is_over for state in control.states_of(places)):
                return "\n".join([*tail.lines(), "no job of this run is left; `status` says how it ended"])
        time.sleep(FOLLOW_S)


def steer(action: str, words: list[str]) -> int:
    """One of the actions on a run that was submitted."""
    follow = "--follow" in words and action == "logs"
    words = [word for word in words if not (follow and word == "--follow")]
    places = run_directory(words)
    if action == "logs":
        print(show_logs(places, follow))
    else:
        print({"status": control.status, "cancel": control.cancel, "requeue": control.requeue}[action](places))
    return 0


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("status", "logs", "cancel", "requeue"):
        return exit_code(lambda: steer(argv[0], argv[1:]))
    if argv and argv[0] == "fill":
        return config_main(
            fill, description="Fill the reference store.", argv=argv[1:], check=check, through_nemo=False
        )
    return config_main(launch, description=__doc__, argv=argv, check=check, through_nemo=False)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
