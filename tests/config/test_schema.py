"""A setting's facts stand once, in its field: config files, ``--help``, refusals and the reference follow them."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import pytest

from nemo_aapo.config import build
from nemo_aapo.config.build import with_paths
from nemo_aapo.config.command_line import EVALUATION, TRAINING, config_directory, read_command_line, usage
from nemo_aapo.config.compose import compose
from nemo_aapo.config.schema.config_file import entries_of, with_comments
from nemo_aapo.config.schema.facts import Facts, section, setting, settings_of
from nemo_aapo.config.schema.reference import REFERENCE, SCHEMAS, reference, type_in_words
from nemo_aapo.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FILES = {name: (config_directory() / f"{name}.yaml").read_text() for name in SCHEMAS}
NULL_THERE = (
    "algorithm.clip.",
    "algorithm.margin_schedule.",
    "algorithm.sequence_mask.",
    "algorithm.token_mask.",
    "model.lora.",
)  # these sections are null by default
FREE = (
    "rewards.",
    "sources.",
    "exp_manager.wandb_logger_kwargs.",
    "exp_manager.mlflow_logger_kwargs.",
)  # what these take is not ours to list
REMEDY = "python -m nemo_aapo.config.schema.reference writes it"


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_config_file_has_exactly_the_settings_of_its_schema(name):
    known = [item.key for item in settings_of(SCHEMAS[name]) if not item.key.startswith(NULL_THERE)]
    sections = {key.rsplit(".", depth)[0] for key in known for depth in range(1, key.count(".") + 1)}
    on_page = {key for key in entries_of(FILES[name]) if not key.startswith(FREE)}
    assert on_page - sections - {"defaults"} == set(known) - sections


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_comments_of_a_config_file_are_the_meanings_of_its_settings(name):
    assert with_comments(FILES[name], SCHEMAS[name]) == FILES[name], REMEDY


def test_the_settings_reference_is_that_of_the_schema():
    assert (ROOT / REFERENCE).read_text() == reference(FILES), REMEDY


@pytest.mark.parametrize("kind", [TRAINING, EVALUATION])
def test_help_shows_the_main_settings_with_default_and_meaning(kind):
    text = usage("What it does.", read_command_line([], kind))
    for item in settings_of(kind.schema):
        assert (f" {item.key}=" in text) == item.facts.main
        assert item.facts.meaning in text or not item.facts.main
    assert " seed=1234 " in text


def test_every_meaning_is_a_line_that_says_something():
    for schema in SCHEMAS.values():
        for item in settings_of(schema):
            assert len(item.facts.meaning) > 10, item.key
            assert "\n" not in item.facts.meaning, item.key


def test_a_setting_without_facts_fails_when_its_section_is_declared():
    with pytest.raises(TypeError, match=r"Forgotten\.steps: write its facts"):

        @section
        class Forgotten:
            steps: int

    with pytest.raises(TypeError, match="decides"):
        setting("nobody thought of whether it decides")  # type: ignore[call-arg]  # what is tested


@pytest.mark.parametrize(
    ("limits", "said", "inside", "outside"),
    [
        ({"minimum": 1}, "at least 1", (1, 7), (0,)),
        ({"above": 0}, "above 0", (1e-9,), (0, -1)),
        ({"maximum": 2}, "at most 2", (2,), (3,)),
        ({"below": 2}, "below 2", (1.9,), (2,)),
        ({"above": 0, "maximum": 1}, "in (0, 1]", (0.1, 1), (0, 1.1)),
        ({"minimum": 0, "below": 1}, "in [0, 1)", (0, 0.9), (-0.1, 1)),
        ({}, "", (-math.inf, math.inf), ()),
    ],
)
def test_limits_in_words_are_those_that_are_kept(limits, said, inside, outside):
    facts = Facts(meaning="m", decides=False, **limits)
    assert facts.limits == said
    assert all(facts.allow(value) for value in inside)
    assert not any(facts.allow(value) for value in outside)


def test_types_in_words():
    keys = {item.key: type_in_words(item.annotation) for item in settings_of(SCHEMAS["train_aapo"])}
    assert keys["seed"] == "integer"
    assert keys["data.train"] == "text or list of mapping"
    assert keys["model.lora"] == "mapping or null"
    assert keys["rollout.stop_strings"] == "list of text"
    assert keys["model.recompute_granularity"] == "`full`, `selective` or null"
    assert type_in_words(dict[str, Any]) == "mapping"


@pytest.mark.parametrize("kind", [TRAINING, EVALUATION])
def test_every_setting_that_is_a_path_takes_a_tilde_for_the_home_directory_and_is_never_empty(kind, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = {item.key for item in settings_of(kind.schema) if item.facts.path}
    named_so = re.compile(
        r"[._](path|dir|directory|store|base|replay|custom|python|image|mounts)$|^data\.(train|validation)$|^rewards$"
    )
    assert paths == {item.key for item in settings_of(kind.schema) if named_so.search(item.key)}
    tree = compose(read_command_line(["model.path=m"], kind))
    lists = {"rewards": "function", "data.train": "path", "data.validation": "path", "cluster.container.mounts": None}

    def value_of(key: str, path: str) -> Any:
        if key not in lists:
            return path
        inner = lists[key]
        return [{inner: path} if inner else path]

    for key in paths:
        set_in(tree, key, value_of(key, "~/x"))
    config = build(kind.schema, tree)
    resolved = with_paths(tree, config)
    for key in paths:
        assert set_in(resolved, key, None) == value_of(key, "/home/me/x")
    assert build(kind.schema, with_paths(tree, config)) == config
    for key in paths:
        before = set_in(tree, key, value_of(key, " "))
        with pytest.raises(ConfigError, match=rf"{key}[\w.\[\]]*: the path is empty"):
            build(kind.schema, tree)
        set_in(tree, key, before)


def set_in(tree: dict[str, Any], key: str, value: Any) -> Any:
    """Set a dotted key of a tree; the value before."""
    *sections, leaf = key.split(".")
    inner = functools.reduce(lambda inner, name: inner[name], sections, tree)
    before, inner[leaf] = inner[leaf], value
    return before
