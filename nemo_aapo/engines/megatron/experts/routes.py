"""The experts that each token was sent to, kept while sequences run, for the learner to send it to the same ones.

Prompts are prefilled once for all their completions, and so are their routes kept once. Each pipeline stage records its
own layers; they are joined when a prompt has been prefilled, and when completions end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemo_aapo.distributed import parallel
from nemo_aapo.engines.megatron.scheduler import Admission, Scheduler
from nemo_aapo.engines.megatron.speculation import Feed
from nemo_aapo.types import NO_ROUTE, Routes


class RouteRecorder:
    """The routes of one ``generate`` call's sequences, by the rows of its ``Scheduler``."""

    def __init__(self, scheduler: Scheduler, layers: int, per_token: int) -> None:
        """
        Args:
            layers: of this stage. per_token: experts that a token is sent to.
        """
        self._scheduler, self._width = scheduler, (layers, per_token)
        # Memory that no token has reached yet takes no space.
        self._routes = np.zeros((*scheduler.tokens.shape, layers, per_token), np.uint8)
        self._prompts: dict[int, np.ndarray] = {}  # uint8 [P, all layers, k] by prompt

    def record(
        self,
        chosen: Sequence[Tensor],
        feed: Feed,
        accepted: np.ndarray,
        prefills: Sequence[Admission],
        lengths: Sequence[int],
    ) -> None:
        """Take the experts of one forward pass, before its tokens are recorded in the scheduler.

        Args:
            chosen: int64 [T, k] for each layer of this stage; for the last layer of the model [logits, k].
            feed: what went through it; drafts that were not accepted have no routes.
            accepted: int64 [running], how many tokens each row gets of it.
            lengths: tokens of the prompts that were prefilled.
        """
        decoding = len(feed.tokens)
        tokens = decoding + sum(lengths)
        routes = np.full((tokens, *self._width), NO_ROUTE, np.uint8)
        packed = torch.cat([experts.to(torch.uint8) for experts in chosen]).cpu().numpy()
        layers = np.split(packed, np.cumsum([len(experts) for experts in chosen])[:-1])
        ends = decoding + np.cumsum(lengths, dtype=np.int64) - 1
        narrowed = len(layers) - 1 if prefills and parallel.is_last_stage() else None
        for layer, experts in enumerate(layers):
            if layer != narrowed:
                routes[:, layer] = experts
            else:  # of a prompt, only the last token went on; the first of the prompt's rows stands for all
                routes[:decoding, layer] = experts[:decoding]
                routes[ends, layer] = experts[feed.at(np.array([admission.start for admission in prefills]), 0)]
        rows, offsets = feed.rows[:decoding], feed.offsets[:decoding]
        places = self._scheduler.sampled[rows] + offsets - 1
        # A row that decodes its prompt's last token once more (``Admission.prefill``) has its route already.
        taken = np.flatnonzero((offsets < accepted[rows]) & (places >= 0))
        self._routes[rows[taken], places[taken]] = routes[taken]
        if prefills:
            joined = _all_stages(routes[decoding:])
            for admission, prompt in zip(prefills, np.split(joined, np.cumsum(lengths)[:-1]), strict=True):
                self._prompts[admission.prompt] = prompt

    def ended(self, rows: np.ndarray) -> list[Routes]:
        """The routes of sequences that have ended; the last token of each was never fed, and has none."""
        fed = self._scheduler.sampled[rows] - 1
        joined = _all_stages(np.concatenate([self._routes[row, :count] for row, count in zip(rows, fed, strict=True)]))
        parts = np.split(joined, np.cumsum(fed)[:-1])
        prompts = [self._prompts[int(i)] for i in self._scheduler.prompt[rows]]
        return [Routes(prompt, part) for prompt, part in zip(prompts, parts, strict=True)]

    def move(self, source: np.ndarray, target: np.ndarray, tokens: int) -> None:
        """Copy the first ``tokens`` of the source rows to the target rows."""
        self._routes[target, :tokens] = self._routes[source, :tokens]


def _all_stages(routes: np.ndarray) -> np.ndarray:
    """uint8 [T, layers of this stage, k] -> [T, layers of all stages, k], on every stage. Collective."""
    stages = parallel.pipeline_parallel_size()
    if stages == 1 or not len(routes):
        return routes if stages == 1 else np.repeat(routes, stages, axis=1)
    own = torch.from_numpy(np.ascontiguousarray(routes))
    everyone = [torch.empty_like(own) for _ in range(stages)]
    dist.all_gather(everyone, own, group=parallel.groups().pipeline)
    return torch.cat(everyone, dim=1).numpy()
