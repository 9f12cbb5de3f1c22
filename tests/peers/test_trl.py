"""GRPO, Dr. GRPO and DAPO as TRL's GRPOTrainer trains them: the same losses, gradients and advantages as ours.

TRL runs in a process of its own (``trl_run``), two updates on one batch for each of ``CASES``. Ours are computed from
the same rewards, completions and weights. docs/guide/algorithms.md says which switch is which.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_aapo.algorithms import ScoredGroups, Tokens
from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.config.schema import AlgorithmConfig, Clip
from tests.peers.peers import needs, run_peer
from tests.tiny_models import SIZES, make_config, save_character_tokenizer, save_model

ROOT = Path(__file__).resolve().parents[2]

pytestmark = needs("trl")

GROUPS, G, LIMIT, TEMPERATURE = 4, 4, 12, 0.7
RELATIVE_TOLERANCE = 2e-6  # float32 are TRL's rewards and advantages, and the norms inside the model

AGGREGATION = {"grpo": "sequence", "dr_grpo": "fixed_length", "dapo": "token", "cispo": "token"}
"""TRL's ``loss_type`` and our ``loss_aggregation``."""


@dataclasses.dataclass(frozen=True)
class Case:
    loss_type: str
    kl_coefficient: float
    scale_rewards: bool = True
    importance_weight_cap: float | None = None
    of_sequences: bool = False
    """GSPO's ratio."""

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in dataclasses.astuple(self))

    def trl(self) -> dict[str, Any]:
        """As TRL's switches."""
        arguments = {
            "loss_type": self.loss_type,
            "beta": self.kl_coefficient,
            "use_bias_correction_kl": False,
            "scale_rewards": "group" if self.scale_rewards else "none",
            "epsilon": self.clip.low,
            "epsilon_high": self.clip.high + (self.loss_type == "cispo"),  # of which TRL takes the bound itself
            "importance_sampling_level": "sequence" if self.of_sequences else "token",
        }
        if self.importance_weight_cap is not None:
            arguments["vllm_importance_sampling_mode"] = "token_truncate"
            arguments["vllm_importance_sampling_clip_max"] = self.importance_weight_cap
        # Steps that push enough ratios over both bounds; dr_grpo's denominator makes for the smallest gradient.
        lr = {"grpo": 0.02, "dr_grpo": 0.05, "dapo": 0.02, "cispo": 0.02}[self.loss_type]
        return {
            "name": self.name,
            "arguments": arguments,
            "importance_weight": self.importance_weight_cap is not None,
            "lr": lr,
        }

    @property
    def clip(self) -> Clip:
        """Bounds that the second update goes beyond; the mean ratio of a sequence moves less than a token's."""
        return Clip(low=0.02, high=0.028) if self.of_sequences else Clip(low=self._low, high=0.28)

    @property
    def _low(self) -> float:
        return 1.0 if self.loss_type == "cispo" else 0.2

    @property
    def loss(self) -> str:
        """``algorithm.loss``"""
        return {"cispo": "clipped_weight"}.get(
            self.loss_type, "sequence_ratio_clip" if self.of_sequences else "ratio_clip"
        )

    def ours(self) -> AlgorithmConfig:
        """As our switches, on top of ``conf/algorithm/grpo.yaml``."""
        page = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "algorithm" / "grpo.yaml"))
        return dataclasses.replace(
            make_config("no_model", algorithm=page).algorithm,
            loss=self.loss,
            clip=self.clip,
            kl_coefficient=self.kl_coefficient,
            loss_aggregation=AGGREGATION[self.loss_type],
            scale_rewards=self.scale_rewards,
            importance_weight_cap=self.importance_weight_cap,
        )


CASES = [
    *(Case(loss_type, beta) for loss_type in ("grpo", "dr_grpo", "dapo") for beta in (0.0, 0.04)),
    Case("cispo", 0.0),
    Case("grpo", 0.0, of_sequences=True),
    Case("dr_grpo", 0.04, scale_rewards=False),
    Case("dapo", 0.04, importance_weight_cap=1.1),
]


@dataclasses.dataclass(frozen=True)
class Given:
    """What both sides start from: S = GROUPS * G completions, and two models."""

    folder: Path
    rewards: np.ndarray  # float64 [GROUPS, G]
    prompt_ids: list[list[int]]  # [S]
    completions: list[list[int]]  # [S]
    rollout_logprobs: torch.Tensor  # float64 [S, LIMIT]

    def load(self, name: str) -> torch.nn.Module:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float64)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(completion) for completion in self.completions])

    @property
    def valid(self) -> torch.Tensor:
        """Bool [S, LIMIT]."""
        return torch.arange(LIMIT) < torch.as_tensor(self.lengths)[:, None]

    def logprobs(self, model: torch.nn.Module) -> torch.Tensor:
        """Float64 [S, LIMIT], 0 at padding; prompts are padded on the left, completions on the right."""
        width = max(len(prompt) for prompt in self.prompt_ids)
        ids, mask = torch.zeros(2, len(self.completions), width + LIMIT, dtype=torch.long)
        for s, (prompt, completion) in enumerate(zip(self.prompt_ids, self.completions, strict=True)):
            span = slice(width - len(prompt), width + len(completion))
            ids[s, span], mask[s, span] = torch.tensor(prompt + completion), 1
        logits = model(ids, attention_mask=mask).logits[:, width - 1 : -1] / TEMPERATURE
        picked = logits.log_softmax(-1).gather(-1, ids[:, width:, None])[..., 0]
        return picked.masked_fill(~self.valid, 0.0)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Given:
    from transformers import Qwen2Config

    folder = tmp_path_factory.mktemp("trl")
    small = {**SIZES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    for seed, name in enumerate(("reference", "policy")):
        save_model(Qwen2Config(**small), folder / name, seed)
        save_character_tokenizer(folder / name)
    rng = np.random.default_rng(0)
    rewards = rng.choice([0.0, 1.0, 0.3, -0.5], (GROUPS, G))
    rewards[0], rewards[1] = 1.0, rng.normal(size=G)  # a group without a signal, and one of any numbers
    prompts = [rng.integers(2, 97, size).tolist() for size in (3, 7, 1, 5)]
    lengths = rng.integers(1, LIMIT + 1, GROUPS * G)
    lengths[[5, 9]] = 1, LIMIT
    made = Given(
        folder,
        rewards,
        [prompts[s // G] for s in range(GROUPS * G)],
        [rng.integers(2, 97, length).tolist() for length in lengths],
        torch.empty(0),
    )
    with torch.no_grad():
        noise = torch.as_tensor(0.2 * rng.normal(size=(GROUPS * G, LIMIT)))
        return dataclasses.replace(made, rollout_logprobs=made.logprobs(made.load("policy")) + noise)


@pytest.fixture(scope="module")
def theirs(given) -> dict[str, np.ndarray]:
    """What TRL computed; see ``trl_run``."""
    inputs, outputs = given.folder / "inputs.json", given.folder / "outputs.npz"
    rollout = [row[: len(c)] for row, c in zip(given.rollout_logprobs.tolist(), given.completions, strict=True)]
    inputs.write_text(
        json.dumps(
            {
                "reference": str(given.folder / "reference"),
                "policy": str(given.folder / "policy"),
                "prompts": [f"prompt {s // G}" for s in range(GROUPS * G)],
                "prompt_ids": given.prompt_ids,
                "completions": given.completions,
                "rollout_logprobs": rollout,
                "rewards": given.rewards.ravel().tolist(),
                "group_size": G,
                "temperature": TEMPERATURE,
                "max_completion_length": LIMIT,
                "cases": [case.trl() for case in CASES],
            }
        )
    )
    run_peer("trl_run", inputs, outputs, home=given.folder)
    with np.load(outputs) as results:
        return dict(results)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_advantages_equal_trls(given, theirs, case):
    ours = Objective.of(case.ours(), max_new_tokens=LIMIT).advantages(ScoredGroups(given.rewards))
    np.testing.assert_allclose(ours.ravel(), theirs[f"{case.name}/advantages"], rtol=RELATIVE_TOLERANCE, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradient_of_both_updates_equal_trls(given, theirs, case):
    algorithm = Objective.of(case.ours(), max_new_tokens=LIMIT)
    lengths = given.lengths
    weights = algorithm.token_weights(lengths, total_tokens=int(lengths.sum()), total_sequences=len(lengths))
    weights = torch.as_tensor(weights)[:, None] * given.valid
    advantages = torch.as_tensor(algorithm.advantages(ScoredGroups(given.rewards)).reshape(-1, 1)).expand(-1, LIMIT)
    scale = (weights * advantages.abs()).sum().item()  # the loss itself is 0 in a first update without KL
    model = given.load("policy")
    with torch.no_grad():
        old = given.logprobs(model)
        reference = given.logprobs(given.load("reference"))
    for update in range(2):
        their_weights = torch.as_tensor(theirs[f"{case.name}/{update}/weights"])
        torch.nn.utils.vector_to_parameters(their_weights, model.parameters())
        loss, metrics = algorithm.token_loss(
            Tokens(
                given.logprobs(model)[given.valid],
                advantages[given.valid],
                weights[given.valid],
                rollout_logprobs=given.rollout_logprobs[given.valid],
                old_logprobs=old[given.valid] if update else None,
                reference_logprobs=reference[given.valid],
                lengths=lengths.tolist(),
            )
        )
        gradient = torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(model.parameters()))).numpy()
        their_gradient = theirs[f"{case.name}/{update}/gradient"]
        assert abs(loss.item() - theirs[f"{case.name}/{update}/loss"]) < RELATIVE_TOLERANCE * scale
        difference = np.linalg.norm(gradient - their_gradient) / np.linalg.norm(their_gradient)
        assert difference < RELATIVE_TOLERANCE
    if case.loss_type != "cispo":  # which has no lower bound
        assert metrics["ratio/clipped_low_fraction"] >= 3  # tokens of the second update: both bounds were at work
    assert metrics["ratio/clipped_high_fraction"] >= 3
