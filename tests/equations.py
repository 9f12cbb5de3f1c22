"""The papers' equations once more, token by token in plain float64 Python: what ``nemo_aapo.algorithms`` must equal."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import torch

VOCAB, LIMIT, GROUPS, G, K = 7, 6, 7, 4, 6
"""Vocabulary, length limit, groups, completions of a group, stored reference rewards of a prompt."""


@dataclasses.dataclass
class Batch:
    rewards: np.ndarray  # [GROUPS, G]
    reference_rewards: np.ndarray  # [GROUPS, K]
    lengths: np.ndarray  # [GROUPS * G]
    logits: torch.Tensor  # float64 [S, LIMIT, VOCAB]
    targets: torch.Tensor
    rollout: torch.Tensor
    old: torch.Tensor
    reference: torch.Tensor


def make_batch(seed: int, references: int = K) -> Batch:
    """Groups of equal rewards, empty, one-token and truncated completions are always among them."""
    rng = np.random.default_rng(seed)
    rewards = rng.choice([0.0, 1.0, 0.1 + 0.2, -0.5], (GROUPS, G))
    rewards[0], rewards[1], rewards[2] = 1.0, 0.1, rng.normal(size=G)
    lengths = rng.integers(0, LIMIT + 1, GROUPS * G)
    lengths[[0, 5, 9]] = 0, 1, LIMIT
    torch.manual_seed(seed)
    shape = (GROUPS * G, LIMIT)
    logits = torch.randn(*shape, VOCAB, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, shape)
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    near = [logprobs + 0.3 * torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    reference_rewards = rng.choice([0.0, 1.0, 0.3], (GROUPS, references))
    reference_rewards[1] = 0.1  # the same as the policy's: a group without any signal
    return Batch(rewards, reference_rewards, lengths, logits, targets, *near)


def with_failures(batch: Batch, seed: int) -> Batch:
    """Some completions and reference completions could not be scored: all of a group, all but one, or one here and
    there."""
    rng = np.random.default_rng(seed)
    rewards, reference_rewards = batch.rewards.copy(), batch.reference_rewards.copy()
    rewards[rng.random(rewards.shape) < 0.2] = np.nan
    reference_rewards[rng.random(reference_rewards.shape) < 0.3] = np.nan
    rewards[3], rewards[4], rewards[5, 1:] = np.nan, [0.0, 1.0, np.nan, 0.5], np.nan
    rewards[5, 0], rewards[6] = 1.0, [0.3, 0.1, 0.2, 0.4]
    reference_rewards[4], reference_rewards[6, 1:] = np.nan, np.nan
    return dataclasses.replace(batch, rewards=rewards, reference_rewards=reference_rewards)


def advantages_by_equation(config, rewards, reference_rewards):
    """A* by loops over what was scored; the sampled margin pairs by index."""
    everyone = [reward for group in rewards.tolist() for reward in group if not math.isnan(reward)]
    result = []
    for group, reference in zip(rewards.tolist(), reference_rewards.tolist(), strict=True):
        scored = [reward for reward in group if not math.isnan(reward)]
        known = [reward for reward in reference if not math.isnan(reward)]
        row = []
        for i, reward in enumerate(group):
            if math.isnan(reward):
                row.append(math.nan)
                continue
            value = 0.0
            if any(other != reward for other in scored):
                value = reward - math.fsum(scored) / len(scored)
                if config.scale_rewards:
                    value /= statistics.stdev(scored) + 1e-4
                if config.name == "rloo":
                    value = reward - (math.fsum(scored) - reward) / (len(scored) - 1)
            if config.name == "reinforce_pp":
                value = (reward - math.fsum(everyone) / len(everyone)) / (statistics.stdev(everyone) + 1e-4)
            if config.margin is not None and known:
                paired = config.margin.estimator == "sampled" and not math.isnan(reference[i])
                partners = [reference[i]] if paired else known
                unit = 1.0
                if config.scale_margin:
                    unit = (statistics.stdev(known) if len(known) > 1 else 0.0) + 1e-4
                deltas = [min(max((reward - r) / unit, config.margin.low), config.margin.high) for r in partners]
                value += math.fsum(deltas) / len(deltas)
            row.append(value)
        result.append(row)
    return result


def loss_by_equation(config, batch, advantages, alpha):
    """Loss, gradient of the logits [S][T][VOCAB] and metrics, token by token of the completions that were scored."""
    lengths = batch.lengths.tolist()
    scored = [s for s in range(len(lengths)) if not math.isnan(advantages[s // G][s % G])]
    tokens = sum(lengths[s] for s in scored)
    grads = np.zeros(batch.logits.shape)
    total, metrics = 0.0, dict.fromkeys(("tokens", "parity/abs_logprob_difference", "parity/kl", "kl"), 0.0)
    metrics |= {"ratio/mean": 0.0, "ratio/clipped_low_fraction": 0, "ratio/clipped_high_fraction": 0}
    metrics |= {"importance_weight/mean": 0.0, "importance_weight/truncated_fraction": 0}
    lowest = math.inf
    for s in scored:
        length, a = lengths[s], advantages[s // G][s % G]
        mean_ratio = math.exp(
            math.fsum(
                float(batch.logits[s, t].log_softmax(-1)[batch.targets[s, t]] - batch.old[s, t]) for t in range(length)
            )
            / max(length, 1)
        )
        denominator = {"token": tokens, "sequence": len(scored) * length, "fixed_length": len(scored) * LIMIT}
        for t in range(length):
            weight = alpha / denominator[config.loss_aggregation]
            row = batch.logits[s, t].tolist()
            largest = max(row)
            exps = [math.exp(z - largest) for z in row]
            probs = [e / math.fsum(exps) for e in exps]
            target = int(batch.targets[s, t])
            logp = row[target] - largest - math.log(math.fsum(exps))
            old, ref, rollout = (float(x[s, t]) for x in (batch.old, batch.reference, batch.rollout))
            learner = logp if config.loss == "cross_entropy" else old
            correction = 1.0
            if config.importance_weight_cap is not None:
                correction = min(math.exp(learner - rollout), config.importance_weight_cap)
                metrics["importance_weight/mean"] += math.exp(learner - rollout)
                metrics["importance_weight/truncated_fraction"] += correction == config.importance_weight_cap
            if config.loss == "cross_entropy":
                total += -weight * correction * a * logp
                slope = -weight * correction * a
            else:
                ratio = mean_ratio if config.loss == "sequence_ratio_clip" else math.exp(logp - old)
                low, high = 1 - config.clip.low, 1 + config.clip.high
                clipped = min(max(ratio, low), high)
                kl = math.exp(ref - logp) - (ref - logp) - 1
                dead = (a > 0 and ratio > high) or (a < 0 and ratio < low)
                if config.loss == "clipped_weight":
                    total += weight * (-correction * clipped * a * logp + config.kl_coefficient * kl)
                    slope = -weight * correction * clipped * a
                else:
                    total += weight * (-correction * min(ratio * a, clipped * a) + config.kl_coefficient * kl)
                    slope = 0.0 if dead else -weight * correction * ratio * a
                slope += weight * config.kl_coefficient * (1 - math.exp(ref - logp))
                metrics["ratio/mean"] += ratio
                metrics["ratio/clipped_low_fraction"] += dead and a < 0
                metrics["ratio/clipped_high_fraction"] += dead and a > 0
                metrics["kl"] += kl
            entropy = -math.fsum(p * math.log(p) for p in probs)
            total -= weight * config.entropy_coefficient * entropy
            for v in range(VOCAB):
                of_entropy = -probs[v] * (math.log(probs[v]) + entropy)
                grads[s, t, v] = slope * ((v == target) - probs[v]) - weight * config.entropy_coefficient * of_entropy
            metrics["tokens"] += 1
            metrics["parity/abs_logprob_difference"] += abs(learner - rollout)
            metrics["parity/kl"] += math.exp(learner - rollout) - (learner - rollout) - 1
            lowest = min(lowest, logp) if a < 0 else lowest
    return total, grads, metrics | {"min/negative_advantage_logprob": lowest}
