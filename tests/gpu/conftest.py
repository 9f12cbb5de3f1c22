"""What tests on a GPU share. Without one they are skipped; ``pytest tests/gpu`` on a machine with one runs them."""

from __future__ import annotations

import importlib.util
import os

import pytest


def pytest_collection_modifyitems(items):
    import torch

    absent = [] if torch.cuda.is_available() else ["a CUDA GPU"]
    if importlib.util.find_spec("transformer_engine") is None:
        absent.append("TransformerEngine")
    if absent:
        for item in items:
            if "tests/gpu" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(absent)}"))


@pytest.fixture(autouse=True)
def machine_can(request):
    """A precision that this GPU can't do is skipped, with the reason that a run is refused for."""
    from nemo_aapo.launch.world import Machine, refusal
    from tests.tiny_models import make_config

    call = getattr(request.node, "callspec", None)
    if call and "precision" in call.params:
        config = make_config("unused", precision__name=call.params["precision"])
        if problem := refusal(config, Machine.present()):
            pytest.skip(problem)


@pytest.fixture(scope="session")
def one_rank():
    """Megatron's groups of a single rank, on the GPU."""
    from nemo_aapo.mcore.groups import destroy_model_parallel, initialize_model_parallel

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    initialize_model_parallel(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, seed=1, timeout_s=120)
    yield
    destroy_model_parallel()
