"""The configuration: its schema, the sizes derived from it, and every refusal with its reason.

A configuration passes three gates before anything expensive happens: ``check_overrides`` (mistyped keys on the
command line), ``parse`` (the composed tree by itself), ``derive`` (against the model and the number of ranks).
"""

from nemo_aapo.config.build import build
from nemo_aapo.config.cluster import without_secrets
from nemo_aapo.config.decisive import END_TOKENS, Identity, decisive_settings, digest, digests_of_run
from nemo_aapo.config.parse import check_overrides, parse, parse_evaluation
from nemo_aapo.config.precision import PRECISIONS, PrecisionKind, kind_of, pad_multiple, with_machine_defaults
from nemo_aapo.config.schema import Config, EvaluationConfig
from nemo_aapo.config.sizes import Experts, ModelShape, Sizes, derive, with_routes_decided

__all__ = [
    "END_TOKENS",
    "PRECISIONS",
    "Config",
    "EvaluationConfig",
    "Experts",
    "Identity",
    "ModelShape",
    "PrecisionKind",
    "Sizes",
    "build",
    "check_overrides",
    "decisive_settings",
    "derive",
    "digest",
    "digests_of_run",
    "kind_of",
    "pad_multiple",
    "parse",
    "parse_evaluation",
    "with_machine_defaults",
    "with_routes_decided",
    "without_secrets",
]
