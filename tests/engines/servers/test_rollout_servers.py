"""Real servers with the Megatron engine: the tokens of the in-process engine, whatever happens to the servers."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from nemo_aapo.engines.base import BackgroundEngine
from nemo_aapo.errors import RunError
from nemo_aapo.types import SamplingSpec
from tests.engines.servers.hosted import LONG, PROMPTS, SEEDS, SPEC, Engines, on_layout
from tests.servers import ask, wait_until_ready

pytestmark = pytest.mark.ranks  # the servers are ranks too


def _same_through_refits(words, directory, count, refit="files"):
    engines = Engines(words, f"rollout.remote.servers={count}", f"rollout.refit={refit}")
    engines.remote.store.bucket_bytes = 50_000
    collective = refit == "collective"
    base = engines.assert_same()
    assert isinstance(engines.remote, BackgroundEngine)
    assert not engines.remote.shares_weights
    ahead = engines.remote.start(PROMPTS, SPEC, SEEDS).result()
    assert [c.token_ids.tolist() for row in ahead for c in row] == [c.token_ids.tolist() for row in base for c in row]
    assert engines.remote.stats.tokens == engines.local.stats.tokens
    assert engines.remote.stats.tail_factor == engines.local.stats.tail_factor
    buckets = []
    for version in (1, 2):
        engines.train(version)
        later = engines.assert_same()
        assert any(a.token_ids.tobytes() != b.token_ids.tobytes() for a, b in zip(base[0], later[0], strict=True))
        if collective:
            assert engines.remote.refit_bytes == count * sum(p.nbytes for p in engines.local.model.parameters())
            continue
        folders = sorted((Path(directory) / "weights").iterdir())
        kept = range(1 if refit == "delta" else version, version + 1)  # the ones before are gone, unless it needs them
        assert [folder.name.partition("-")[0] for folder in folders] == [f"v{v}" for v in kept]
        assert engines.remote.refit_bytes == sum(file.stat().st_size for file in folders[-1].iterdir())
        buckets.append(len(list(folders[-1].glob("bucket_*"))))
    engines.assert_same(SamplingSpec(0.0, 48, (3,)))
    engines.remote.update_weights((), 0)  # the reference: nothing is written, the policy's stay
    reference = engines.remote.generate(PROMPTS, SPEC, SEEDS)
    assert [c.token_ids.tolist() for c in reference[0]] == [c.token_ids.tolist() for c in base[0]]
    assert {c.policy_version for row in reference for c in row} == {0}
    engines.remote.update_weights((), 2)
    assert (engines.remote.refit_bytes > 0) == collective  # which keeps no older version anywhere
    engines.assert_same()
    engines.remote.close()
    return buckets, list((Path(directory) / "weights").glob("*")), engines.said


def test_two_servers_draw_the_tokens_of_the_in_process_engine_also_after_refits(ranks, words, directory, two):
    ((buckets, left, said),) = ranks.run(_same_through_refits, words, directory, 2, tp=None)
    assert min(buckets) > 3
    assert left == said == []
    for index in (0, 1):
        counted = ask(directory, index, "/v1/metrics")[1]
        assert float(re.search(r"^rollout_tokens_total (\S+)$", counted, re.MULTILINE)[1]) > 100
        assert float(re.search(r"^rollout_policy_version (\S+)$", counted, re.MULTILINE)[1]) == 2
        assert float(re.search(r"^rollout_outstanding_completions (\S+)$", counted, re.MULTILINE)[1]) == 0


def test_one_server_draws_what_the_in_process_engine_draws_bit_for_bit_refitted_by_differences(
    ranks, words, directory, two
):
    two.processes[1].terminate()
    two.processes[1].join(120)
    assert two.processes[1].exitcode == 0
    ranks.run(_same_through_refits, words, directory, 1, "delta", tp=None)


def test_two_servers_that_the_trainers_ranks_send_weights_to_draw_its_tokens(ranks, words, directory, two):
    ((buckets, left, said),) = ranks.run(_same_through_refits, words, directory, 2, "collective", tp=None)
    assert buckets == left == said == []


def _killed_in_mid_refit(words, pid):
    """Kill a server once weights begin to flow; generate; and once more after it came back."""
    from nemo_aapo.engines.collective import sender

    engines = Engines(words, "rollout.remote.servers=2", "rollout.refit=collective", "rollout.remote.wait_s=60")
    engines.train(1)
    send = sender.Meeting.exchange
    with mock.patch.object(sender.Meeting, "exchange", lambda *args: (os.kill(pid, signal.SIGKILL), send(*args))[1]):
        engines.train(2)
    engines.assert_same()
    said = list(engines.said)
    engines.train(3)
    engines.assert_same()
    return said


def test_a_server_killed_in_the_middle_of_a_collective_refit_is_left_out_and_the_others_have_it(ranks, words, two):
    (said,) = ranks.run(_killed_in_mid_refit, words, two.processes[1].pid, tp=None)
    assert len(said) == 1
    assert "rollout server 1" in said[0]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 1)], ids=["tensor-parallel", "data-parallel"])
def test_all_ranks_get_what_one_of_them_asked_for(ranks, words, two, tp, pp):
    more = [f"model.tensor_model_parallel_size={tp}", "trainer.devices=2"]
    alone = ranks.run(on_layout, words)[0]
    more.append("rollout.refit=collective")  # and the servers, of one rank each, get what they got by files
    one, two_ = ranks.run(on_layout, [*words, *more], world=2, tp=tp, pp=pp)
    if tp == 2:
        assert one == two_  # the same completions, told in the same order
        assert (one[0], one[2]) == (alone[0], alone[2])
    else:
        assert one[0] == alone[0][0::2]
        assert two_[0] == alone[0][1::2]


# ---------------------------------------------------------------- servers in trouble


def _kill_in_mid_batch(words, pid, number, timeout_s):
    engines = Engines(words, "rollout.remote.servers=2", "rollout.remote.timeout_s=100")
    engines.train(1)
    engines.remote.fleet.timeout_s = timeout_s  # from here on, as the refit of both may take long
    engines.assert_same(LONG, on_finish=lambda count: count == 3 and os.kill(pid, number))
    said = list(engines.said)
    engines.assert_same()  # and from then on without it
    return said, engines.said


def test_kill_9_of_a_server_in_mid_batch_loses_nothing(ranks, words, directory, two):
    ((said, later),) = ranks.run(_kill_in_mid_batch, words, two.processes[0].pid, signal.SIGKILL, 100, tp=None)
    assert len(later) == len(said) == 1
    assert "rollout server 0 (http://127.0.0.1:" in said[0]
    two.processes[0].join(10)
    assert two.processes[0].exitcode == -signal.SIGKILL
    assert (directory / "server_0.json").exists()  # it had no chance to tidy up


def test_a_server_that_hangs_in_mid_batch_is_left_behind_and_its_late_answers_reach_nobody(ranks, words, two):
    pid = two.processes[1].pid
    try:
        ((said, later),) = ranks.run(_kill_in_mid_batch, words, pid, signal.SIGSTOP, 20, tp=None)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert len(later) == len(said) == 1
    assert "rollout server 1" in said[0]
    assert "said nothing for 20 s" in said[0]


def _restart_and_end(words, pipe_folder):
    """Generate with one server, wait for it to be replaced, generate again, wait for its end, fail."""
    engines = Engines(words, "rollout.remote.servers=2", "rollout.remote.timeout_s=100", "rollout.remote.wait_s=60")
    engines.train(1)
    engines.assert_same()
    for name in ("replaced", "ended"):
        (pipe_folder / f"{name}?").touch()
        while not (pipe_folder / name).exists():
            time.sleep(0.05)
        if name == "replaced":
            engines.assert_same()
    engines.remote.fleet.wait_s = 3.0  # for servers that do not come
    with pytest.raises(RunError) as error:
        engines.remote.generate(PROMPTS, SPEC, SEEDS)
    return str(error.value)


def test_a_replaced_server_takes_part_with_the_current_weights_and_none_left_is_an_error(
    ranks, words, directory, two, tmp_path
):
    def act():
        for name in ("replaced", "ended"):
            while not (tmp_path / f"{name}?").exists():
                time.sleep(0.05)
            for index in (0, 1):
                two.processes[index].kill()
                two.processes[index].join()
            if name == "replaced":
                two.start(1, words)
                wait_until_ready(directory, 1)
            (tmp_path / name).touch()

    actor = threading.Thread(target=act, daemon=True)
    actor.start()
    (message,) = ranks.run(_restart_and_end, words, tmp_path, tp=None)
    actor.join()
    assert message.count("can't be reached") == 2
    for index in (0, 1):
        assert f"server {index} (http://127.0.0.1:" in message
