"""Reward, data and algorithm of one's own: doubling numbers, where the best completions of a group are pushed up.

python -m examples.algorithms.own_everything      in a checkout where bash scripts/quickstart.sh has run
"""

import random
from dataclasses import dataclass

from nemo_aapo import Algorithm, RewardRunner, load_config, load_tokenizer, make_prompts, train
from nemo_aapo.algorithms.loss import cross_entropy
from nemo_aapo.rewards.base import Reward


@dataclass(frozen=True)
class Digits(Reward):
    kind = "digits"

    def __call__(self, prompt, text, completion):
        return sum(a == b for a, b in zip(text.strip(), prompt.answer, strict=False)) / len(prompt.answer)


@dataclass(frozen=True)
class BestOfGroup(Algorithm):
    push: float = 0.5  # how hard all but the best completions are pushed down

    def advantages(self, groups):
        best = groups.rewards == groups.rewards.max(axis=1, keepdims=True, where=groups.rewards >= 0, initial=0)
        return best * 1.0 - self.push * ~best

    def token_loss(self, tokens):
        return cross_entropy(tokens)


def main():
    words = ["experiment=quickstart", "run.name=own", "trainer.max_steps=2", "validation.reward=digits"]
    config = load_config([*words, "rewards=[{name: digits, weight: 1.0}]"])
    sums = [(f"{n}+{n}=", str(2 * n)) for n in range(10, 100)]
    random.Random(0).shuffle(sums)
    prompts = make_prompts(sums, load_tokenizer(config.model.path), source="doubles")
    scorer = RewardRunner([(Digits(), 1.0)], workers=0, timeout_s=10.0)
    return train(config, data=prompts, rewards=scorer, algorithm=BestOfGroup(push=0.2))


if __name__ == "__main__":
    raise SystemExit(main())
