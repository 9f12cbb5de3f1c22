"""reasoning-gym as a source without end: the same items whoever asks and when, judged by its own verifiers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_aapo.config.sources import Source, sources_of
from nemo_aapo.data.gym import GymProcess
from nemo_aapo.data.loading import attach_endless, build_sampler, load_data
from nemo_aapo.data.tokenizer import load_tokenizer
from nemo_aapo.errors import ConfigError, DataError
from nemo_aapo.rewards import build_reward
from nemo_aapo.rewards.workers.runner import RewardRunner
from nemo_aapo.types import Prompt
from tests.rewards.judging import completion
from tests.tiny_models import make_config, save_character_tokenizer

PEERS = Path(__file__).parents[2] / ".venv-peers"
THERE = (PEERS / "reasoning_gym").is_dir() or importlib.util.find_spec("reasoning_gym") is not None
needs_gym = pytest.mark.skipif(not THERE, reason="no reasoning-gym: scripts/peers.sh says what is in the way")


@pytest.fixture
def gym(monkeypatch):
    """Processes that are started find reasoning-gym."""
    monkeypatch.syspath_prepend(str(PEERS))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_character_tokenizer(folder)
    return load_tokenizer(str(folder))


def config_of(**changes):
    settings = {
        "data__train": [{"path": "reasoning_gym:chain_sum", "parameters": {"max_terms": 3}}],
        "data__validation": {
            "path": "reasoning_gym:chain_sum",
            "parameters": {"max_terms": 3},
            "size": 20,
            "seed": 1,
        },
        "data__max_prompt_tokens": 90,
        "max_tokens_per_microbatch": 256,
        "rewards": [{"name": "reasoning_gym"}],
        "validation__reward": "reasoning_gym",
    }
    return make_config("model", **{**settings, **changes})


def items_of(seed: int, indices: list[int], hash_seed: str) -> list[list[str]]:
    """Of a task that goes through sets of strings, by a process with another hash seed of its own."""
    code = (
        "import json, sys; from nemo_aapo.data.gym import GymProcess; "
        f"process = GymProcess('isomorphic_strings', {{}}, {seed}); "
        f"print(json.dumps(process.items({indices}))); process.close()"
    )
    path = os.pathsep.join([str(PEERS), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.peers
@needs_gym
def test_an_item_is_decided_by_seed_and_index_in_every_process(gym):
    first = items_of(5, [3, 0, 5000], "1")
    assert items_of(5, [0, 5000, 3], "2") == [first[1], first[2], first[0]]
    assert len({question for question, _ in first}) == 3
    assert json.loads(first[2][1]).items() >= {"task": "isomorphic_strings", "seed": 5, "index": 5000}.items()
    assert items_of(6, [3, 0, 5000], "1") != first


@pytest.mark.peers
@needs_gym
def test_training_takes_new_prompts_for_ever_and_its_own_verifier_judges(gym, tokenizer):
    config = config_of()
    train, held_out = load_data(config.data, tokenizer)
    assert len(held_out.prompts) + held_out.duplicates == 20
    endless = attach_endless(train, config.data, tokenizer)
    sampler = build_sampler(config, endless)
    taken = [endless.prompts[i] for step in (0, 1, 2000) for i in sampler.indices(step)]
    assert len({prompt.id for prompt in taken}) == 12
    again = attach_endless(train, config.data, tokenizer)
    assert [again.prompts[i].id for i in sampler.indices(2000)] == [prompt.id for prompt in taken[8:]]
    other = config_of(data__train={"path": "reasoning_gym:chain_sum", "parameters": {"max_terms": 2}})
    assert again.digest == endless.digest
    assert attach_endless(train, other.data, tokenizer).digest != endless.digest
    with RewardRunner([(build_reward({"name": "reasoning_gym"}), 1.0)], workers=1, timeout_s=60) as runner:
        for n, prompt in enumerate(taken):
            runner.check_answer(prompt.answer)
            answer = json.loads(prompt.answer)["answer"]
            runner.submit((n, "right"), prompt, f"<think>1</think><answer>{answer}</answer>", completion())
            runner.submit((n, "boxed"), prompt, f"so \\boxed{{{answer}}}", completion())
            runner.submit((n, "wrong"), prompt, "<answer>no</answer>", completion())
        results = runner.collect()
        with pytest.raises(ValueError, match="it names no item of reasoning-gym"):
            runner.check_answer("72")
    for (n, kind), result in results.items():
        assert (result.failure, result.score == 1.0) == (None, kind != "wrong"), (n, kind, result)


@pytest.mark.peers
@needs_gym
def test_items_over_the_limit_are_an_error_or_replaced(gym, tokenizer):
    config = config_of(data__max_prompt_tokens=70, data__on_long_prompt="drop")
    endless = attach_endless(load_data(config.data, tokenizer)[0], config.data, tokenizer)
    prompts: list[Prompt] = [endless.prompts[n] for n in range(32)]
    assert max(len(prompt.token_ids) for prompt in prompts) <= 70
    assert len({prompt.id for prompt in prompts}) == 32
    with pytest.raises(DataError, match=r"chain_sum: prompt \d+ has more than 70 tokens; raise data.max_prompt_tokens"):
        load_data(config_of(data__max_prompt_tokens=70).data, tokenizer)


@pytest.mark.peers
@needs_gym
@pytest.mark.parametrize(
    ("task", "parameters", "message"),
    [
        ("chain_sun", {}, "there is no such task; did you mean chain_sum"),
        ("chain_sum", {"max_term": 3}, "can't have the parameters"),
        ("chain_sum", {"min_terms": 9}, "can't have the parameters"),
    ],
)
def test_what_a_task_cant_be_is_said(gym, task, parameters, message):
    process = GymProcess(task, parameters, 0)
    with pytest.raises(DataError, match=message):
        process.items([0])
    process.close()


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install --no-deps -r requirements/reasoning_gym\.txt"):
        build_reward({"name": "reasoning_gym"}).load()
    from nemo_aapo.data.gym_items import make_item

    with pytest.raises(DataError, match=r"pip install --no-deps -r requirements/reasoning_gym\.txt"):
        make_item("a_task_that_was_not_asked_for_before", {}, 0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__validation": "reasoning_gym:chain_sum"}, "has no end: set its size"),
        (
            {"data__validation": {"path": "reasoning_gym:chain_sum", "size": 5}},
            "holds the items of data.train: give it another seed",
        ),
        ({"data__sampling": "hard"}, "makes new ones for ever"),
        ({"data__train": {"path": "reasoning_gym:chain_sum", "split": "train"}}, "split has no effect"),
        ({"data__train": {"path": "x.jsonl", "size": 3}}, r"size has an effect with reasoning_gym:TASK only"),
        ({"data__train": {"path": "x.jsonl", "weigth": 3}}, r"unknown setting 'data.train\[0\].weigth'.*weight"),
        ({"data__train": {"path": "x.jsonl", "weight": 3.0}}, "has no effect: there is one source"),
        ({"data__train": []}, "data.train is an empty list"),
        ({"data__train": [{"split": "train"}]}, r"data.train\[0\].path must be set"),
        ({"data__prompt_template": "Hi"}, r"it must hold \{question\}"),
    ],
)
def test_sources_that_cant_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**changes)


def test_a_source_takes_from_data_what_it_does_not_say_itself():
    data = make_config(
        "model",
        data__train=[{"path": "a/b", "split": "x"}, {"path": "c.json", "answer_field": "A"}],
        data__prompt_field="P",
    ).data
    assert sources_of(data, "train") == (
        Source("a/b", "P", "answer", split="x"),
        Source("c.json", "P", "A"),
    )
