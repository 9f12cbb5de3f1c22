"""All commands by one name: ``nemo-aapo COMMAND ...``, or ``python -m nemo_aapo.cli COMMAND ...``."""

from __future__ import annotations

import difflib
import importlib
import sys

from nemo_aapo.errors import REFUSED

COMMANDS = {
    "train": "train a policy: one rank, alone or under torchrun",
    "launch": "start all ranks of a run, here or by Slurm; status, logs, cancel, requeue",
    "evaluate": "measure models on benchmarks; compare two evaluations",
    "convert": "convert models between Hugging Face and Megatron, inspect and verify them",
    "check-algorithm": "show that an algorithm of one's own does not depend on how its batch is cut",
    "report": "a page that shows a run, or compares several",
    "runs": "all runs below a folder in a table",
    "plan": "memory, time and layouts of a run, without a GPU",
    "doctor": "look at a machine or an allocation before it burns hours",
    "serve": "host a rollout engine behind HTTP",
    "fill": "fill the store of reference rewards",
    "prepare-data": "turn a data set into JSONL that a run takes as it is",
}
"""Name -> what it does; ``main`` of the module of that name does it."""
FOLDERS = {"check-algorithm": "view", "report": "view", "runs": "view"}
"""Commands whose module lies in a folder of its own."""
USAGE = "\n".join(
    (
        "usage: nemo-aapo COMMAND ...      nemo-aapo COMMAND --help says more",
        "",
        *(f"  {name:<16}{meaning}" for name, meaning in COMMANDS.items()),
    )
)


def module_of(name: str) -> str:
    """The module of a command.

    >>> module_of("prepare-data"), module_of("runs")
    ('nemo_aapo.cli.prepare_data', 'nemo_aapo.cli.view.runs')
    """
    return ".".join(filter(None, ("nemo_aapo.cli", FOLDERS.get(name), name.replace("-", "_"))))


def main() -> int:
    """Run the command that the words of this process name; its exit code."""
    name, words = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("--help", "-h"):
        print(USAGE)
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"nemo-aapo: there is no command {name!r}; {hint}", file=sys.stderr)
        return REFUSED
    sys.argv = [f"nemo-aapo {name}", *words]  # what usage lines call it
    code: int = importlib.import_module(module_of(name)).main()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
