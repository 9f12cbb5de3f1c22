"""The parity gate before a run: compares engine and learner on the real model and layout, with a few prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from nemo_aapo.config import Config
from nemo_aapo.doctor.finding import Context, Finding

if TYPE_CHECKING:
    from nemo_aapo.engines.base import RolloutEngine
    from nemo_aapo.learner.policy import MegatronPolicy

PROMPTS = 8
COMPLETIONS = 4
"""Completions of each prompt."""
NEW_TOKENS = 32
"""Most tokens of a completion."""


def parity(context: Context) -> Finding:
    """Compare the log-probs that engine and learner give the same tokens with the limits of the configuration.

    Collective.
    """
    config, place = context.run_config, context.place
    asked = config.trainer.num_nodes * config.trainer.devices
    if config.rollout.engine == "remote":
        return Finding("parity", "skipped", "rollout.engine=remote: needs the servers; the run's own gate will compare")
    if asked != place.world_size:
        how = f"start it as the run's {asked} ranks: torchrun or srun"
        return Finding("parity", "skipped", f"{place.world_size} rank here, the configuration has {asked}; {how}")
    if "RANK" in os.environ:  # the ranks of this check meet at a port of their own
        os.environ["MASTER_PORT"] = str(context.port)
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    figures = measure(config)
    return judge(config, figures)


def judge(config: Config, figures: dict[str, float]) -> Finding:
    """Args: figures: as ``measure`` returns them."""
    from nemo_aapo.training.parity import disagreement

    if complaint := disagreement(config.rollout, figures):
        return Finding("parity", "failure", complaint)
    error, kl = figures["parity/mult_prob_error"], figures["parity/gen_kl"]
    return Finding(
        "parity",
        "ok",
        f"engine and learner agree on {figures['tokens']:.0f} tokens of {figures['prompts']:.0f} prompts: "
        f"mult_prob_error {error:.6f} (limit {config.rollout.max_parity_error:g}), "
        f"gen_kl {kl:.1e} (limit {config.rollout.max_gen_kl:g})",
    )


def measure(config: Config, engine: Callable[[MegatronPolicy], RolloutEngine] | None = None) -> dict[str, float]:
    """Collective: builds policy, learner and engine as training does, but no optimizer, and generates.

    Args:
        engine: makes an engine of a policy; by default the one that ``rollout.engine`` names.

    Returns:
        ``parity/mult_prob_error``, ``parity/gen_kl``, and how many ``tokens`` and ``prompts`` they are of.
    """
    from nemo_aapo.algorithms.objective import Objective
    from nemo_aapo.data.tokenizer import load_text
    from nemo_aapo.distributed import parallel
    from nemo_aapo.engines.build import build_engine
    from nemo_aapo.mcore.groups import destroy_model_parallel
    from nemo_aapo.prepare.job import resolve
    from nemo_aapo.rollout.collector import Collector
    from nemo_aapo.seeds import stream_seed
    from nemo_aapo.training import build
    from nemo_aapo.training.read_data import read_data

    job = resolve(config, config.trainer.num_nodes * config.trainer.devices, given=("rewards",))
    config = job.config
    build.initialize(config)
    with contextlib.ExitStack() as stack:
        stack.callback(destroy_model_parallel)
        model = config.model
        text = load_text(model.path, job.shape.vocab_size, trust_remote_code=model.trust_remote_code)
        train, held_out = read_data(config, text.tokenizer, None)
        data = train.prompts if len(train.prompts) else held_out.prompts  # a source without end has none yet
        prompts = [data[i % len(data)] for i in range(max(PROMPTS, parallel.data_parallel_size()))]
        objective = Objective.of(config.algorithm, config.rollout.max_new_tokens)
        policy = build.build_policy(job, trains=False)
        learner = build.build_learner(policy, objective)
        made = engine(policy) if engine else build_engine(config, policy, job.shape, text.decode)
        stack.callback(made.close)
        sampling = build.sampling_of(config, text.end_tokens)
        sampling = dataclasses.replace(sampling, max_new_tokens=min(NEW_TOKENS, sampling.max_new_tokens))
        seeds = [[stream_seed(config.seed, "doctor", i, j) for j in range(COMPLETIONS)] for i in range(len(prompts))]
        groups = Collector(made, None, text.decode).collect(prompts, sampling, seeds)
        tokens = sum(parallel.gather_data_parallel(sum(len(c.token_ids) for g in groups for c in g.completions)))
        figures = learner.parity(groups)
        parallel.barrier()  # no rank leaves before the others are done with it
        return {**figures, "tokens": float(tokens), "prompts": float(len(prompts))}
