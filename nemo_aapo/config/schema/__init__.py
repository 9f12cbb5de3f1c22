"""The schemas of training and evaluation: the type of every setting and the facts that are known of it."""

from nemo_aapo.config.schema.algorithm import AlgorithmConfig, Band, Clip, Margin, MarginSchedule
from nemo_aapo.config.schema.cluster import Cluster, Container, Servers
from nemo_aapo.config.schema.evaluation import (
    EvaluatedModel,
    EvaluationConfig,
    EvaluationFields,
    EvaluationPrecision,
    EvaluationRanks,
    EvaluationRollout,
    EvaluationRun,
    EvaluationRunner,
    Sampling,
)
from nemo_aapo.config.schema.model import Lora, Model, Optim, Sched
from nemo_aapo.config.schema.rollout import (
    Data,
    Remote,
    RewardRunnerConfig,
    Rollout,
    Server,
    Trtllm,
    Validation,
)
from nemo_aapo.config.schema.training import Checkpoint, Config, ExpManager, Precision, Run, Trace, Trainer

__all__ = [
    "AlgorithmConfig",
    "Band",
    "Checkpoint",
    "Clip",
    "Cluster",
    "Config",
    "Container",
    "Data",
    "EvaluatedModel",
    "EvaluationConfig",
    "EvaluationFields",
    "EvaluationPrecision",
    "EvaluationRanks",
    "EvaluationRollout",
    "EvaluationRun",
    "EvaluationRunner",
    "ExpManager",
    "Lora",
    "Margin",
    "MarginSchedule",
    "Model",
    "Optim",
    "Precision",
    "Remote",
    "RewardRunnerConfig",
    "Rollout",
    "Run",
    "Sampling",
    "Sched",
    "Server",
    "Servers",
    "Trace",
    "Trainer",
    "Trtllm",
    "Validation",
]
