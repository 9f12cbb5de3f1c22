"""The final advantages of a step's groups, and which of the groups are trained on."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_aapo.algorithms.objective import Objective
from nemo_aapo.config import Config
from nemo_aapo.config.sizes import prompts_drawn
from nemo_aapo.rollout.oversampling import select
from nemo_aapo.rollout.spread import own_shard
from nemo_aapo.seeds import stream_seed
from nemo_aapo.types import Group


def final_advantages(
    objective: Objective, config: Config, step: int, groups: Sequence[Group]
) -> tuple[list[Group], dict[str, float]]:
    """Advantages decide which groups are taken; where they depend on the whole batch, those taken get new ones.

    Collective over the data-parallel ranks.

    Args:
        step: counted from 0.
        groups: this rank's of all that were generated for it.

    Returns:
        This rank's of those that are trained on, with final advantages; what was left out, as metrics.
    """

    def of(numbered: Sequence[tuple[int, Group]]) -> list[Group]:
        seeds = [stream_seed(config.seed, "pairs", step, number) for number, _ in numbered]
        batch = [group for _, group in numbered]
        return objective.with_advantages(batch, seeds=seeds, step=step, max_steps=config.trainer.max_steps)

    drawn = prompts_drawn(config)
    taken, left_out = select(of(list(enumerate(groups, own_shard(drawn).start))), drawn, config.prompts_per_step)
    if left_out and objective.algorithm.whole_batch:
        return of(taken), left_out
    return [group for _, group in taken], left_out
