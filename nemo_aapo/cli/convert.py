"""Converts models between Hugging Face and Megatron, and looks at them: ``python scripts/convert.py COMMAND --help``.

hf-to-megatron   a Hugging Face directory -> a Megatron checkpoint (mcore's torch_dist) that loads under any layout
megatron-to-hf   a Megatron checkpoint, or the newest of a run, running and crashed ones too -> a Hugging Face model
inspect          what a path holds, without loading it
verify           both sides of a conversion: every tensor's bytes, and the logits on prompts
supported        the architectures that Megatron-Bridge knows, and which of them train and convert here
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from nemo_aapo.cli.main import command_of_ranks, exit_code, typed_path
from nemo_aapo.conversion.source import find_source
from nemo_aapo.launch import local
from nemo_aapo.models import families
from nemo_aapo.prepare.conversion import (
    ConversionJob,
    Layout,
    prepare_hf_to_megatron,
    prepare_megatron_to_hf,
    prepare_verification,
)
from nemo_aapo.text.transformers5 import said
from nemo_aapo.utils.job import rank_of_job
from nemo_aapo.utils.libraries import quiet

DIFFERENT = 1
"""Exit code of a verification that found a difference."""
GRACE_S = 60.0
FAULT_TIMEOUT_S = 15.0


def hf_to_megatron(arguments: argparse.Namespace) -> int:
    """A Hugging Face directory as a Megatron checkpoint, with configuration, tokenizer and chat template beside it."""
    job = prepare_hf_to_megatron(arguments.source, arguments.out, layout_of(arguments))
    if needs_ranks(job):
        return start_ranks(job, arguments)
    from nemo_aapo.conversion import convert

    with session(job):
        convert.hf_to_megatron(job.source.path, job.target, dtype=convert.DTYPES.get(arguments.dtype))
    return say(f"{arguments.out}: Megatron checkpoint of {job.source.path}{said(job.source.path)}")


def megatron_to_hf(arguments: argparse.Namespace) -> int:
    """The model part of a Megatron checkpoint as a Hugging Face directory for transformers, with a model card."""
    job = prepare_megatron_to_hf(arguments.source, arguments.base, arguments.out, layout_of(arguments))
    if needs_ranks(job):
        return start_ranks(job, arguments)
    from nemo_aapo.conversion import convert

    with session(job):
        content = convert.checkpoint_to_hf(
            job.source,
            job.target,
            dtype=convert.DTYPES.get(arguments.dtype),
            max_shard_bytes=arguments.max_shard_size,
            adapter=arguments.adapter,
        )
    what = "LoRA adapters" if arguments.adapter else "Hugging Face model"
    return say(f"{arguments.out}: {what} of {job.source.path}, step {content.step}")


def inspect(arguments: argparse.Namespace) -> int:
    """What a Hugging Face directory, a checkpoint or a run holds, by headers and manifests only."""
    found = find_source(arguments.source, arguments.base)
    from nemo_aapo.conversion.inspect import describe

    return say("\n".join(describe(found)))


def verify(arguments: argparse.Namespace) -> int:
    """Compare a Megatron checkpoint with a Hugging Face directory, or this with its own conversion, in float32.

    Exit code 1 if a tensor's bytes differ, or a log-prob by more than the tolerance.
    """
    job = prepare_verification(arguments.source, arguments.base, arguments.hf, layout_of(arguments))
    if needs_ranks(job):
        return start_ranks(job, arguments)
    from nemo_aapo.conversion import verify as verification

    questions = list(verification.PROMPTS)
    if arguments.prompts is not None:
        questions = verification.read_questions(arguments.prompts, arguments.prompt_field, arguments.max_prompts)
    with session(job):
        verdict = verification.verify(job.source, job.target, questions)
    if verdict is None:
        return 0
    if note := said(job.target):
        say(f"{job.target}{note}")
    say("\n".join(verification.report(verdict, arguments.tolerance)))
    return 0 if verdict.ok(arguments.tolerance) else DIFFERENT


def supported(arguments: argparse.Namespace) -> int:
    """All architectures that Megatron-Bridge knows, and what can be done with them here."""
    from nemo_aapo.mcore.bridge import loader

    return say(families.supported(loader.known_architectures()))


def layout_of(arguments: argparse.Namespace) -> Layout:
    """The ranks that the options ask for."""
    return Layout(arguments.tp, arguments.pp, arguments.ep)


def needs_ranks(job: ConversionJob) -> bool:
    """Whether this process starts the ranks of its layout."""
    return local.starts_ranks(job.layout.ranks)


def start_ranks(job: ConversionJob, arguments: argparse.Namespace) -> int:
    """This command once more on each rank of its layout; their exit code."""
    with tempfile.TemporaryDirectory(prefix="convert_") as logs:
        return local.run_ranks(
            command_of_ranks("convert", arguments.words),
            job.layout.ranks,
            Path(logs),
            grace_s=GRACE_S,
            fault_timeout_s=FAULT_TIMEOUT_S,
        )


def session(job: ConversionJob) -> AbstractContextManager[None]:
    """Inside, this process is a rank of the layout."""
    from nemo_aapo.conversion.session import session as ranks

    layout = job.layout
    return ranks(layout.tensor_parallel_size, layout.pipeline_parallel_size, layout.expert_parallel_size)


def say(text: str) -> int:
    """Print on rank 0."""
    if rank_of_job() == 0:
        print(text, flush=True)
    return 0


def size(text: str) -> int:
    """``500MB`` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 5GB")
    return max(1, int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " ")))


def positive(text: str) -> int:
    """An option's value: a number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def read_arguments(argv: list[str]) -> argparse.Namespace:
    """The command and its options; argparse ends the process for what it does not know."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], *, source: str | None, ranks: bool
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=(run.__doc__ or "").splitlines()[0], description=run.__doc__)
        command.set_defaults(run=run, words=argv)
        if source:
            command.add_argument("source", type=typed_path, help=source)
        if ranks:
            for short, long in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
                text = f"ranks of the {long}-parallel layout to work in; more than one are started here (default 1)"
                command.add_argument(
                    f"--{long}-model-parallel-size", dest=short, type=positive, default=1, metavar="N", help=text
                )
        return command

    def add_base(command: argparse.ArgumentParser) -> None:
        command.add_argument("--base", type=typed_path, metavar="DIR", help="a run's base model, where it has moved")

    def add_output(command: argparse.ArgumentParser) -> None:
        command.add_argument("--out", type=typed_path, required=True, metavar="DIR", help="a new directory")
        dtypes = ["auto", "float32", "bfloat16", "float16"]
        command.add_argument("--dtype", choices=dtypes, default="auto", help="of the weights; auto: as they are stored")

    megatron = "a run directory (its newest whole checkpoint), a checkpoint in it, or what hf-to-megatron wrote"
    add_output(add("hf-to-megatron", hf_to_megatron, source="a Hugging Face model directory", ranks=True))
    command = add("megatron-to-hf", megatron_to_hf, source=megatron, ranks=True)
    add_output(command)
    add_base(command)
    command.add_argument(
        "--max-shard-size", type=size, default=5 * 10**9, metavar="SIZE", help="of a file (default 5GB)"
    )
    command.add_argument(
        "--adapter", action="store_true", help="a LoRA run's adapters alone, for peft (default: merged)"
    )
    add_base(add("inspect", inspect, source=f"a Hugging Face model directory, {megatron}", ranks=False))
    command = add("verify", verify, source=f"a Hugging Face model directory, {megatron}", ranks=True)
    command.add_argument(
        "hf", type=typed_path, nargs="?", metavar="HF_DIR", help="the other side, unless SOURCE is one"
    )
    add_base(command)
    command.add_argument(
        "--prompts", type=typed_path, metavar="FILE", help="JSONL to take prompts from (default: four here)"
    )
    command.add_argument("--prompt-field", default="question", metavar="NAME", help="their field (default question)")
    command.add_argument("--max-prompts", type=positive, default=8, metavar="N", help="the first N (default 8)")
    command.add_argument("--tolerance", type=float, default=1e-3, metavar="X", help="of log-probs (default 0.001)")
    add("supported", supported, source=None, ranks=False)
    return parser.parse_args(argv)


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    quiet()
    arguments = read_arguments(list(sys.argv[1:] if words is None else words))
    return exit_code(lambda: int(arguments.run(arguments)), on_every_rank=True)
