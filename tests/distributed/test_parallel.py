"""Collectives of the loop: what they promise beyond torch's."""

from __future__ import annotations


def _heard(model):
    """On each rank: the result, how often the action ran here, how many broadcasts there were."""
    import time
    from unittest import mock

    import torch.distributed as dist

    from nemo_aapo.distributed import parallel

    ran = []

    def action():
        ran.append(parallel.rank())
        while broadcasts.call_count <= 5:
            time.sleep(0.01)
        return "done"

    with (
        mock.patch.object(parallel, "BEAT_S", 0.05),
        mock.patch.object(dist, "broadcast_object_list", side_effect=dist.broadcast_object_list) as broadcasts,
    ):
        return parallel.broadcast_when_done(action), len(ran), broadcasts.call_count


def test_ranks_that_wait_for_their_source_hear_from_it_meanwhile(ranks, tiny_models):
    source, other = ranks.run(_heard, tiny_models["qwen2"], world=2, tp=2)
    assert (source[0], other[0]) == ("done", "done")
    assert (source[1], other[1]) == (1, 0)
    assert source[2] == other[2] > 5  # and not one, whose timeout would be the longest rollout
