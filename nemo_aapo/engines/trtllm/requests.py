"""One completion as a request to TensorRT-LLM, and its answer as a ``Completion``: pure functions.

The library's defaults and conventions differ from this project's in ways that raise no error and spoil the result.
Each is named here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nemo_aapo.engines.base import check_prompts
from nemo_aapo.engines.trtllm.contract import VERSION
from nemo_aapo.engines.trtllm.library import CompletionOutput, Logprob
from nemo_aapo.errors import RequestError, RunError
from nemo_aapo.types import Completion, SamplingSpec

KNOWN = ("temperature", "max_new_tokens", "stop_token_ids", "top_p")
"""Fields of a ``SamplingSpec`` that become part of a request. The others can't: the library's minimum length holds back
its end token and not stop tokens, and stop strings need the tokenizer, which is left out."""


def check_request(
    prompts: Sequence[np.ndarray], sampling: SamplingSpec, seeds: Sequence[Sequence[int]], *, tempered: bool
) -> None:
    """Refuse what the engine can't do as asked.

    Args:
        tempered: log-probs were seen to be after temperature.

    Raises:
        ValueError: as ``check_prompts``.
        RequestError: a field of the spec that becomes no part of a request; a temperature whose log-probs can't be had.
    """
    check_prompts(prompts, seeds)
    for field in dataclasses.fields(sampling):
        value = getattr(sampling, field.name)
        if field.name not in KNOWN and value != field.default:
            raise RequestError(f"{field.name}={value!r} can't be had of TensorRT-LLM as it is used here")
    check_temperature("temperature", sampling.temperature, tempered)


def check_temperature(name: str, temperature: float, tempered: bool) -> None:
    """Refuse a temperature whose log-probs can't be had; see ``check_request``. ``name`` is what it is called."""
    # Trap: TorchSampler's log-probs are of the logits before temperature, TRTLLMSampler's after it (both before top_p,
    # as ours are). From the drawn token's alone they can't be rescaled. What is greedy has those at temperature 1.
    if not tempered and temperature not in (0.0, 1.0):
        raise RequestError(
            f"{name}={temperature}: this TensorRT-LLM's sampler reports log-probs before temperature, which are not "
            f"those of what it draws. Use version {VERSION}, a temperature of 0 or 1, or the megatron engine"
        )


def sampling_arguments(sampling: SamplingSpec, seed: int) -> dict[str, Any]:
    """Keyword arguments of the library's ``SamplingParams`` for one completion.

    Args:
        seed: 0 <= seed < 2**63, the completion's own random stream.
    """
    stops = list(sampling.stop_token_ids)
    arguments = {
        "max_tokens": sampling.max_new_tokens,  # trap: the default is 32
        # Trap: whether the end token is part of the output depends on the sampler, and no end token at all makes the
        # library ask for a tokenizer. So none ever ends a completion (-1), and stop tokens, kept in the output, do.
        "end_id": -1,
        "pad_id": stops[0] if stops else 0,  # the default is end_id
        "stop_token_ids": stops or None,
        "include_stop_str_in_output": True,
        "logprobs": 1,  # trap: 0 asks for none
        "detokenize": False,
        "seed": seed,
    }
    if sampling.greedy:
        # Temperature 0 means different things to the library's samplers; the likeliest of one is the same to both.
        return {**arguments, "top_k": 1}
    # Trap: with temperature, top_p and top_k all unset decoding is greedy. All three are always given.
    return {**arguments, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}


def read_completion(output: CompletionOutput, sampling: SamplingSpec, policy_version: int) -> Completion:
    """One finished ``CompletionOutput`` as a ``Completion``.

    Raises:
        RunError: the request did not end as a completion ends, or its answer contradicts itself.
    """
    tokens = np.asarray(output.token_ids, dtype=np.int32)
    reason = output.finish_reason
    if reason not in ("stop", "length"):  # timeout, cancelled, or None for a request that has not finished
        raise RunError(
            f"TensorRT-LLM ended a completion after {len(tokens)} tokens with finish_reason={reason!r}: part of a "
            "completion is no sample of the policy. Look at the engine's log for evicted or aborted requests"
        )
    # Judged by the last token: a stop token drawn at the length limit is reported as "length".
    stopped = len(tokens) > 0 and int(tokens[-1]) in sampling.stop_token_ids
    if reason == "stop" and not stopped:
        raise RunError(
            f"TensorRT-LLM reports a stop, but the completion's last token is none of {sampling.stop_token_ids}: "
            "include_stop_str_in_output had no effect, or another end token was used"
        )
    if not stopped and len(tokens) != sampling.max_new_tokens:
        raise RunError(
            f"TensorRT-LLM cut a completion at {len(tokens)} of {sampling.max_new_tokens} tokens: "
            "max_seq_len or the KV cache is too small for it"
        )
    return Completion(
        token_ids=tokens,
        logprobs=_logprobs(tokens, output.logprobs),
        finish_reason="stop" if stopped else "length",
        policy_version=policy_version,
    )


def _logprobs(tokens: np.ndarray, entries: Sequence[Mapping[int, Logprob]] | None) -> np.ndarray:
    """float32 [T], the log-prob of each token of a completion."""
    if entries is None or len(entries) != len(tokens):
        raise RunError(
            f"TensorRT-LLM gave log-probs for {0 if entries is None else len(entries)} of {len(tokens)} tokens"
        )
    # Trap: an entry holds the likeliest token as well as the drawn one, in an order that depends on the sampler.
    missing = [t for t, (token, entry) in enumerate(zip(tokens, entries, strict=True)) if int(token) not in entry]
    if missing:
        raise RunError(f"TensorRT-LLM gave no log-prob of the drawn token {tokens[missing[0]]} at {missing[0]}")
    values = (entry[int(token)].logprob for token, entry in zip(tokens, entries, strict=True))
    return np.fromiter(values, dtype=np.float32, count=len(tokens))
