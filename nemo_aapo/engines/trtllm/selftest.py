"""What an engine shows at its start by drawing: that its sampler does what the adapter rests on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from nemo_aapo.engines.trtllm.contract import VERSION
from nemo_aapo.engines.trtllm.library import CompletionOutput
from nemo_aapo.engines.trtllm.requests import check_temperature
from nemo_aapo.errors import RunError
from nemo_aapo.types import SamplingSpec

Draw = Callable[[int, SamplingSpec, int], CompletionOutput]
"""``draw(token, sampling, seed)``: the completion of a prompt of one token."""

COLD = 0.01
"""A temperature at which next to nothing but the likeliest token is drawn."""
PROMPTS = 8
"""Prompts, of one token each, that log-probs are looked at on."""


def check_seeds(draw: Draw, max_new_tokens: int) -> None:
    """See that a seed gives the same tokens again and another one others, or all engines would sample alike.

    TorchSampler ignores the seeds of requests before pull request 17172.

    Raises:
        RunError: it is not so.
    """
    sampling = SamplingSpec(temperature=1.0, max_new_tokens=min(16, max_new_tokens), stop_token_ids=())
    first, again, *others = ([*draw(0, sampling, seed).token_ids] for seed in (1, 1, 2, 3, 4))
    if first != again or all(other == first for other in others):
        raise RunError(
            "TensorRT-LLM's sampler ignores the seeds of requests: engines would draw the same completions of "
            f"one prompt. Use version {VERSION}, or rollout.engine=megatron"
        )


def are_tempered(draw: Draw, temperatures: Mapping[str, float]) -> bool:
    """Whether log-probs are those at the sampling temperature, as the learner's are, whatever the temperature.

    Cold enough, the drawn token has all the probability, and its log-prob is near 0; before temperature it is that of
    the likeliest token at 1. TRTLLMSampler's are after temperature (samplingLayer.cpp takes the softmax of logits
    that were divided, samplingTopPKernels.cu reports its logarithm), TorchSampler's before. On a model too certain of
    itself to tell, the parity gate does, which compares each token's with the learner's.

    Args:
        temperatures: setting -> temperature, of all that the run samples at.

    Raises:
        RequestError: they are not, and one of these needs it.
    """
    sampling = SamplingSpec(temperature=COLD, max_new_tokens=1, stop_token_ids=())
    outputs = [draw(token, sampling, token) for token in range(PROMPTS)]
    found = [output.logprobs[0][output.token_ids[0]].logprob for output in outputs if output.logprobs]
    tempered = len(found) == PROMPTS and sum(found) / PROMPTS >= math.log(0.5)
    for name, temperature in temperatures.items():
        check_temperature(name, temperature, tempered)
    return tempered
