"""What large data costs at a start: ``python -m benchmarks.large_data --tokenizer DIR --rows 1000000``.

It writes GSM8K-like rows (word problems with a worked solution), and reads them as a run does, each time in a process
of its own: 1,000 rows, then all of them with an empty cache, then again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nemo_aapo.config.compose import load_config
from nemo_aapo.utils.tables import plain

FEW = 1000
NAMES = ("Ada", "Boris", "Chiara", "Dmitri", "Esi", "Farid", "Greta", "Hiro")
THINGS = ("apples", "pencils", "marbles", "tickets", "stamps", "bricks", "lemons", "coins")


def write_rows(path: Path, count: int) -> None:
    """Write that many different rows, about 450 bytes each."""
    rng = random.Random(count)
    with path.open("w", encoding="utf-8") as file:
        for case in range(count):
            (one, other), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
            has, times, lost, days = rng.randint(2, 999), rng.randint(2, 9), rng.randint(1, 99), rng.randint(2, 30)
            answer = has * times * days - lost
            question = (
                f"Case {case}. {one} buys {has} {thing} each day, and {other} asks for {times} times as many as that. "
                f"They go on like this for {days} days, but on the way home {lost} of the {thing} that {other} asked "
                f"for are lost. How many {thing} does {other} have in the end?"
            )
            solution = f"{has}*{times} = {has * times} a day. {has * times}*{days} - {lost} = {answer}.\n#### {answer}"
            file.write(json.dumps({"question": question, "answer": solution}) + "\n")


def measure(tokenizer: str, train: str) -> dict[str, Any]:
    """Read the data as rank 0 of a run does, with the reward workers that it has. Figures of this process."""
    from nemo_aapo.data.loading import load_data
    from nemo_aapo.data.tokenizer import load_tokenizer
    from nemo_aapo.rewards import build_reward
    from nemo_aapo.rewards.workers.runner import RewardRunner
    from nemo_aapo.training.read_data import answer_check

    held_out = str(Path(train).with_name("held_out.jsonl"))
    data = load_config([f"model.path={tokenizer}", f"data.train={train}", f"data.validation={held_out}"]).data
    loaded, workers = load_tokenizer(tokenizer), len(os.sched_getaffinity(0))
    with RewardRunner([(build_reward({"name": "accuracy"}), 1.0)], workers, timeout_s=10.0) as runner:
        before, start = _resident_mib(), time.perf_counter()
        prompts, _ = load_data(data, loaded, answer_check(runner, workers, say), note=say)
        return {
            "prompts": len(prompts.prompts),
            "seconds": round(time.perf_counter() - start, 1),
            "own MiB": round(_resident_mib() - before),
            "peak MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before),
        }


def say(line: str) -> None:
    """What takes long, beside the figures."""
    print(line, file=sys.stderr)


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="a model's directory")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--read", metavar="FILE", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(measure(arguments.tokenizer, arguments.read)))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="aapo_benchmark_") as folder:
        write_rows(Path(folder) / "held_out.jsonl", FEW + 1)
        for name, count in (("few", FEW), ("first start", arguments.rows), ("later start", arguments.rows)):
            path = Path(folder) / f"{count}.jsonl"
            if not path.exists():
                write_rows(path, count)
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.large_data"]
            done = subprocess.run(
                [*command, "--tokenizer", arguments.tokenizer, "--read", str(path)],
                env={**os.environ, "NEMO_AAPO_CACHE": folder, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                check=True,
            )
            rows.append([name, *(f"{value:,}" for value in json.loads(done.stdout.splitlines()[-1]).values())])
    print(plain(["", "prompts", "seconds", "MiB more", "MiB more at the peak"], rows))


if __name__ == "__main__":
    main()
