"""The messages between trainer and rollout servers, as JSON, and the checks of what came in.

Both sides use this module and no other. Numbers arrive exactly: a float32 is written as the decimal of the float64 that
equals it, which reads back to the same bits. Routes alone, hundreds of small numbers a token, are bytes behind a line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nemo_aapo.engines.collective.plan import Rendezvous
from nemo_aapo.engines.messages import dump_object, load_object, require_all, typed
from nemo_aapo.engines.weights import Weights, WeightsId
from nemo_aapo.errors import WireError
from nemo_aapo.types import Completion, Routes, SamplingSpec

API = "/v1"
"""Prefix of all addresses: a client of another version gets 404 instead of a misunderstanding."""
ANY_TOKEN = 2**31
"""Token ids are below this, whatever the vocabulary."""
MAX_SEED = 2**63
"""Seeds are below this."""
MAX_LINE = 1 << 28
"""Bytes of the longest message; a completion of a million tokens takes a tenth of it."""


@dataclass(frozen=True)
class Limits:
    """What one sequence may be, by the model and the server's memory."""

    vocab_size: int
    """Token ids are below this."""
    max_sequence_tokens: int
    """The most tokens of prompt and completion together."""


@dataclass(frozen=True)
class GenerateRequest:
    """Prompts to complete; ``seeds[i]`` holds one seed per completion of prompt i."""

    weights: WeightsId
    sampling: SamplingSpec
    prompts: Sequence[np.ndarray]
    """int32 [P_i] each."""
    seeds: Sequence[Sequence[int]]
    refit: Literal["waits", "keeps_kv", "recomputes_kv"] = "waits"
    """What new weights do that come meanwhile: wait for the end; or are taken between two decoding steps, whose keys
    and values are kept or computed anew."""

    @property
    def sequences(self) -> int:
        """Number of completions asked for."""
        return sum(map(len, self.seeds))


@dataclass(frozen=True)
class _Head:
    """The small fields of a ``GenerateRequest``."""

    policy_version: int
    digest: str
    sampling: SamplingSpec
    refit: Literal["waits", "keeps_kv", "recomputes_kv"] = "waits"


@dataclass(frozen=True)
class _Update:
    """The fields of ``update_weights``."""

    policy_version: int
    digest: str
    manifest: str | None
    rendezvous: Rendezvous | None = None


class MessageReader:
    """Cuts what comes over a connection into messages: a line of JSON, and the bytes that follow it.

    Both may be as long as they like; aiohttp's ``readline`` refuses long lines.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._message: dict[str, Any] | None = None  # whose bytes have not all come yet

    def read(self, data: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The messages that are whole with these next bytes.

        Raises:
            WireError: a line that is no message.
        """
        self._rest += data
        while True:
            if self._message is None:
                line, newline, after = self._rest.partition(b"\n")
                if not newline:
                    if len(self._rest) > MAX_LINE:
                        raise WireError(f"{MAX_LINE >> 20} MiB came without the end of a line")
                    return
                self._message, self._rest = load_object(line), after
            message, size = self._message, binary_size(self._message)
            if len(self._rest) < size:
                return
            binary, self._rest, self._message = self._rest[:size], self._rest[size:], None
            yield message, binary


# ---------------------------------------------------------------- generate


def encode_request(request: GenerateRequest) -> bytes:
    """The body of ``generate``. The sampling spec goes field by field, whatever fields it has."""
    return dump_object(
        {
            **dataclasses.asdict(request.weights),
            "sampling": dataclasses.asdict(request.sampling),
            "prompts": [prompt.tolist() for prompt in request.prompts],
            "seeds": [list(row) for row in request.seeds],
            **({} if request.refit == "waits" else {"refit": request.refit}),
        }
    )


def decode_request(body: Mapping[str, Any], limits: Limits) -> GenerateRequest:
    """Check a body of ``generate`` to the last number: one bad request must not spoil the batch that it joins.

    Raises:
        WireError: names the field that is missing, unknown, or of a wrong type or size.
    """
    fields = dict(body)
    prompts = _rows(fields.pop("prompts", None), "prompts", limits.vocab_size, "a token id of the vocabulary")
    seeds = _rows(fields.pop("seeds", None), "seeds", MAX_SEED, "an integer from 0 to 2**63 - 1")
    require_all(SamplingSpec, fields.get("sampling"), "sampling")
    head = typed(_Head, fields)
    if len(seeds) != len(prompts):
        raise WireError(f"seeds: {len(seeds)} rows for {len(prompts)} prompts")
    _check_sampling(head.sampling, limits)
    longest = limits.max_sequence_tokens - head.sampling.max_new_tokens
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= longest:
            raise WireError(
                f"prompts[{i}]: {len(prompt)} tokens; with sampling.max_new_tokens={head.sampling.max_new_tokens} this "
                f"server takes 1 to {longest} (its rollout.max_concurrent_tokens is {limits.max_sequence_tokens})"
            )
    return GenerateRequest(
        WeightsId(head.policy_version, head.digest),
        head.sampling,
        [np.array(prompt, dtype=np.int32) for prompt in prompts],
        seeds,
        head.refit,
    )


def _check_sampling(sampling: SamplingSpec, limits: Limits) -> None:
    if sampling.temperature < 0:
        raise WireError(f"sampling.temperature={sampling.temperature}: must be 0 (greedy) or above")
    if not 0 < sampling.top_p <= 1:
        raise WireError(f"sampling.top_p={sampling.top_p}: must lie in (0, 1]")
    if not 0 <= sampling.min_new_tokens <= sampling.max_new_tokens or sampling.max_new_tokens < 1:
        raise WireError(
            f"sampling.min_new_tokens={sampling.min_new_tokens}, sampling.max_new_tokens={sampling.max_new_tokens}: "
            "0 <= min <= max with max >= 1 is needed"
        )
    if "" in sampling.stop_strings:
        raise WireError("sampling.stop_strings: an empty string would end every completion at once")
    for token in sampling.stop_token_ids:
        if not 0 <= token < limits.vocab_size:
            raise WireError(f"sampling.stop_token_ids: {token} lies outside the vocabulary of {limits.vocab_size}")


def _rows(value: Any, field: str, bound: int, wanted: str) -> list[list[int]]:
    """A list of lists of integers in [0, bound). Not through ``build``: there may be millions of them."""
    if not isinstance(value, list):
        raise WireError(f"{field}: a list of lists of integers is needed")
    for i, row in enumerate(value):
        if not isinstance(row, list):
            raise WireError(f"{field}[{i}]: a list of integers is needed")
        for k, number in enumerate(row):
            if type(number) is not int or not 0 <= number < bound:
                raise WireError(f"{field}[{i}][{k}]={str(number)[:40]}: {wanted} is needed")
    return value


# ---------------------------------------------------------------- completions


def encode_completion(
    i: int, j: int, completion: Completion, with_prompt: bool = True, served: Mapping[int, str] | None = None
) -> bytes:
    """A part of the answer to ``generate``, completion j of prompt i: a line, and its routes as bytes behind it.

    Args:
        with_prompt: the prompt's routes too. They are sent once, with the first of its completions that ends.
        served: digests of the weights by version, where weights changed meanwhile: the completion says which of them
            sampled how many of its tokens.
    """
    fields = {field.name: getattr(completion, field.name) for field in dataclasses.fields(completion)}
    routes: Routes | None = fields.pop("routes")
    del fields["versions"]
    plain: dict[str, Any] = {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in fields.items()
    }
    if served is not None:
        versions, tokens = np.unique(completion.token_versions, return_counts=True)  # which ascend
        plain["versions"] = [[v, served[v], n] for v, n in zip(versions.tolist(), tokens.tolist(), strict=True)]
    if routes is None:
        return dump_object({"i": i, "j": j, **plain})
    prompt = routes.prompt if with_prompt else routes.prompt[:0]
    counts = [len(prompt), *routes.completion.shape]
    return dump_object({"i": i, "j": j, **plain, "routes": counts}) + prompt.tobytes() + routes.completion.tobytes()


def binary_size(message: Mapping[str, Any]) -> int:
    """Bytes that follow the line of a message.

    Raises:
        WireError: it says something else than a completion's number of routes.
    """
    if "routes" not in message:
        return 0
    counts, tokens = message["routes"], message.get("token_ids")
    if not (isinstance(counts, list) and len(counts) == 4 and all(type(n) is int and 0 <= n < 2**31 for n in counts)):
        raise WireError(f"routes={str(counts)[:40]}: tokens of prompt and completion, layers and experts are needed")
    prompt, fed, layers, experts = counts
    if not isinstance(tokens, list) or fed != max(len(tokens) - 1, 0) or not layers * experts:
        raise WireError(f"routes={counts}: they are not those of a completion of its length")
    return (prompt + fed) * layers * experts


def decode_completion(
    message: Mapping[str, Any],
    binary: bytes = b"",
    prompts: dict[int, np.ndarray] | None = None,
    served: Mapping[int, str] | None = None,
    vocab_size: int = ANY_TOKEN,
) -> tuple[int, int, Completion]:
    """The reverse of ``encode_completion``.

    Args:
        vocab_size: token ids are below this.
        served: digests of all weights that the completion may have been sampled by, by version; None: the weights
            that were asked for, of which the caller has to see.
        binary: the ``binary_size`` bytes that followed the line.
        prompts: the prompts' routes by i, as far as they have come: grows, and serves a prompt's later completions.

    Raises:
        WireError: a field is missing, unknown or of a wrong type.
    """
    fields = dict(message)
    counts, parts = fields.pop("routes", None), fields.pop("versions", None)
    if (parts is None) != (served is None):
        raise WireError("versions: are there if, and only if, the request let weights change meanwhile")
    try:
        i, j = int(fields.pop("i")), int(fields.pop("j"))
        tokens = np.array(fields["token_ids"])
        if tokens.size and (tokens.dtype.kind != "i" or tokens.min() < 0 or tokens.max() >= vocab_size):
            raise ValueError(f"token_ids: integers from 0 to {vocab_size - 1} are needed")
        fields["token_ids"] = tokens.astype(np.int32)
        with np.errstate(over="ignore"):  # what is infinite then is refused as such (dispatch.py)
            fields["logprobs"] = np.array(fields["logprobs"], dtype=np.float32)
        completion = Completion(**fields)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise WireError(f"not a completion ({type(error).__name__}: {error})") from None
    if completion.token_ids.ndim != 1 or completion.token_ids.shape != completion.logprobs.shape:
        raise WireError(f"completion {i}, {j}: {completion.token_ids.shape} ids, {completion.logprobs.shape} logprobs")
    if served is not None:
        completion = dataclasses.replace(completion, versions=_versions(parts, completion, served))
    if counts is None:
        return i, j, completion
    prompts = {} if prompts is None else prompts
    routes = np.frombuffer(binary, np.uint8).reshape(-1, *counts[2:])
    if counts[0]:
        prompts[i] = routes[: counts[0]]
    if i not in prompts:
        raise WireError(f"completion {i}, {j}: the routes of its prompt did not come")
    return i, j, dataclasses.replace(completion, routes=Routes(prompts[i], routes[counts[0] :]))


def _versions(parts: Any, completion: Completion, served: Mapping[int, str]) -> np.ndarray | None:
    """int32 [T], the version that sampled each token; None if it is the same for all.

    Raises:
        WireError: they are not in order, do not make up the completion, or are of other weights.
    """
    try:
        versions = [int(version) for version, _, _ in parts]
        tokens = np.repeat(np.array(versions, np.int32), [int(count) for _, _, count in parts])
        digests = {version: digest for version, digest, _ in parts}
    except (TypeError, ValueError, OverflowError):
        raise WireError(f"versions={str(parts)[:80]}: a list of [version, digest, tokens] is needed") from None
    for version in versions:
        if served.get(version) != digests[version]:
            raise WireError(f"sampled by policy version {version} ({str(digests[version])[:8]}), of no use here")
    whole = len(tokens) == len(completion.token_ids) and versions == sorted(set(versions))
    if not whole or versions[:1] != [completion.policy_version][: len(versions)]:
        raise WireError(f"versions={str(parts)[:80]}: they are not those of {len(completion.token_ids)} tokens")
    return tokens if len(versions) > 1 else None


# ---------------------------------------------------------------- weights


def encode_weights(weights: Weights) -> bytes:
    """The body of ``update_weights``."""
    where = {"rendezvous": dataclasses.asdict(weights.rendezvous)} if weights.rendezvous else {}
    return dump_object({**dataclasses.asdict(weights.id), "manifest": weights.manifest, **where})


def decode_weights(body: Mapping[str, Any]) -> Weights:
    """The reverse of ``encode_weights``.

    Raises:
        WireError: as ``decode_request``.
    """
    update = typed(_Update, body)
    return Weights(WeightsId(update.policy_version, update.digest), update.manifest, rendezvous=update.rendezvous)


def encode_weights_id(weights: WeightsId) -> bytes:
    """What ``ready`` and ``update_weights`` answer with."""
    return dump_object(dataclasses.asdict(weights))


def decode_weights_id(body: Mapping[str, Any]) -> WeightsId:
    """The reverse of ``encode_weights_id``; what else ``ready`` says is left alone.

    Raises:
        WireError: as ``decode_request``.
    """
    return typed(WeightsId, {name: value for name, value in body.items() if name in ("policy_version", "digest")})
