"""Converts models between Hugging Face and Megatron, and looks at them: ``python scripts/convert.py COMMAND --help``.

hf-to-megatron   a Hugging Face directory -> a Megatron checkpoint (mcore's torch_dist) that loads under any layout
megatron-to-hf   a Megatron checkpoint, or the newest of a run, running and crashed ones too -> a Hugging Face model
inspect          what a path holds, without loading it
verify           both sides of a conversion: every tensor's bytes, and the logits on prompts
supported        the architectures that Megatron-Bridge knows, and which of them train and convert here
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from nemo_aapo.cli.main import RANK_0_SPEAKS_S
from nemo_aapo.conversion import source
from nemo_aapo.errors import FAILED, INTERRUPTED, REFUSED, ConfigError, RunError
from nemo_aapo.launch import local
from nemo_aapo.models import families
from nemo_aapo.utils.libraries import quiet

DIFFERENT = 1
"""Exit code of a verification that found a difference."""
GRACE_S = 60.0
FAULT_TIMEOUT_S = 15.0


def hf_to_megatron(arguments: argparse.Namespace) -> int:
    """A Hugging Face directory as a Megatron checkpoint, with configuration, tokenizer and chat template beside it."""
    path = arguments.source.absolute()
    check_layout(path, arguments)
    require_new(arguments.out)
    if needs_ranks(arguments):
        return start_ranks(arguments)
    from nemo_aapo.conversion import convert
    from nemo_aapo.conversion.session import session

    with session(arguments.tp, arguments.pp):
        convert.hf_to_megatron(path, arguments.out.absolute(), dtype=convert.DTYPES.get(arguments.dtype))
    return say(f"{arguments.out}: Megatron checkpoint of {path}")


def megatron_to_hf(arguments: argparse.Namespace) -> int:
    """The model part of a Megatron checkpoint as a Hugging Face directory for transformers, with a model card."""
    found = source.find_source(arguments.source, arguments.base)
    if found.kind == "hf":
        raise ConfigError(f"{found.path} is a Hugging Face model already")
    check_layout(found.base, arguments)
    require_new(arguments.out)
    if needs_ranks(arguments):
        return start_ranks(arguments)
    from nemo_aapo.conversion import convert
    from nemo_aapo.conversion.session import session

    with session(arguments.tp, arguments.pp):
        content = convert.checkpoint_to_hf(
            found,
            arguments.out.absolute(),
            dtype=convert.DTYPES.get(arguments.dtype),
            max_shard_bytes=arguments.max_shard_size,
            adapter=arguments.adapter,
        )
    what = "LoRA adapters" if arguments.adapter else "Hugging Face model"
    return say(f"{arguments.out}: {what} of {found.path}, step {content.step}")


def inspect(arguments: argparse.Namespace) -> int:
    """What a Hugging Face directory, a checkpoint or a run holds, by headers and manifests only."""
    found = source.find_source(arguments.source, arguments.base)
    from nemo_aapo.conversion.inspect import describe

    return say("\n".join(describe(found)))


def verify(arguments: argparse.Namespace) -> int:
    """Compare a Megatron checkpoint with a Hugging Face directory, or this with its own conversion, in float32.

    Exit code 1 if a tensor's bytes differ, or a log-prob by more than the tolerance.
    """
    found = source.find_source(arguments.source, arguments.base)
    if (found.kind == "hf") != (arguments.hf is None):
        raise ConfigError("verify HF_DIR converts in memory; verify MEGATRON HF_DIR compares the two")
    hf = found.path if arguments.hf is None else arguments.hf.absolute()
    check_layout(found.base, arguments)
    if needs_ranks(arguments):
        return start_ranks(arguments)
    from nemo_aapo.conversion import verify as verification
    from nemo_aapo.conversion.session import session

    questions = verification.PROMPTS
    if arguments.prompts is not None:
        questions = verification.read_questions(arguments.prompts, arguments.prompt_field, arguments.max_prompts)
    with session(arguments.tp, arguments.pp):
        verdict = verification.verify(found, hf, questions)
    if verdict is None:
        return 0
    say("\n".join(verification.report(verdict, arguments.tolerance)))
    return 0 if verdict.ok(arguments.tolerance) else DIFFERENT


def supported(arguments: argparse.Namespace) -> int:
    """All architectures that Megatron-Bridge knows, and what can be done with them here."""
    from nemo_aapo.mcore.bridge import loader

    return say(families.supported(loader.known_architectures()))


def check_layout(base: Path, arguments: argparse.Namespace) -> None:
    """Refuse what can't be cut over the ranks, before torch is imported.

    Raises:
        ConfigError: what does not divide, or another number of ranks than the layout has.
    """
    families.require_layout(base, arguments.tp, arguments.pp)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) != arguments.tp * arguments.pp:
        raise ConfigError(
            f"{os.environ['WORLD_SIZE']} ranks were started, but tensor {arguments.tp} x pipeline {arguments.pp} = "
            f"{arguments.tp * arguments.pp}: leave torchrun away, or start as many"
        )


def require_new(out: Path) -> None:
    """Refuse what is there already, or can't be made. Ranks look themselves, together."""
    if "RANK" in os.environ:
        return
    try:
        if out.exists():
            raise ConfigError(f"--out {out} exists already; name another directory, or remove it")
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.absolute().parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {out}: nothing can be written in {out.absolute().parent} ({error.strerror})"
        ) from None


def needs_ranks(arguments: argparse.Namespace) -> bool:
    """Whether this process starts the ranks of its layout."""
    return local.starts_ranks(arguments.tp * arguments.pp)


def start_ranks(arguments: argparse.Namespace) -> int:
    """This command once more on each rank of its layout; their exit code."""
    with tempfile.TemporaryDirectory(prefix="convert_") as logs:
        return local.run_ranks(
            [sys.executable, __file__, *arguments.words],
            arguments.tp * arguments.pp,
            Path(logs),
            grace_s=GRACE_S,
            fault_timeout_s=FAULT_TIMEOUT_S,
        )


def say(text: str) -> int:
    """Print on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
    return 0


def size(text: str) -> int:
    """``500MB`` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500MB or 5GB")
    return max(1, int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " ")))


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def read_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, *, source: str | None, ranks: bool) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__)
        command.set_defaults(run=run, words=argv)
        if source:
            command.add_argument("source", type=Path, help=source)
        if ranks:
            for short, long in (("tp", "tensor"), ("pp", "pipeline")):
                text = f"ranks of the {long}-parallel layout to work in; more than one are started here (default 1)"
                command.add_argument(
                    f"--{long}-model-parallel-size", dest=short, type=positive, default=1, metavar="N", help=text
                )
        return command

    def add_base(command: argparse.ArgumentParser) -> None:
        command.add_argument("--base", type=Path, metavar="DIR", help="a run's base model, where it has moved")

    def add_output(command: argparse.ArgumentParser) -> None:
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new directory")
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
    command.add_argument("hf", type=Path, nargs="?", metavar="HF_DIR", help="the other side, unless SOURCE is one")
    add_base(command)
    command.add_argument("--prompts", type=Path, metavar="FILE", help="JSONL to take prompts from (default: four here)")
    command.add_argument("--prompt-field", default="question", metavar="NAME", help="their field (default question)")
    command.add_argument("--max-prompts", type=positive, default=8, metavar="N", help="the first N (default 8)")
    command.add_argument("--tolerance", type=float, default=1e-3, metavar="X", help="of log-probs (default 0.001)")
    add("supported", supported, source=None, ranks=False)
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    quiet()
    arguments = read_arguments(argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        return arguments.run(arguments)
    except (ConfigError, RunError) as error:  # every rank finds the same: one says it
        if rank > 0:
            time.sleep(RANK_0_SPEAKS_S)
        else:
            print(error, file=sys.stderr, flush=True)
        return REFUSED if isinstance(error, ConfigError) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
