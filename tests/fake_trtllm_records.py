"""What the stand-in for TensorRT-LLM is configured by: classes that take the contract's fields and no others."""

from __future__ import annotations

from typing import Any

from nemo_aapo.engines.trtllm import contract
from nemo_aapo.engines.trtllm.contract import REQUIRED


def strict(cls: contract.LibraryClass, given: dict[str, Any]) -> dict[str, Any]:
    """All fields, from what was given and the defaults; unknown and missing ones are errors, as with pydantic."""
    unknown = sorted(set(given) - set(cls.fields))
    missing = [name for name, default in cls.fields.items() if default is REQUIRED and name not in given]
    if unknown or missing:
        raise TypeError(f"{cls.name}: unknown arguments {unknown}, missing arguments {missing}")
    return {name: given.get(name, default) for name, default in cls.fields.items()}


class Record:
    """A configuration object of the contract's fields."""

    contract_class: contract.LibraryClass

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(strict(self.contract_class, given))


class KvCacheConfig(Record):
    contract_class = contract.KV_CACHE_CONFIG


class SamplingParams(Record):
    contract_class = contract.SAMPLING_PARAMS


class CudaGraphConfig(Record):
    contract_class = contract.CUDA_GRAPH_CONFIG


class SleepConfig(Record):
    contract_class = contract.SLEEP_CONFIG
