"""Nobody reads a traceback for a mistake of theirs: random settings, and damaged files of a run directory."""

from __future__ import annotations

import contextlib
import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_aapo.cli import convert, doctor, evaluate, fill, launch, plan, prepare_data, serve
from nemo_aapo.cli.main import exit_code, run_command
from nemo_aapo.cli.view import report
from nemo_aapo.config import Config, EvaluationConfig
from nemo_aapo.config.command_line import EVALUATION, CommandLine, read_command_line
from nemo_aapo.config.compose import compose, resolved
from nemo_aapo.config.schema.facts import settings_of
from nemo_aapo.conversion.source import check_base, find_source, lora_of
from nemo_aapo.errors import FAILED, REFUSED
from nemo_aapo.evaluation import compare
from nemo_aapo.evaluation.settings import find_model
from nemo_aapo.launch.slurm import commands, control, submit
from nemo_aapo.prepare import Job, job, prepare
from nemo_aapo.prepare.conversion import Layout, prepare_megatron_to_hf
from nemo_aapo.prepare.text import with_evaluation_date
from nemo_aapo.reference_store.key import StoreKey
from nemo_aapo.reference_store.store import RewardStore, other_rewards
from nemo_aapo.run.experiment import Experiment
from nemo_aapo.run.summary import summary_table
from tests.tiny_models import save_empty_input

VALUES = (
    "null", "-1", "0", "1", "2", "0.5", "1e-320", "1e308", "1e400", "nan", ".nan", "inf", "-inf", "9" * 30, "true", "x",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1_000", "0x10", "1,2", "range(1,3)", "yes",
    "[]", "{}", "[1,2]", "{a: 1}", "[[1]]", "[null]", "''", "' '", "..", "/", ".", "a" * 300, "'a/../b'", "√", "'√'",
    "'\\u0000'", "${nope}", "${seed}", "${oc.env:NOPE}", "${oc.decode:'['}", "${", "$", "[", "{", "a=b", "(x)", "\"'",
    "???", "~", "*", "\\", "%s", "'{} {question} {answer}'", "[{path: x}]", "[{path: 5, weight: -1}]", "[{}]",
    "[{name: custom, function: 5}]", "[{name: accuracy, weight: nan}]", "[{name: http, url: 7}]", "[{name: [1]}]",
    "\udcff", "a\x00b", "'1:00'", "reasoning_gym:", "reasoning_gym:nope", "a/b", "~/x", "/proc/self/mem",
    "", "/proc/x/y", "/proc/self/stat/x", "'~/x'",
)  # fmt: skip
"""Numbers at the edges of types, texts that paths and grammars stumble over, shapes that belong elsewhere."""
STRANGE_WORDS = ("", "=", "+", "~", "seed", "--seed=1", "-m", "--multirun", "a.b.c=1", "==", "seed=1=2", "hydra.x=1")


# ---------------------------------------------------------------- 300 random settings


def random_words(dice: random.Random) -> Iterator[str]:
    keys = [setting.key for setting in settings_of(Config)]
    sections = sorted({key.rpartition(".")[0] for key in keys if "." in key})
    choices = ["algorithm", "precision", "data", "cluster", "experiment"]
    while True:
        kind = dice.random()
        if kind < 0.05:
            yield dice.choice(STRANGE_WORDS)
            continue
        key = dice.choice(keys if kind < 0.9 else sections if kind < 0.95 else choices)
        if dice.random() < 0.1:
            key = key[: dice.randrange(len(key))] + dice.choice("xy.") + key[dice.randrange(len(key)) :]
        yield f"{dice.choice(('', '', '', '', '', '+', '++', '~'))}{key}={dice.choice(VALUES)}"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_300_random_settings_are_taken_or_refused_in_words(tmp_path, monkeypatch, capsys, unforeseen_fails):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given").mkdir()
    given = save_empty_input(tmp_path / "given")
    monkeypatch.setattr(job, "compose", composer(given))
    monkeypatch.setattr("nemo_aapo.launch.local.launch", lambda config, command: 0)
    before = sorted(tmp_path.rglob("*"))
    outcomes = []
    for word in (words := random_words(random.Random(7))) and (next(words) for _ in range(300)):
        for main in (train, launch.main):
            code = main([*given, word])
            said = capsys.readouterr().err
            assert code in (0, REFUSED), (word, code, said)
            assert bool(said) == (code == REFUSED), (word, said)
            outcomes.append(code)
    assert sorted(tmp_path.rglob("*")) == before
    assert 5 < outcomes.count(0) < 300  # what is harmless is taken


def train(words: list[str]) -> int:
    """The command up to where the work would begin."""
    return run_command(prepare, lambda made: 0, description="", words=words)


def composer(given: list[str]) -> Callable[[CommandLine], dict[str, Any]]:
    """``compose``, in a tenth of the time for a word that sets one value: Hydra's parser, on a tree composed before."""
    import hydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    from nemo_aapo.config.compose import register_resolvers

    command, parser = read_command_line(given), OverridesParser.create()
    known = {setting.key for setting in settings_of(Config)}
    register_resolvers()
    with hydra.initialize_config_dir(str(command.directory), version_base=None):
        base = hydra.compose(command.config_file, overrides=given)

    @functools.lru_cache(maxsize=1)
    def outcome(words: tuple[str, ...]) -> dict[str, Any] | Exception:
        try:
            return composed(words)
        except Exception as error:
            return error

    def composed(words: tuple[str, ...]) -> dict[str, Any]:
        asked = read_command_line(list(words))
        key, _, value = words[-1].partition("=")
        if key not in known or "${" in value:
            return compose(asked)
        try:
            override = parser.parse_override(words[-1])
            if override.is_sweep_override():
                return compose(asked)
            tree = base.copy()
            OmegaConf.update(tree, key, override.value())
            return resolved(tree)
        except Exception:  # as Hydra has it
            return compose(asked)

    def either(command: CommandLine) -> dict[str, Any]:
        found = outcome(tuple(command.overrides))
        if isinstance(found, Exception):
            raise found
        return found

    return either


# ---------------------------------------------------------------- 200 damaged files

ATTEMPT = {"job": "7", "restart": 0, "began": 1.0, "checkpoint_before": 0, "end": "saved", "ended": 2.0, "step": 3}
METRICS = {"loss": 0.1, "reward/mean": 0.5, "tokens_per_second": 9.0, "time/step": 1.0, "time/rollout": 0.5}
RECORD = {
    "problem": "p", "sample": 0, "correct": True, "failed": False, "voted": "2", "tokens": 3, "finish_reason": "stop",
    "level": None, "subject": None, "gold": "2", "prompt": "1+1", "completion": "2", "source": "s",
}  # fmt: skip
VALIDATION = {"validation/accuracy_greedy": 0.5, "validation/accuracy_sampled": 0.5}


def run_files() -> dict[str, Any]:
    """Name in the run directory -> its content; a list of dicts is JSONL."""
    validation = {"step": 3, **VALIDATION, "validation/accuracy_sampled_stderr": 0.1}
    return {
        "run.json": {"id": "1", "digest": "DIGEST", "settings": {"seed": 1}, "contents": {}, "starts": [{"host": "n"}]},
        "config.yaml": {
            "model": {"path": "/m", "lora": None},
            "seed": 1,
            "run": {"name": "r"},
            "algorithm": {"name": "aapo"},
            "data": {"train": "t", "validation": "v"},
            "rewards": [{"name": "accuracy", "weight": 1.0}],
        },
        "phase.json": {"phase": "validating", "done": 1, "total": 3, "began": 1.0},
        "metrics.jsonl": [{"step": 0, **VALIDATION}, *({"step": k, **METRICS} for k in (1, 2, 3)), validation],
        "slurm/jobs.json": [{"id": "7", "what": "train"}],
        "slurm/history.json": {"attempts": [ATTEMPT], "counts_from": 0, "stopped": None},
        "servers/server_0.json": {"index": 0, "address": "http://n:1", "pid": 3, "instance": "f"},
        "evaluation.json": {"model": "m", "seed": 1},
        "completions/math.jsonl": [RECORD, {**RECORD, "sample": 1}],
        "checkpoints/step_000003/manifest.json": {"step": 3, "files": {}},
        "finished": {"step": 3},
    }


def damaged(dice: random.Random, name: str, content: Any) -> bytes:
    whole = text_of(name, content).encode()
    kinds = [
        lambda: whole[: dice.randrange(len(whole))],
        lambda: dice.choice((b"", b"{}", b"[]", b"null", b"5", b'"x"', b"{}\n", b"[[]]\n", b"[" * 9999, b"\xff\xfe\n")),
        lambda: bytes(dice.randrange(256) for _ in range(40)) + b"\n",
        lambda: text_of(name, other_type(dice, content)).encode(),
        lambda: text_of(name, other_type(dice, content, remove=True)).encode(),
    ]
    return dice.choice(kinds)()


def text_of(name: str, content: Any) -> str:
    lines = content if name.endswith(".jsonl") and isinstance(content, list) else [content]
    return "".join(json.dumps(line) + "\n" for line in lines)


def other_type(dice: random.Random, content: Any, remove: bool = False) -> Any:
    """The same with one value of another type, or, as an older version wrote it, without one."""
    if isinstance(content, list) and content:
        place = dice.randrange(len(content))
        return [other_type(dice, item, remove) if i == place else item for i, item in enumerate(content)]
    if isinstance(content, dict) and content:
        place = dice.choice(list(content))
        if remove and not (isinstance(content[place], list | dict) and dice.random() < 0.7):
            return {key: value for key, value in content.items() if key != place}
        return {**content, place: other_type(dice, content[place], remove)}
    return dice.choice((None, -1, 10**400, 1e308, float("nan"), "x", [], {}, [{}], True))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_200_damaged_files_of_a_run_directory_are_named_in_words(tmp_path, monkeypatch, capsys, unforeseen_fails):
    (tmp_path / "given").mkdir()
    given = [*save_empty_input(tmp_path / "given"), "exp_manager.create_tensorboard_logger=false"]
    run_dir = tmp_path / "run"
    words = [word for word in given if not word.startswith("run.dir")] + [f"run.dir={run_dir}"]
    tree = compose(read_command_line(words))
    monkeypatch.setattr(job, "compose", lambda command: tree)
    monkeypatch.setattr(launch, "compose", lambda command: tree)
    monkeypatch.setattr(control, "job_states", lambda ids: [commands.JobState(str(job), "COMPLETED") for job in ids])
    monkeypatch.setattr(submit, "sbatch", lambda script: "8")
    monkeypatch.setattr(commands, "slurm", lambda *words, **more: "")
    monkeypatch.setattr("nemo_aapo.run.directory.instruction_set", lambda: "AVX2")
    made = prepare(words)
    measured = EVALUATION.parse(compose(read_command_line([f"model.path={run_dir}", "benchmarks=[gsm8k]"], EVALUATION)))
    dice, silent = random.Random(11), 0
    for _ in range(200):
        files = run_files()
        files["run.json"]["digest"] = digest_of(made)
        files["config.yaml"]["model"]["path"] = made.config.model.path
        name = dice.choice(list(files))
        content = damaged(dice, name, files[name])
        for other, whole in files.items():
            path = run_dir / other
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_text(text_of(other, whole))
        (run_dir / name).write_bytes(content)
        codes = [command() for command in readers(words, run_dir, measured)]
        said = capsys.readouterr().err
        assert set(codes) <= {0, FAILED, REFUSED}, (name, content, codes)
        assert "Traceback" not in said, (name, content, said)
        assert not said or str(run_dir) in said or Path(name).name in said, (name, content, said)
        silent += not said
    assert silent < 150  # most damage is found


def digest_of(made: Job) -> str:
    from nemo_aapo.config import digest
    from nemo_aapo.run.identity import identity_of

    return digest(made.config, identity_of(made.config))


def readers(words: list[str], run_dir: Path, measured: EvaluationConfig) -> list[Callable[[], int]]:
    """Whatever reads the files of a run directory, as the commands end it."""
    other = run_dir.parent / "other_evaluation"

    def servers() -> int:
        from nemo_aapo.engines.remote.directory import read_servers

        return len(read_servers(run_dir / "servers")) and 0

    def model() -> int:
        return bool(lora_of(find_source(run_dir))) and 0

    def card() -> int:
        from nemo_aapo.checkpoint.manifest import read
        from nemo_aapo.conversion.card import model_card

        source = prepare_megatron_to_hf(run_dir, None, run_dir / "out", Layout()).source
        return bool(model_card(source, read(source.candidates()[0]), "bfloat16")) and 0

    def measure() -> int:
        check_base(source := find_model(measured))
        return bool(with_evaluation_date(measured, source, 64)) and 0

    return [
        *(functools.partial(launch.main, [action]) for action in ("status", "logs", "requeue", "cancel")),
        lambda: run_command(prepare, resume, description="", words=words),
        lambda: exit_code(lambda: len(compare.compare(run_dir, other, None)) and 0),
        lambda: exit_code(servers),
        lambda: exit_code(model),
        lambda: exit_code(card),
        lambda: exit_code(measure),
        lambda: convert.main(["inspect", str(run_dir)]),
    ]


def resume(made: Job) -> int:
    """What rank 0 of a resumed run does with files, without the training."""
    with Experiment(made.config, made.tree, 1) as experiment:
        experiment.resume_at(2)
        summary_table(made.config)
    return 0


OWN_WORDS = {
    plan.main: ("model=", "hardware=", "mean_prompt_tokens=", "dataset_prompts=", "--json", "model.path="),
    doctor.main: ("--only=", "--skip=", "--quick", "--json", "--only"),
    fill.main: ("--shard=", "--shards=", "--merge", "--status", "--shard"),
    evaluate.main: ("compare", "samples=", "sources.gsm8k=", "rollout.remote.servers=", "benchmarks="),
    serve.main: ("rollout.server.port=", "rollout.server.host=", "rollout.server.index="),
    convert.main: ("inspect", "verify", "--base=", "hf-to-megatron", "--out=", "megatron-to-hf", "--tolerance="),
    prepare_data.main: ("--out=", "gsm8k", "--source=", "--report=", "-o"),
    report.main: ("out=", "run"),
    launch.main: ("status", "cancel", "requeue", "logs", "sweep", "seed=", "fill", "max_parallel="),
}
"""Command -> words that it alone knows; one that ends in = gets a value."""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_100_random_words_of_the_other_commands_are_taken_or_refused_in_words(
    tmp_path, monkeypatch, capsys, unforeseen_fails
):
    monkeypatch.chdir(tmp_path)
    for started in ("nemo_aapo.cli.doctor.examine", "nemo_aapo.cli.serve.serve", "nemo_aapo.cli.fill.fill",
                    "nemo_aapo.cli.evaluate.evaluate", "nemo_aapo.launch.local.launch"):  # fmt: skip
        monkeypatch.setattr(started, lambda *given, **more: 0)
    dice = random.Random(5)
    for number in range(100):
        main = list(OWN_WORDS)[number % len(OWN_WORDS)]
        drawn = dice.sample(OWN_WORDS[main], k=dice.randrange(1, 3)) + dice.sample(VALUES, k=dice.randrange(2))
        words = [word + dice.choice(VALUES) if word.endswith("=") else word for word in drawn]
        try:
            code = main(words)
        except SystemExit as end:  # argparse's own
            code = end.code
        said = capsys.readouterr().err
        assert code in (0, FAILED, REFUSED), (main, words, code, said)
        assert "Traceback" not in said, (main, words, said)
        assert bool(said) or code != REFUSED, (main, words)


@pytest.mark.slow
def test_a_damaged_reference_store_is_named_in_words(tmp_path, capsys, unforeseen_fails):
    key, dice = StoreKey({"seed": 1}), random.Random(3)
    with contextlib.closing(RewardStore(tmp_path / "s.sqlite", key)) as store:
        store.write({"p": np.ones(3)})
    whole = (tmp_path / "s.sqlite").read_bytes()
    for number in range(40):
        path, length = tmp_path / f"{number}.sqlite", dice.randrange(len(whole)) if number % 2 else len(whole)
        cut = bytearray(whole[:length])
        for _ in range(number % 5 * 40 if cut else 0):
            cut[dice.randrange(len(cut))] = dice.randrange(256)
        path.write_bytes(cut)

        def look(path: Path = path) -> int:
            with contextlib.closing(RewardStore(path, key)) as store:
                other_rewards(store, own=True)
                return len(store.read(["p"], 3)) and 0

        assert exit_code(look) in (0, FAILED)
        assert "Traceback" not in capsys.readouterr().err
