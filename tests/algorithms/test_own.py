"""Algorithms of one's own: loaded and refused, and what ``check`` finds wrong with one that breaks a promise."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from nemo_aapo.algorithms import Algorithm, registry
from nemo_aapo.algorithms.check import check
from nemo_aapo.config.schema import AlgorithmConfig
from nemo_aapo.errors import ConfigError
from nemo_aapo.prepare.algorithm import with_algorithm
from tests.algorithms.test_algorithms import preset
from tests.tiny_models import make_config

ROOT = Path(__file__).resolve().parents[2]
FILE = """
from dataclasses import dataclass
from nemo_aapo import Algorithm

@dataclass(frozen=True)
class Shifted(Algorithm):
    shift: float
    times: int = 1
    needs_reference_logprobs = True

    def __post_init__(self):
        if self.times < 1:
            raise ValueError("times must be at least 1")

    def advantages(self, groups):
        return self.times * (groups.rewards - self.shift)

    def token_loss(self, tokens):
        return -(tokens.weights * tokens.advantages * tokens.logprobs).sum(), {}

@dataclass(frozen=True)
class Half(Algorithm):
    def advantages(self, groups):
        return groups.rewards

class Loose:
    pass

@dataclass
class Thawed(Algorithm):
    shift: float

@dataclass(frozen=True)
class Unknown(Shifted):
    limit: "Nowhere" = 1

@dataclass(frozen=True)
class Lists(Shifted):
    bounds: list[float] = ()
    names: list = ()
    pair: tuple[int, ...] = ()
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("own") / "shifted_algorithm.py"
    path.write_text(FILE)
    return str(path)


def own(file, name="Shifted", settings=None):
    return make_config("no_model", algorithm__custom=f"{file}:{name}", algorithm__settings=settings)


def test_a_class_of_ones_own_is_built_with_its_settings_and_decides_what_the_run_needs(file):
    config = with_algorithm(own(file, settings={"shift": 1, "times": 2}))
    made = registry.algorithm_of(config.algorithm)
    assert (made.shift, made.times) == (1.0, 2)
    settings = config.algorithm
    assert (settings.name, settings.needs) == ("Shifted", ("reference_logprobs",))
    assert settings.needs_reference_logprobs
    assert settings.margin is settings.reference is settings.reference_store is None
    handed_over = with_algorithm(make_config("no_model"), made).algorithm
    assert handed_over.settings == {"shift": 1.0, "times": 2}  # they decide the digest of the run
    assert (handed_over.name, handed_over.needs) == (settings.name, settings.needs)


def test_lists_among_the_settings_are_converted_as_their_types_say(file):
    made = registry.algorithm_of(
        own(file, "Lists", {"shift": 1, "bounds": [1, 2.5], "names": ["a"], "pair": [1]}).algorithm
    )
    assert (made.bounds, made.names, made.pair) == ([1.0, 2.5], ["a"], (1,))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Shifted", None, "algorithm.settings.shift must be set"),
        ("Shifted", {"shift": "much"}, r"algorithm.settings.shift='much': a value of type float"),
        ("Shifted", {"shift": 1, "tims": 2}, r"unknown setting 'algorithm.settings.tims' \(did you mean .*times"),
        ("Shifted", {"shift": 1, "times": 0}, "times must be at least 1"),
        ("Shiftd", None, "has no class 'Shiftd'; did you mean 'Shifted'"),
        ("Half", None, "Half has no token_loss"),
        ("Loose", None, "must be a frozen dataclass that inherits from nemo_aapo.Algorithm"),
        ("Thawed", {"shift": 1}, "Thawed must be a frozen dataclass"),
        ("Unknown", {"shift": 1}, r"shifted_algorithm\.py:Unknown: NameError: name 'Nowhere' is not defined"),
        ("Lists", {"shift": 1, "bounds": [1, "x"]}, r"algorithm\.settings\.bounds\[1\]='x': a value of type float"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(file, name, settings, message):
    with pytest.raises(ConfigError, match=message):
        with_algorithm(own(file, name, settings))


def test_a_missing_file_and_an_unknown_name_are_refused():
    with pytest.raises(ConfigError, match=r"there is no file gone\.py"):
        with_algorithm(own("gone.py"))
    with pytest.raises(ConfigError, match=r"no such algorithm \(did you mean 'dapo'\?\)"):
        with_algorithm(make_config("no_model", algorithm__name="dapoo"))
    with pytest.raises(ConfigError, match=r"group_size=1: algorithm=gpg .* at least 2"):
        with_algorithm(dataclasses.replace(make_config("no_model", group_size=1), algorithm=preset("gpg")))
    for one_is_enough in ("aapo", "reinforce_pp"):  # a margin, a baseline of the whole batch
        with_algorithm(dataclasses.replace(make_config("no_model", group_size=1), algorithm=preset(one_is_enough)))
    with pytest.raises(ConfigError, match=r"have no effect with algorithm\.custom=null"):
        make_config("no_model", algorithm__settings={"shift": 1})


@pytest.mark.parametrize("name", registry.BUILT_IN)
def test_every_built_in_algorithm_keeps_its_promises(name):
    config = preset(name)
    assert [f for f in check(registry.algorithm_of(config), config) if f.wrong] == []
    assert "](https://arxiv.org/abs/" in registry.paper_of(name)


@pytest.mark.parametrize("loss", ["ratio_clip", "sequence_ratio_clip", "clipped_weight"])
def test_aapos_margin_goes_with_every_loss_and_every_mask(loss):
    grpo = preset("gspo")
    config = dataclasses.replace(
        preset("aapo"),
        loss=loss,
        clip=grpo.clip,
        kl_coefficient=0.1,
        sequence_kl_limit=0.05,
        probability_change_limit=0.1,
    )
    assert [f for f in check(registry.algorithm_of(config), config) if f.wrong] == []


@dataclass(frozen=True)
class Sound(Algorithm):
    def advantages(self, groups):
        return np.nan_to_num(groups.rewards)

    def token_loss(self, tokens):
        return -(tokens.weights * tokens.advantages * tokens.logprobs).sum(), {}


@dataclass(frozen=True)
class Mean(Sound):
    def token_loss(self, tokens):
        return -(tokens.advantages * tokens.logprobs).mean(), {}


@dataclass(frozen=True)
class Whitened(Sound):
    def token_loss(self, tokens):
        advantages = tokens.advantages - tokens.advantages.mean()
        return -(tokens.weights * advantages * tokens.logprobs).sum(), {}


@dataclass(frozen=True)
class OfTheBatch(Sound):
    def advantages(self, groups):
        return np.nan_to_num(groups.rewards - np.nanmean(groups.rewards))


@dataclass(frozen=True)
class OwnSequences(Sound):
    needs_old_logprobs = True

    def token_loss(self, tokens):
        parts = zip(
            *(
                x.split(tokens.lengths)
                for x in (tokens.weights, tokens.advantages, tokens.logprobs - tokens.old_logprobs)
            ),
            strict=True,
        )
        return sum((-(w * a).sum() * d.mean().exp() for w, a, d in parts if len(w)), 0.0 * tokens.logprobs.sum()), {}


@dataclass(frozen=True)
class UndefinedAlone(Sound):
    def token_loss(self, tokens):
        value, metrics = super().token_loss(tokens)
        return value + 0.0 * torch.tensor(tokens.lengths, dtype=value.dtype).std(), metrics


@dataclass(frozen=True)
class Overflowing(Sound):
    needs_old_logprobs = True

    def token_loss(self, tokens):
        ratio = (tokens.logprobs.float() - tokens.old_logprobs.float()).exp()
        return -(tokens.weights * tokens.advantages * ratio).sum(), {}


@dataclass(frozen=True)
class NotANumber(Sound):
    def advantages(self, groups):
        deviation = groups.rewards.std(axis=1, keepdims=True)
        return np.divide(groups.rewards, deviation, out=np.full_like(groups.rewards, np.inf), where=deviation > 0)


@dataclass(frozen=True)
class Drawn(Sound):
    def advantages(self, groups):
        return np.random.default_rng().normal(size=groups.rewards.shape)


@dataclass(frozen=True)
class Attached(Sound):
    def token_loss(self, tokens):
        return super().token_loss(tokens)[0], {"mine": (tokens.logprobs**2).sum()}


@dataclass(frozen=True)
class Entropic(Sound):
    def token_loss(self, tokens):
        return (tokens.weights * (1 - tokens.advantages) * tokens.logprobs).sum(), {}


@dataclass(frozen=True)
class Bonus(Sound):
    def token_loss(self, tokens):
        value, metrics = super().token_loss(tokens)
        return value - 0.1 * (tokens.weights * tokens.advantages.abs() * tokens.entropy).sum(), metrics


@dataclass(frozen=True)
class DeclaredBonus(Bonus):
    needs_entropy_gradient = True


@pytest.mark.parametrize(
    ("kind", "promise", "words"),
    [
        (Mean, "a sum of weights", "no mean"),
        (Whitened, "over any micro-batches", "its own sequence alone"),
        (OfTheBatch, "the groups beside it", "whole_batch = True"),
        (OwnSequences, "cut over ranks", "sequence_mean"),
        (UndefinedAlone, "over any micro-batches", "the loss is nan"),
        (Overflowing, "finite on long ratios", "clamp log-ratios"),
        (NotANumber, "a finite number", "not finite"),
        (Drawn, "a finite number", "groups.random"),
        (Attached, "a scalar with a gradient", "detach it"),
        (Entropic, "has no gradient", "learns_without_advantage"),
        (Bonus, "through tokens.entropy", "needs_entropy_gradient = True"),
    ],
)
def test_a_broken_promise_is_found_and_the_remedy_named(kind, promise, words):
    config: AlgorithmConfig = preset("gpg")
    wrong = {finding.promise: finding.wrong for finding in check(kind(), config) if finding.wrong}
    assert any(promise in name and words in said for name, said in wrong.items()), wrong
    for sound in (Sound(), DeclaredBonus()):
        assert not [finding.wrong for finding in check(sound, config) if finding.wrong]


def test_no_part_outside_knows_an_algorithm_by_name():
    """Neither its name as a text, nor its class, nor its module; ``examples`` and ``benchmarks`` choose by name."""
    names = {*registry.BUILT_IN, *registry.BUILT_IN.values(), "aapo_paper"}
    found = []
    for path in sorted((ROOT / "nemo_aapo").rglob("*.py")):
        part = path.relative_to(ROOT / "nemo_aapo").parts[0]
        if part in (
            "trainer",
            "training",
            "learner",
            "planning",
            "reference_store",
            "prepare",
            "conversion",
            "rollout",
        ):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and node.value in names:
                    found.append((path.name, node.value))
                if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).rpartition(".")[2] in names:
                    found.append((path.name, ast.unparse(node)))
    assert not found
