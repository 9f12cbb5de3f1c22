"""Turns a data set into JSONL that a run takes as it is, with a report: ``scripts/prepare_data.py SOURCE -o FILE``.

SOURCE is a JSONL, JSON, csv, tsv, Parquet or Arrow file, a directory of a Hugging Face data set, a name on the hub
(org/name), or reasoning_gym:TASK. Rows that no run could use are left out and counted, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nemo_aapo.cli.main import exit_code, not_empty, typed_path
from nemo_aapo.config.command_line import config_directory
from nemo_aapo.config.sources import GYM, Source
from nemo_aapo.errors import FAILED, ConfigError
from nemo_aapo.utils.files import require_file
from nemo_aapo.utils.unforeseen import paths_refused

if TYPE_CHECKING:
    from nemo_aapo.data.prepared.answers import AnswerCheck

_FIELDS_OF_FILES = ("prompt_field", "answer_field", "answer_form", "subset", "split")
_MOST_WORKERS = 8
_SETTINGS_OF_TASKS = ("size", "seed", "parameters")


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    arguments = read_arguments(words)
    return exit_code(lambda: _written(arguments))


def _written(arguments: argparse.Namespace) -> int:
    try:
        with paths_refused():
            return run(arguments)
    except KeyboardInterrupt:
        print(f"stopped: {arguments.output} was not written", file=sys.stderr)
        raise


def read_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command's options; None: the words of this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=not_empty, nargs="?", help="what to read; may be left out with --preset")
    parser.add_argument("-o", "--output", type=typed_path, required=True, metavar="FILE", help="the JSONL to write")
    parser.add_argument("--report", type=typed_path, metavar="FILE", help="write the report there as JSON, too")
    fields = parser.add_argument_group("where things stand in it")
    fields.add_argument("--preset", metavar="NAME", help="fields (and source) of conf/data/NAME.yaml")
    fields.add_argument("--part", choices=["train", "validation"], default="train", help="which part of the preset")
    fields.add_argument("--prompt-field", metavar="F", help="question: text or chat messages (default: question)")
    fields.add_argument("--answer-field", metavar="F", help="gold answer (default: answer)")
    fields.add_argument("--answer-form", choices=["auto", "boxed"], help="boxed: the last \\boxed{} of a solution")
    fields.add_argument("--subset", metavar="NAME", help="of a hub data set")
    fields.add_argument("--split", metavar="NAME", help="of a data set with several (default: train)")
    gym = parser.add_argument_group("reasoning_gym:TASK")
    gym.add_argument("--size", type=int, metavar="N", help="so many items")
    gym.add_argument("--seed", type=int, metavar="N", help="which items (default: 0)")
    gym.add_argument("--parameters", type=_settings, metavar="JSON", help='the task\'s settings: {"min_terms": 2}')
    checks = parser.add_argument_group("checks")
    checks.add_argument(
        "--reward",
        default="accuracy",
        metavar="NAME",
        help="gold answers must suit this reward (default: accuracy; none)",
    )
    checks.add_argument(
        "--tokenizer", type=not_empty, metavar="DIR", help="count lengths in its tokens, not in characters"
    )
    checks.add_argument("--max-prompt-tokens", type=int, metavar="N", help="leave out longer questions")
    checks.add_argument(
        "--against",
        type=not_empty,
        action="append",
        default=[],
        metavar="SOURCE",
        help="held-out data (any source whose rows have a question or problem, or preset:NAME); rows whose question "
        "is among them are reported; may be given again",
    )
    checks.add_argument("--drop-contaminated", action="store_true", help="leave those out")
    arguments = parser.parse_args(words)
    if arguments.source is None and arguments.preset is None:
        parser.error("name a source, or --preset")
    if arguments.max_prompt_tokens is not None and arguments.tokenizer is None:
        parser.error("--max-prompt-tokens needs --tokenizer")
    if arguments.drop_contaminated and not arguments.against:
        parser.error("--drop-contaminated needs --against")
    task = (arguments.source or "").startswith(GYM)
    for name in _FIELDS_OF_FILES if task else _SETTINGS_OF_TASKS:
        if getattr(arguments, name) is not None:
            what = f"not with {arguments.source}" if task else f"with {GYM}TASK only"
            parser.error(f"--{name.replace('_', '-')} has an effect {what}")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Read, check and write what the options ask for; the exit code."""
    from nemo_aapo.data import prepare

    source = source_of(arguments)
    for option, path in (("--output", arguments.output), ("--report", arguments.report)):
        if path is not None:
            require_file(path, f"{option} {path}")
    if arguments.report is not None and arguments.report.resolve() == arguments.output.resolve():
        raise ConfigError(f"--report {arguments.report}: is --output, too, which it would replace; name another file")
    with contextlib.ExitStack() as stack:
        rows, report = prepare.prepare(
            source,
            held_out=[held_out_source(name) for name in arguments.against],
            drop_contaminated=arguments.drop_contaminated,
            count_tokens=token_counter(arguments.tokenizer),
            max_prompt_tokens=arguments.max_prompt_tokens,
            verify_answer=verifier(arguments.reward, source, stack),
        )
    print(report.text(), end="")
    if not rows:
        print(f"{source.path}: no row is left: nothing was written", file=sys.stderr)
        return FAILED
    prepare.write_rows(rows, arguments.output)
    if arguments.report:
        prepare.write_report(report, arguments.report)
    return 0


def source_of(arguments: argparse.Namespace) -> Source:
    """The source that the options or the preset name."""
    from nemo_aapo.data.prepare import preset_source

    names = (*_FIELDS_OF_FILES, *_SETTINGS_OF_TASKS)
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    given |= {"path": arguments.source} if arguments.source is not None else {}
    if arguments.preset is None:
        return Source(**given)
    return preset_source(config_directory() / "data" / f"{arguments.preset}.yaml", arguments.part, given)


def held_out_source(name: str) -> Source:
    """The source of held-out questions, which may be a preset's."""
    from nemo_aapo.data.prepare import preset_source

    prefix, colon, preset = name.partition("preset:")
    if colon and not prefix:
        return preset_source(config_directory() / "data" / f"{preset}.yaml", "validation", {})
    return Source(name)


def _settings(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object, such as {{"min_terms": 2}}')
    return found


def token_counter(tokenizer: str | None) -> Callable[[str], int] | None:
    """Text -> its number of tokens; None without a tokenizer."""
    if tokenizer is None:
        return None
    from nemo_aapo.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded(text, verbose=False)["input_ids"])


def verifier(reward: str, source: Source, stack: contextlib.ExitStack) -> AnswerCheck | None:
    """The reward's check of gold answers, in several processes; None where nothing is to be checked."""
    if reward == "none" or source.task:
        return None
    from nemo_aapo.data.prepared.answers import AnswerCheck
    from nemo_aapo.rewards import build_reward
    from nemo_aapo.rewards.workers.runner import RewardRunner

    try:
        made = build_reward({"name": reward})
    except ValueError as error:
        raise ConfigError(f"--reward: {error}") from None
    workers = min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    runner = stack.enter_context(RewardRunner([(made, 1.0)], workers, timeout_s=10.0))
    return AnswerCheck(runner.check_answer, 2 * workers, note=lambda line: print(line, file=sys.stderr))
