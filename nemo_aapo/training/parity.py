"""The parity gate: engine and learner must give the same tokens the same log-probs, or the gradient is a wrong one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from nemo_aapo.config.schema import Rollout
from nemo_aapo.distributed import parallel
from nemo_aapo.errors import ParityError
from nemo_aapo.training.parts import Learner
from nemo_aapo.types import Group


class ParityGate:
    """Compares engine and learner before a process's first update, and judges the figures of each step on policy.

    Completions can only be compared while the learner still has the weights that sampled them. Those of the first step
    serve a run that begins. One that goes on trains first on what the process before it sampled, perhaps by earlier
    policies: its engine samples a few by the weights of now for this alone.
    """

    def __init__(self, limits: Rollout, learner: Learner) -> None:
        """Args: limits: ``max_parity_error``, ``max_gen_kl`` and what to do beyond them, ``on_parity_error``."""
        self.limits, self.learner = limits, learner
        self._first_seen = False

    def check(self, groups: Sequence[Group] | None) -> None:
        """Compare them on completions that the engine sampled by the weights that the learner has. Collective.

        Args:
            groups: this rank's; None on all ranks: the first step's own will do.

        Raises:
            ParityError: they disagree, or the engine's log-probs are not finite.
        """
        if groups is None:
            return
        if complaint := disagreement(self.limits, self.learner.parity(groups)):
            raise ParityError(f"before the first step: {complaint}")

    def check_first_step(self, groups: Sequence[Group], policy_version: int) -> None:
        """Compare them on the completions of this process's first step; does nothing on later ones. Collective.

        Completions of an earlier policy are passed over: there engine and learner have to differ.

        Raises:
            ParityError: as ``check``.
        """
        if not self._first_seen and not _lag(groups, policy_version):
            self.check(groups)
        self._first_seen = True

    def watch(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Judge the figures of a step that was trained on: a warning, or None if there is nothing to say.

        Of a step that earlier policies sampled they hold the updates' effect as well, and are not judged. They are NaN
        where no token was trained on.

        Raises:
            ParityError: they disagree, and ``rollout.on_parity_error`` is ``stop``.
        """
        unknown = metrics["rollout/lag"] or math.isnan(metrics["parity/mult_prob_error"])
        if unknown or not (complaint := disagreement(self.limits, metrics)):
            return None
        if self.limits.on_parity_error == "stop":
            raise ParityError(f"step {step}: {complaint}. The last checkpoint is as it was")
        return f"warning: step {step}: {complaint}"


def disagreement(limits: Rollout, parity: Mapping[str, float]) -> str:
    """What is wrong with the parity of engine and learner; empty if it is within the limits, which NaN is not.

    Args:
        parity: ``parity/mult_prob_error`` and ``parity/gen_kl``, as ``Learner`` returns them.
    """
    error, kl = parity["parity/mult_prob_error"], parity["parity/gen_kl"]
    if error <= limits.max_parity_error and kl <= limits.max_gen_kl:
        return ""
    return (
        f"engine and learner disagree on the same tokens: multiplicative probability error {error:.4f} "
        f"(rollout.max_parity_error={limits.max_parity_error}), KL {kl:.2e} (rollout.max_gen_kl={limits.max_gen_kl}). "
        "Look at: rollout.temperature (the same in both?), the model's dtype, stale weights in the engine, the "
        "padded vocabulary; with an FP8 learner, whose engine decodes in bf16: docs/guide/gpu.md"
    )


def _lag(groups: Sequence[Group], policy_version: int) -> bool:
    """Whether an earlier policy drew some of these, on any rank."""
    return parallel.any_rank(any(c.policy_version != policy_version for g in groups for c in g.completions))[0]
