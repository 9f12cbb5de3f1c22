"""The schema of a run: the type of every setting and the facts that are known of it."""

from nemo_aapo.config.schema.algorithm import AlgorithmConfig, Clip, Margin
from nemo_aapo.config.schema.cluster import Cluster, Container, Servers
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
from nemo_aapo.config.schema.training import Checkpoint, Config, ExpManager, Precision, Run, Trainer

__all__ = [
    "AlgorithmConfig",
    "Checkpoint",
    "Clip",
    "Cluster",
    "Config",
    "Container",
    "Data",
    "ExpManager",
    "Lora",
    "Margin",
    "Model",
    "Optim",
    "Precision",
    "Remote",
    "RewardRunnerConfig",
    "Rollout",
    "Run",
    "Sched",
    "Server",
    "Servers",
    "Trainer",
    "Trtllm",
    "Validation",
]
