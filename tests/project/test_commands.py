"""Every command of the README and the pages has a rule below, which says what becomes of it; one without a rule fails.

A page's commands run in their order, in a folder with a tiny model where the pages have ``/models/...``. They are
forked from a process that has done the imports, so that a page costs seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from nemo_aapo.config.command_line import EVALUATION, read_command_line
from nemo_aapo.config.compose import compose
from nemo_aapo.launch.local import free_port, rank_environments
from nemo_aapo.prepare.job import settings_of
from tests.forked import forking

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for name in ("guide", "reference", "design") for page in sorted((ROOT / "docs" / name).glob("*.md"))),
]
"""Not those of results/, whose commands measure for minutes or need a GPU."""
TIMEOUT_S = 300
pytestmark = pytest.mark.timeout(900)

SMALL = """trainer.max_steps=1 trainer.val_check_interval=1 prompts_per_step=2 group_size=2 rollout.max_new_tokens=4
    rollout.max_concurrent_tokens=4096 data.max_prompt_tokens=64 validation.max_prompts=2 validation.samples=1
    checkpoint.save_interval=1 exp_manager.create_tensorboard_logger=false"""
TWO_RANKS = "trainer.devices=2 model.pipeline_model_parallel_size=1"
FEW_PROBLEMS = """sources.math500=math500.jsonl sources.amc23=math500.jsonl max_problems=2 samples=2
    max_prompt_tokens=900 sampling.max_new_tokens=4 max_concurrent_tokens=8192"""


@dataclasses.dataclass(frozen=True)
class Run:
    """Run it, with these arguments added; the later one of two counts."""

    more: str = ""
    ranks: int | None = None
    """So many in place of torchrun's ``--nproc-per-node``."""
    exits: tuple[int, ...] = (0,)


@dataclasses.dataclass(frozen=True)
class Elsewhere:
    """Another test runs it: this file, in which these words stand."""

    test: str
    words: str


@dataclasses.dataclass(frozen=True)
class NotRun:
    """It can't run here; why."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Checked:
    """It needs GPUs or an extra package: its settings are composed and checked, without model and data."""


DRY = Run("dry_run=true")
SLURM_TEST = "tests/launch/slurm/test_submission.py"

RULES: tuple[tuple[str, Run | Checked | Elsewhere | NotRun], ...] = (
    (r"docker run ", Checked()),
    (
        r"(train|launch)\.py experiment=quickstart_moe",
        Elsewhere("tests/examples/test_quickstart_moe.py", "quickstart_moe"),
    ),
    (r"train\.py .*rollout\.(server\.)?engine=trtllm", Checked()),
    (r"train\.py .*reasoning_gym", Checked()),  # the package is an extra; tests/data/test_reasoning_gym.py trains on it
    (r"torchrun .*train\.py .*run\.name=tp2pp2", Run(f"{SMALL} {TWO_RANKS}", ranks=2)),
    (r"train\.py .*rollout\.engine=remote", Run(f"{SMALL} trainer.val_check_interval=0")),
    (r"train\.py .*create_(wandb|mlflow)_logger", Checked()),  # packages that are extras
    (r"train\.py .*algorithm\.custom=", Elsewhere("tests/examples/test_algorithms.py", "FadingMargin")),
    (r"train\.py .*--replay", Elsewhere("tests/training/test_training.py", "rollout.replay=")),
    (r"train\.py .*trace\.steps=", Elsewhere("tests/trace/test_traced_runs.py", "trace.steps=")),
    (r"train\.py ", Run(SMALL)),
    (r"mypy$", Elsewhere("scripts/test.sh", "mypy")),
    (r"nohup python scripts/serve\.py", Elsewhere("tests/engines/remote/test_server_start.py", "nohup")),
    (
        r"serve\.py .*tensor_parallel_size=2",
        Elsewhere("tests/engines/servers/test_server_ranks.py", "tensor_parallel_size"),
    ),
    (
        r"serve\.py .*server\.engine=trtllm",
        Elsewhere("tests/engines/trtllm/test_own_environment.py", "rollout.server.engine=trtllm"),
    ),
    (r"serve\.py ", Run(SMALL)),
    (r"launch\.py (cluster=local|.*run\.name=tp2dp2)", Run(f"{SMALL} {TWO_RANKS}")),
    (r"launch\.py (fill )?cluster=(slurm|slurm_servers|interactive) (?!.*nemo_run)", DRY),
    (r"launch\.py .*cluster\.launcher=nemo_run", Elsewhere("tests/launch/slurm/test_nemo_run.py", "nemo_run")),
    (r"launch\.py sweep ", DRY),
    (r"launch\.py evaluate cluster=slurm", Run(f"{FEW_PROBLEMS} dry_run=true")),
    (r"tensorboard ", Elsewhere("tests/run/test_tensorboard.py", "tensorboard.main")),
    (r"launch\.py status", Elsewhere(SLURM_TEST, "status")),
    (r"launch\.py logs", Elsewhere(SLURM_TEST, "logs")),
    (r"launch\.py requeue", Elsewhere("tests/launch/slurm/test_interruptions.py", "requeue")),
    (r"launch\.py cancel", Elsewhere("tests/launch/slurm/test_interruptions.py", "cancel")),
    (r"launch\.py experiment=(paper_|aapo_qwen3_30b_a3b)", Checked()),
    (r"evaluate\.py compare results/r1_", NotRun("of two evaluations that need GPUs")),
    (r"evaluate\.py compare", Run()),
    (r"evaluate\.py .*precision=bf16", Checked()),
    (r"evaluate\.py .*engine=remote", Elsewhere("tests/evaluation/test_evaluation_ranks.py", "engine=remote")),
    (r"evaluate\.py ", Run(FEW_PROBLEMS)),
    (r"(convert|prepare_data)\.py ", Run()),
    (r"check_algorithm\.py ", Run()),
    (r"plan\.py ", Run(exits=(0, 1))),  # 1: it does not fit, which is an answer
    (r"torchrun .*doctor\.py ", Run("--only versions,model,tokenizer,shared_files", ranks=2)),
    (r"srun .*doctor\.py ", Elsewhere("tests/doctor/test_doctor_ranks.py", "srun")),
    (r"doctor\.py", Run("--only versions,model,tokenizer,disk")),
    (r"reference_rewards\.py ", Run(SMALL, exits=(0, 1))),  # 1: --merge, --status: rewards are missing
    (r"nemo-aapo (report|runs) ", Elsewhere("tests/report/test_read.py", "report.main")),
    (r"nemo-aapo \w+", Elsewhere("tests/project/test_wheel.py", "nemo-aapo")),
    (r"nemo_aapo\.engines\.trtllm\.check", Elsewhere("tests/engines/trtllm/test_check.py", "check")),
    (r"make_base_model\.py", Elsewhere("tests/examples/test_base_model.py", "make_base_model")),
    (r"bash scripts/(quickstart|environment)\.sh", Elsewhere("tests/project/scripts/test_others.py", "quickstart.sh")),
    (r"bash scripts/test\.sh", NotRun("it would run itself; CI runs it as it stands")),
    (r"benchmark\.py gpu|pytest.* tests/gpu", NotRun("needs a GPU")),
    (r"benchmark\.py refit$", Elsewhere("tests/benchmarks/test_refit.py", "refit")),
    (r"benchmark\.py guard", Elsewhere("tests/benchmarks/test_guard.py", "guard")),
    (r"python -m pytest", NotRun("one of this session's own tests")),
    (r"bash scripts/nemo_run\.sh", NotRun("installs an environment: scripts/test.sh runs it")),
    (r"bash tests/launch/slurm/start_slurm\.sh|sinfo", Elsewhere("tests/launch/slurm/cluster.py", "start_slurm.sh")),
    (r"(source|cd|export|mkdir|\.) ", NotRun("changes the reader's shell or folder")),
    (
        r"(sudo )?(apt-get|docker|git clone)|huggingface-cli|(\S*python3? -m )?(pip|venv) |salloc",
        NotRun("installs, downloads, or asks a cluster"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Command:
    page: Path
    line: int
    text: str

    @property
    def rule(self) -> Run | Checked | Elsewhere | NotRun | None:
        """The first that fits."""
        return next((rule for pattern, rule in RULES if re.search(f"(^|[ /]){pattern}", self.text)), None)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def commands(page: Path) -> list[Command]:
    """Of the page's ``bash`` blocks: lines, joined where a backslash ends them, without comments."""
    found, text, inside = [], "", False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            inside = line == "```bash"
        elif inside:
            text = f"{text} {line.strip()}".strip()
            if text.endswith("\\"):
                text = text[:-1].strip()
                continue
            bare = re.sub(r"(^|\s+)#.*$", "", text)
            found += [Command(page, number, bare)] if bare else []
            text = ""
    return found


class Workplace:
    """The folder in which the commands run, and what they are forked from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._context = forking()
        self._done: set[str] = set()
        self._serving: list[BaseProcess] = []  # processes of commands that end in &
        make_inputs(folder)
        given = "python scripts/train.py model.path=/models/any data.train=train.jsonl data.validation=test.jsonl"
        self.run(f"{given} run.name=mine", Run(SMALL))

    def run(self, text: str, rule: Run) -> None:
        """Run a command to its end, unless it was run before; one that ends in ``&`` goes on until the end."""
        if text in self._done:
            return
        self._done.add(text)
        words = shlex.split(text.removesuffix("&"))
        world = rule.ranks or 1
        if words[0] == "torchrun":
            words = ["python", *words[3:]]
        target, words = words[1], [*(self._here(word) for word in words[2:]), *shlex.split(rule.more)]
        self._make_room(target, words)
        environments = rank_environments({}, world, free_port()) if world > 1 else [{}]
        log = self.folder / "log.txt"
        log.write_text("")
        ranks = [
            self._context.Process(
                target=_run, args=(str(ROOT / target), words, str(self.folder), environment, str(log)), daemon=True
            )
            for environment in environments
        ]
        for rank in ranks:
            rank.start()
        if text.endswith("&"):
            self._serving += ranks
            return
        end = time.monotonic() + TIMEOUT_S
        for rank in ranks:
            rank.join(max(0.0, end - time.monotonic()))
            if rank.is_alive():
                rank.terminate()  # a launcher ends its ranks then
                rank.join(60)
        codes = [rank.exitcode for rank in ranks]
        assert set(codes) <= set(rule.exits), f"{text}\nended with {codes}:\n{log.read_text()[-3000:]}"

    def close(self) -> None:
        """End what still runs."""
        for process in self._serving:
            process.terminate()
            process.join(10)

    def _here(self, word: str) -> str:
        """The word with this folder's paths for the pages'."""
        word = word.replace("/models/", f"{self.folder}/models/").replace("=models/", f"={self.folder}/models/")
        return word.replace("/shared/", f"{self.folder}/").replace("openai/gsm8k", "gsm8k_rows.jsonl")

    def _make_room(self, target: str, words: Sequence[str]) -> None:
        """Remove what this command left when another page had it."""
        if target.endswith(("train.py", "launch.py", "evaluate.py")):
            for name in [word.partition("=")[2] for word in words if word.startswith("run.name=")]:
                if "served" not in name:
                    shutil.rmtree(self.folder / "results" / name, ignore_errors=True)
        if "--out" in words:
            shutil.rmtree(self.folder / words[words.index("--out") + 1], ignore_errors=True)


def check(text: str) -> None:
    """Refuse settings of a command that can't work whatever model and data are.

    Raises:
        ConfigError: names the setting.
    """
    words = shlex.split(text)
    place = next(number for number, word in enumerate(words) if word.endswith(".py"))
    script, words = words[place], words[place + 1 :]
    if script.endswith("evaluate.py"):
        EVALUATION.parse(compose(read_command_line(words, EVALUATION)))
    else:
        settings_of(words)


def _run(script: str, words: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    """A forked process: become the script."""
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.update(environment, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    sys.argv = [script, *words]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def make_inputs(folder: Path) -> None:
    """A tiny model under each name that the pages have, and rows of each form."""
    from transformers import Qwen2Config

    from tests.tiny_models import SIZES, save_character_tokenizer, save_model

    tiny = folder / "tiny"
    sizes = {**SIZES, "num_hidden_layers": 2, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    save_model(Qwen2Config(**sizes, tie_word_embeddings=True), tiny)
    save_character_tokenizer(tiny)
    (folder / "models").mkdir()
    (folder / "results").mkdir()
    texts = [command.text for page in PAGES for command in commands(page)]
    named = {name for text in texts for name in re.findall(r"(?:/|=)models/([\w.-]+)", text)}
    for place in [*(folder / "models" / name for name in {*named, "any"}), folder / "results" / "quickstart_base"]:
        shutil.copytree(tiny, place)
    sums = [{"question": f"{n}+{n + 1}=", "answer": str(2 * n + 1)} for n in range(10, 40)]
    data = folder / "results" / "quickstart_base" / "data"
    data.mkdir()
    math = [{"problem": f"What is ${n}+1$?", "solution": f"It is $\\boxed{{{n + 1}}}$."} for n in range(20)]
    scored = [{**row, "answer": str(n + 1), "subject": "Algebra", "level": 1} for n, row in enumerate(math)]
    for path, rows in {
        folder / "train.jsonl": sums[:20],
        folder / "test.jsonl": sums[20:],
        data / "train.jsonl": sums[:20],
        data / "validation.jsonl": sums[20:],
        folder / "math.jsonl": math,
        folder / "math500.jsonl": scored,
        folder / "aime.jsonl": scored[:3],
        folder / "gsm8k_rows.jsonl": [{**row, "answer": f"Add. #### {row['answer']}"} for row in sums],
    }.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    made = Workplace(tmp_path_factory.mktemp("commands"))
    yield made
    made.close()


def test_every_command_has_a_rule():
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 60
    uncovered = [str(command) for command in found if command.rule is None]
    assert not uncovered, "say in RULES what becomes of these:\n" + "\n".join(uncovered)
    for command in found:
        if isinstance(command.rule, Elsewhere):
            assert command.rule.words in (ROOT / command.rule.test).read_text(), command


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, workplace):
    for command in commands(page):
        rule = command.rule
        if isinstance(rule, Checked):
            check(command.text)
        elif isinstance(rule, Run):
            try:
                workplace.run(command.text, rule)
            except AssertionError as error:
                raise AssertionError(f"{command.page.relative_to(ROOT)}:{command.line}: {error}") from error


@pytest.mark.slow
def test_the_python_of_the_conversion_page_runs(workplace):
    page = (ROOT / "docs" / "guide" / "conversion.md").read_text()
    (code,) = re.findall(r"<!-- runs: convert_from_python -->\n```python\n(.*?)```", page, re.DOTALL)
    script = workplace.folder / "convert_from_python.py"
    script.write_text(code)
    workplace.run(f"python {script}", Run())
    assert (workplace.folder / "from_python" / "model.safetensors").exists()
