"""Rollouts made and not yet trained on, as the content of one file of a checkpoint.

NumPy's npz of plain arrays (nothing is pickled): completions one after the other, with their lengths. Prompts are
named by their position in the steps, as a resumed run has the same prompts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np

from nemo_aapo.errors import DamagedCheckpointError
from nemo_aapo.types import Completion, Group, Prompt, Routes

FILE_NAME = "rollouts.npz"


def pack(groups: Sequence[Group]) -> bytes:
    """The file for the scored groups of the steps to come: all of them, in the order of the steps' prompts.

    Reference rewards and advantages are left out: they are worked out when the step comes.
    """
    completions = [completion for group in groups for completion in group.completions]
    texts = [text.encode("utf-8", "surrogatepass") for group in groups for text in group.texts]
    names = list(groups[0].reward_parts)
    routes = [completion.routes for completion in completions]
    arrays = {
        "group_sizes": np.array([len(group.completions) for group in groups]),
        "prompts": _strings([group.prompt.id.encode() for group in groups]),
        "lengths": np.array([len(completion.token_ids) for completion in completions]),
        "token_ids": np.concatenate([completion.token_ids for completion in completions]),
        "logprobs": np.concatenate([completion.logprobs for completion in completions]),
        "stopped": np.array([completion.finish_reason == "stop" for completion in completions]),
        "policy_versions": np.array([completion.policy_version for completion in completions]),
        **_packed_versions(completions),
        "text_lengths": np.array([len(text) for text in texts]),
        "texts": np.frombuffer(b"".join(texts), np.uint8),
        "rewards": np.concatenate([group.rewards for group in groups]),
        "failed": np.concatenate([group.failed for group in groups]),
        "reward_names": _strings([name.encode() for name in names]),
        **{f"reward_{i}": np.concatenate([g.reward_parts[name] for g in groups]) for i, name in enumerate(names)},
        **(_packed_routes(groups) if routes and None not in routes else {}),
    }
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def count(content: bytes) -> int:
    """How many groups a file holds."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return len(arrays["group_sizes"])


def prompt_ids(content: bytes) -> list[str]:
    """The ids of the prompts of the groups that a file holds."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return [name.decode() for name in _unstrings(arrays["prompts"])]


def unpack(content: bytes, prompts: Sequence[Prompt]) -> list[Group]:
    """The groups again, equal to the bit.

    Args:
        content: what ``pack`` made; its checksum was verified.
        prompts: of the steps that the groups belong to.

    Raises:
        DamagedCheckpointError: the groups belong to other prompts.
    """
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        of = {name: arrays[name] for name in arrays.files}
    if _unstrings(of["prompts"]) != [prompt.id.encode() for prompt in prompts]:
        raise DamagedCheckpointError(f"{FILE_NAME} holds rollouts of other prompts than the next steps'")
    token_ids, logprobs = (_split(of[name], of["lengths"]) for name in ("token_ids", "logprobs"))
    texts = [part.tobytes().decode("utf-8", "surrogatepass") for part in _split(of["texts"], of["text_lengths"])]
    names = [name.decode() for name in _unstrings(of["reward_names"])]
    routes, versions = _unpacked_routes(of), _unpacked_versions(of)
    groups, first = [], 0
    for prompt, size in zip(prompts, of["group_sizes"], strict=True):
        mine = slice(first, first + int(size))
        completions = tuple(
            Completion(
                token_ids[k],
                logprobs[k],
                "stop" if of["stopped"][k] else "length",
                int(of["policy_versions"][k]),
                routes[k],
                versions[k],
            )
            for k in range(mine.start, mine.stop)
        )
        groups.append(
            Group(
                prompt=prompt,
                completions=completions,
                texts=tuple(texts[mine]),
                rewards=of["rewards"][mine],
                reward_parts={name: of[f"reward_{i}"][mine] for i, name in enumerate(names)},
                failed=of["failed"][mine],
            )
        )
        first = mine.stop
    return groups


def _packed_routes(groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """The routes of completions that all have some; those of their prompt once for each group."""
    own = [[c.routes for c in group.completions if c.routes is not None] for group in groups]
    return {
        "prompt_lengths": np.array([len(row[0].prompt) if row else 0 for row in own]),
        "prompt_routes": np.concatenate([row[0].prompt for row in own if row]),
        "routes": np.concatenate([routes.completion for row in own for routes in row]),
    }


def _unpacked_routes(of: Mapping[str, np.ndarray]) -> list[Routes | None]:
    """The routes of each completion; None where the file has none."""
    if "routes" not in of:
        return [None] * len(of["lengths"])
    prompts = _split(of["prompt_routes"], of["prompt_lengths"])
    fed = _split(of["routes"], np.maximum(of["lengths"] - 1, 0))
    groups = np.repeat(np.arange(len(prompts)), of["group_sizes"])
    return [Routes(prompts[group], part) for group, part in zip(groups, fed, strict=True)]


def _packed_versions(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
    """The versions of each token, where some completion has several."""
    if all(completion.versions is None for completion in completions):
        return {}
    return {"token_versions": np.concatenate([completion.token_versions for completion in completions])}


def _unpacked_versions(of: Mapping[str, np.ndarray]) -> list[np.ndarray | None]:
    """The versions of each completion's tokens; None where it has one."""
    if "token_versions" not in of:
        return [None] * len(of["lengths"])
    parts = _split(of["token_versions"], of["lengths"])
    return [part if len(part) and part[0] != part[-1] else None for part in parts]


def _split(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(flat, np.cumsum(lengths)[:-1])


def _strings(items: Sequence[bytes]) -> np.ndarray:
    """uint8: newline-separated; prompt digests and reward names hold no newline."""
    return np.frombuffer(b"\n".join(items), np.uint8)


def _unstrings(array: np.ndarray) -> list[bytes]:
    return array.tobytes().split(b"\n") if len(array) else []
