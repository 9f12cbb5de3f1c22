"""A whole training run: join the ranks, build, fit, export."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aapo.config import Config
from nemo_aapo.distributed import parallel
from nemo_aapo.distributed.agreement import agree
from nemo_aapo.distributed.lost_ranks import lost_ranks_reported
from nemo_aapo.errors import Interrupted
from nemo_aapo.mcore.groups import destroy_model_parallel
from nemo_aapo.prepare.job import Job, resolve
from nemo_aapo.prepare.loggers import check_loggers
from nemo_aapo.report.own_page import OwnPage
from nemo_aapo.report.trackers import Trackers
from nemo_aapo.run.experiment import open_experiment
from nemo_aapo.run.progress import Progress
from nemo_aapo.run.reporter import RunReporter
from nemo_aapo.run.stop import StopSignal
from nemo_aapo.run.summary import summary_table
from nemo_aapo.training.build import Parts, build_training, initialize, with_first_ranks_date
from nemo_aapo.training.trainer import AAPOTrainer
from nemo_aapo.utils.job import world_size_of_job
from nemo_aapo.utils.unforeseen import forgive_console

if TYPE_CHECKING:
    from typing_extensions import Unpack


SHORT_EXPORT_S = 10.0
"""An export that takes no longer is made to its end, whatever asks for a stop."""


def train(job: Job | Config, **parts: Unpack[Parts]) -> int:
    """Train what a job describes, going on where an earlier call was interrupted. Collective.

    Args:
        job: or a configuration alone, which is resolved for the ranks that are there.
        parts: of one's own, in place of the job's.

    Returns:
        0: complete, or stopped by a signal or the time limit after a checkpoint.

    Raises:
        ConfigError, DataError: what can't work, on every rank.
    """
    forgive_console()
    if isinstance(job, Config):
        job = resolve(job, world_size_of_job(), given=parts, algorithm=parts.get("algorithm"))
        check_loggers(job.config, here=True)
    initialize(job.config)
    rank = parallel.rank()
    try:
        job = with_first_ranks_date(job)
        config = job.config
        with (
            agree(
                lambda: open_experiment(config, dict(job.tree), rank=rank, world_size=job.sizes.world_size)
            ) as experiment,
            StopSignal(Path(config.run.dir), limit_s=config.checkpoint.max_time_s, speak=rank == 0) as stop,
            Progress(config.trainer.max_steps, enabled=rank == 0) as progress,
            contextlib.ExitStack() as stack,
        ):
            for line in job.sizes.arithmetic:
                progress.note(line)
            trackers = Trackers(experiment.loggers, progress.note)
            page = OwnPage(Path(config.run.dir), progress.note, enabled=rank == 0)

            def after_validation(step: int, samples: Sequence[dict[str, Any]]) -> None:
                page.begin()
                trackers.completions(step, samples)

            reporter = RunReporter(
                experiment,
                progress,
                stop,
                console_samples=config.validation.console_samples,
                after_validation=after_validation,
            )
            try:
                with lost_ranks_reported(lambda: "the start"):
                    trainer = build_training(job, reporter=reporter, stack=stack, **parts)
            except Interrupted:
                progress.note("stopped at the start; the same command begins anew")
                return 0
            complete = trainer.fit()
            complete = complete and _export(trainer, reporter)
            page.finish("finished" if complete else "stopped")
            trackers.page(page.path)
            if complete:
                experiment.finish({"step": trainer.step, "policy_version": trainer.policy.version})
            if not complete:
                progress.note(f"stopped after step {trainer.step}; the same command goes on from there")
        if complete and rank == 0:
            print(summary_table(config), flush=True)
        return 0
    finally:
        destroy_model_parallel()


def _export(trainer: AAPOTrainer, reporter: RunReporter) -> bool:
    """Export the model where that is asked for; False if a stop broke it off."""
    config, began = trainer.config, time.monotonic()
    if config.export_hf_model:
        reporter.note("exporting the Hugging Face model")
        with lost_ranks_reported(lambda: "the export"):
            try:
                trainer.policy.export(
                    str(Path(config.run.dir) / "hf_model"),
                    lambda: time.monotonic() - began > SHORT_EXPORT_S and reporter.stop_requested(),
                )
            except Interrupted:
                return False
    return True
