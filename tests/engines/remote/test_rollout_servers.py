"""Real servers with the Megatron engine: the tokens of the in-process engine, whatever happens to the servers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from nemo_aapo.config.compose import load_config
from nemo_aapo.engines.base import BackgroundEngine
from nemo_aapo.engines.remote import wire
from nemo_aapo.errors import RunError
from nemo_aapo.launch.world import Machine, decide
from nemo_aapo.types import SamplingSpec
from tests.servers import Servers, ask, wait_until_ready
from tests.training_runs import make_input, settings

pytestmark = pytest.mark.ranks  # the servers are ranks too

SPEC = SamplingSpec(temperature=0.9, max_new_tokens=48, stop_token_ids=(3, 7), min_new_tokens=2)
PROMPTS = [np.random.default_rng(n).integers(2, 150, n).astype(np.int32) for n in (3, 19, 1, 8, 8, 13)]
SEEDS = [[1000 * i + j for j in range(size)] for i, size in enumerate((6, 4, 7, 1, 0, 7))]
LONG = SamplingSpec(temperature=1.0, max_new_tokens=200, stop_token_ids=(3,))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = make_input(tmp_path_factory.mktemp("servers"))
    return settings(
        folder,
        folder / "run",
        "rollout.engine=remote",
        "rollout.remote.wait_s=30",
        "rollout.max_concurrent_tokens=2200",
    )


@pytest.fixture(scope="module")
def directory(words):
    return Path(load_config(words).rollout.remote.directory)


@pytest.fixture(scope="module")
def servers(words, directory):
    """Servers 0 and 1 of the module; tests may kill them and start them anew."""
    started = Servers(directory)
    for index in (0, 1):
        started.start(index, words)
    yield started
    started.close()


@pytest.fixture
def two(servers, words, directory):
    """Both running and ready."""
    for index in (0, 1):
        if not servers.processes[index].is_alive():
            servers.start(index, words)
        wait_until_ready(directory, index)
    return servers


class Engines:
    """The in-process engine and the remote one, on the same weights."""

    def __init__(self, words, *more):
        import torch

        from nemo_aapo.engines.build import build_hosted_engine, build_sender
        from nemo_aapo.engines.megatron.engine import MegatronEngine
        from nemo_aapo.engines.remote.engine import RemoteEngine
        from nemo_aapo.mcore.bridge.weights import WeightMap
        from nemo_aapo.models import directory as model_dir

        config = decide(load_config([*words, *more]), Machine.present())
        hosted = build_hosted_engine(config, model_dir.read_model_dir(config.model.path))
        self.local: MegatronEngine = hosted.engine
        shape = model_dir.read_model_dir(config.model.path)
        self.map = WeightMap(config.model.path, torch.float32)
        sender = build_sender(config, hosted.engine.model, shape.vocab_size, self.exported)
        self.remote = RemoteEngine.from_config(config, sender)
        self.tolerance = 0.0 if config.rollout.remote.servers == 1 else 1e-5
        self.said: list[str] = []
        self.remote.fleet._log = self.said.append

    def train(self, version):
        """New weights, as after an optimizer step, on both."""
        import torch

        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in self.local.model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        self.local.update_weights((), version)
        self.remote.update_weights(self.exported(), version)

    def exported(self):
        return self.map.export(self.local.model)

    def assert_same(self, spec=SPEC, seeds=SEEDS, on_finish=None):
        """Both draw the same tokens, and log-probs up to what batches of another size round otherwise; each completion
        is told once. Returns what the remote one drew."""
        wanted = self.local.generate(PROMPTS, spec, seeds)
        told = []

        def tell(i, j, completion):
            told.append((i, j))
            if on_finish is not None:
                on_finish(len(told))

        got = self.remote.generate(PROMPTS, spec, seeds, tell)
        assert sorted(told) == [(i, j) for i, row in enumerate(seeds) for j in range(len(row))]
        for row, wanted_row in zip(got, wanted, strict=True):
            for one, other in zip(row, wanted_row, strict=True):
                assert one.token_ids.tobytes() == other.token_ids.tobytes()
                np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=self.tolerance)
                assert (one.finish_reason, one.policy_version) == (other.finish_reason, other.policy_version)
        return got


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


def _on_layout(words):
    """On each rank: what it was given and told. Data-parallel ranks ask for shares of their own.

    Each rank meets another server first.
    """
    from nemo_aapo.distributed import parallel
    from nemo_aapo.engines.build import build_sender
    from nemo_aapo.engines.collective import sender
    from nemo_aapo.engines.remote.engine import RemoteEngine
    from tests.policies import make_policy

    meet = sender.meet

    def meets(*words, server: int, **more):
        time.sleep(0.3 * ((server + parallel.rank()) % 2))
        return meet(*words, server=server, **more)

    config = load_config(words)
    policy = make_policy(config)
    sends = build_sender(config, policy.module, policy.shape.vocab_size, policy.named_weights)
    remote = RemoteEngine.from_config(config, sends)
    for parameter in policy.module.parameters():
        parameter.data.mul_(1.1)
    with mock.patch.object(sender, "meet", meets):
        remote.update_weights(policy.named_weights(), 3)
    told = []
    part = slice(parallel.data_parallel_rank(), None, parallel.data_parallel_size())
    drawn = remote.generate(PROMPTS[part], SPEC, SEEDS[part], lambda i, j, c: told.append((i, j)))
    parallel.barrier()
    remote.close()
    return [[c.token_ids.tolist() for c in row] for row in drawn], told, remote.stats.tokens


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 1)], ids=["tensor-parallel", "data-parallel"])
def test_all_ranks_get_what_one_of_them_asked_for(ranks, words, two, tp, pp):
    more = [f"model.tensor_model_parallel_size={tp}", "trainer.devices=2"]
    alone = ranks.run(_on_layout, words)[0]
    more.append("rollout.refit=collective")  # and the servers, of one rank each, get what they got by files
    one, two_ = ranks.run(_on_layout, [*words, *more], world=2, tp=tp, pp=pp)
    if tp == 2:
        assert one == two_  # the same completions, told in the same order
        assert (one[0], one[2]) == (alone[0], alone[2])
    else:
        assert one[0] == alone[0][0::2]
        assert two_[0] == alone[0][1::2]


# ---------------------------------------------------------------- servers in trouble


def _kill_in_mid_batch(words, pid, number, timeout_s):
    engines = Engines(words, "rollout.remote.servers=2", f"rollout.remote.timeout_s={timeout_s}")
    engines.train(1)
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
        ((said, later),) = ranks.run(_kill_in_mid_batch, words, pid, signal.SIGSTOP, 6, tp=None)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert len(later) == len(said) == 1
    assert "rollout server 1" in said[0]
    assert "said nothing for 6 s" in said[0]


def _restart_and_end(words, pipe_folder):
    """Generate with one server, wait for it to be replaced, generate again, wait for its end, fail."""
    engines = Engines(words, "rollout.remote.servers=2", "rollout.remote.timeout_s=100", "rollout.remote.wait_s=3")
    engines.train(1)
    engines.assert_same()
    for name in ("replaced", "ended"):
        (pipe_folder / f"{name}?").touch()
        while not (pipe_folder / name).exists():
            time.sleep(0.05)
        if name == "replaced":
            engines.assert_same()
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

    actor = threading.Thread(target=act)
    actor.start()
    (message,) = ranks.run(_restart_and_end, words, tmp_path, tp=None)
    actor.join()
    assert message.count("can't be reached") == 2
    for index in (0, 1):
        assert f"server {index} (http://127.0.0.1:" in message


# ---------------------------------------------------------------- what is asked of a server


def generate_body(directory, **changes) -> bytes:
    has = ask(directory, 0, "/v1/ready")[1]
    request = wire.GenerateRequest(wire.decode_weights_id(has), SPEC, PROMPTS[:1], [[1, 2]])
    return json.dumps({**json.loads(wire.encode_request(request)), **changes}).encode()


def test_a_wrong_token_is_401_everywhere_and_says_nothing_else(two, directory):
    for path, body in (("ready", None), ("metrics", None), ("generate", b"{}"), ("update_weights", b"{}")):
        for token in ("", "x" * 43, "\xe4"):
            status, answer = ask(directory, 0, f"/v1/{path}", body, token=token)
            assert (status, answer["reason"]) == (401, "token")
    assert ask(directory, 0, "/v1/health", token="")[0] == 200


def test_a_body_of_100_mb_is_refused_without_being_kept(two, directory):
    def peak() -> int:
        status = Path(f"/proc/{two.processes[0].pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

    before, body = peak(), b"[" + b"1," * 50_000_000 + b"1]"
    for status, answer in (ask(directory, 0, "/v1/generate", body), ask(directory, 0, "/v1/update_weights", body)):
        assert status == 413
        assert "rollout.server.max_request_bytes is 16777216" in answer["error"]
    assert chunked(directory, body) == 413  # nobody said how long it would be
    assert peak() - before < 60_000
    assert ask(directory, 0, "/v1/generate", generate_body(directory))[0] == 200


def chunked(directory, body: bytes) -> int:
    """The status of a request that is sent piece by piece."""
    import http.client

    address = json.loads((directory / "server_0.json").read_text())["address"]
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    token = (directory / "token").read_text().strip()
    pieces = (body[k : k + 2**20] for k in range(0, len(body), 2**20))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it does not read to the end
        connection.request("POST", "/v1/generate", pieces, {"Authorization": f"Bearer {token}"})
    return connection.getresponse().status


@pytest.mark.parametrize("body", [b"", b"{", b"\x00\xff", b"[]", b"{}", b"[" * 10_000])
def test_garbage_is_400_with_a_reason_and_never_a_traceback(two, directory, body):
    for path in ("generate", "update_weights"):
        status, answer = ask(directory, 0, f"/v1/{path}", body)
        assert (status, answer["reason"]) == (400, "request")
        assert "Traceback" not in answer["error"]
    assert "Traceback" not in two.log(0).read_text()


def test_a_wrong_field_is_named_and_another_policy_version_is_409(two, directory):
    status, answer = ask(directory, 0, "/v1/generate", generate_body(directory, prompts=[[151, 160]]))
    assert status == 400
    assert "prompts[0][1]=160" in answer["error"]
    for change in ({"policy_version": 77}, {"digest": "0" * 64}):
        status, answer = ask(directory, 0, "/v1/generate", generate_body(directory, **change))
        assert (status, answer["reason"]) == (409, "other_weights")
    assert ask(directory, 0, "/v2/generate", b"{}")[0] == 404
    assert ask(directory, 0, "/v1/generate")[0] == 405


# ---------------------------------------------------------------- refits that fail


def _write_versions(words, folder):
    """Versions in a directory of their own: 1 is whole, 2 lacks a tensor, one of 3 has another shape."""
    import torch

    from nemo_aapo.engines.remote.weight_store import WeightStore

    engines = Engines(words)
    from nemo_aapo.mcore.bridge.weights import WeightMap

    path = engines.remote.store.config.parent
    exported = dict(WeightMap(str(path), torch.float32).export(engines.local.model))
    store = WeightStore(folder, str(path))
    whole = store.write([(name, 1.1 * tensor) for name, tensor in exported.items()], 1)
    last = [name for name in exported if "layers.1.mlp.down_proj" in name]
    assert len(last) == 1
    lacking = store.write([item for item in exported.items() if item[0] not in last], 2)
    misshapen = store.write({**exported, last[0]: torch.zeros(3, 3)}.items(), 3)
    return [wire.encode_weights(weights) for weights in (whole, lacking, misshapen)]


def test_a_damaged_refit_leaves_what_was_served_and_a_half_loaded_one_serves_nothing(
    ranks, words, directory, two, tmp_path
):
    whole, lacking, misshapen = ranks.run(_write_versions, words, tmp_path, tp=None)[0]
    shutil.rmtree(directory / "weights", ignore_errors=True)
    shutil.copytree(tmp_path / "weights", directory / "weights")
    before = ask(directory, 0, "/v1/ready")
    (bucket,) = (directory / Path(json.loads(whole)["manifest"]).parent).glob("bucket_*")
    size = bucket.stat().st_size
    os.truncate(bucket, size // 2)
    status, answer = ask(directory, 0, "/v1/update_weights", whole)
    assert (status, answer["reason"]) == (422, "weights")
    assert bucket.name in answer["error"]
    status, answer = ask(directory, 0, "/v1/update_weights", lacking)
    assert (status, answer["reason"]) == (422, "weights")
    assert "layers.1.mlp.down_proj" in answer["error"]
    assert ask(directory, 0, "/v1/ready") == before
    assert ask(directory, 0, "/v1/generate", generate_body(directory))[0] == 200

    asks = generate_body(directory)
    status, answer = ask(directory, 0, "/v1/update_weights", misshapen)
    assert status == 500
    assert "policy version 3" in answer["error"]
    assert "Traceback" not in answer["error"]
    assert ask(directory, 0, "/v1/ready")[0] == 503
    assert ask(directory, 0, "/v1/generate", asks)[0] == 503

    shutil.copyfile(tmp_path / "weights" / bucket.parent.name / bucket.name, bucket)
    assert ask(directory, 0, "/v1/update_weights", whole)[0] == 200
    assert ask(directory, 0, "/v1/ready")[1]["policy_version"] == 1
    assert ask(directory, 0, "/v1/generate", generate_body(directory))[0] == 200
    for manifest in ("/etc/passwd", "weights/../../x/manifest.json"):
        body = json.dumps({**json.loads(lacking), "manifest": manifest}).encode()
        assert ask(directory, 0, "/v1/update_weights", body)[0] == 400


def _refit_on_a_full_disk(words):
    """On both ranks: the error while rank 0's files may not grow beyond 20 kB, and that all went on."""
    import resource

    from nemo_aapo.distributed import parallel
    from nemo_aapo.engines.remote.engine import RemoteEngine
    from tests.policies import make_policy

    config = load_config(words)
    remote = RemoteEngine.from_config(config)
    policy = make_policy(config)
    remote.update_weights(policy.named_weights(), 1)
    before = remote.generate(PROMPTS, SPEC, SEEDS)
    for parameter in policy.module.parameters():
        parameter.data.mul_(1.1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if parallel.rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(RunError) as error:
            remote.update_weights(policy.named_weights(), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    drawn = [remote.generate(PROMPTS, SPEC, SEEDS)]
    remote.update_weights(policy.named_weights(), 2)
    drawn.append(remote.generate(PROMPTS, SPEC, SEEDS))
    parallel.barrier()
    remote.close()
    versions = [{c.policy_version for row in rows for c in row} for rows in drawn]
    same = all(a.token_ids.tobytes() == b.token_ids.tobytes() for a, b in zip(before[0], drawn[0][0], strict=True))
    return str(error.value), same, versions


def test_a_disk_that_is_full_during_a_refit_is_an_error_on_all_ranks_and_the_version_before_stays(ranks, words, two):
    more = ["model.tensor_model_parallel_size=2", "trainer.devices=2"]
    for message, same, versions in ranks.run(_refit_on_a_full_disk, [*words, *more], world=2, tp=2):
        assert "policy version 2 can't be written" in message
        assert "MiB free" in message
        assert same
        assert versions == [{1}, {2}]


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_mid_batch_ends_a_server_with_0_and_takes_its_announcement_back(two, words, directory, number):
    seeds = [list(range(40))] * len(PROMPTS)
    has = wire.decode_weights_id(ask(directory, 0, "/v1/ready")[1])
    body = wire.encode_request(wire.GenerateRequest(has, LONG, PROMPTS, seeds))
    answers = []
    asker = threading.Thread(target=lambda: answers.append(ask(directory, 0, "/v1/generate", body)))
    asker.start()
    while "rollout_outstanding_completions 0.0" in ask(directory, 0, "/v1/metrics")[1]:
        time.sleep(0.02)
    os.kill(two.processes[0].pid, number)
    two.processes[0].join(120)
    asker.join(120)
    assert two.processes[0].exitcode == 0
    assert not (directory / "server_0.json").exists()
    assert f"stopping: {number.name}" in two.log(0).read_text()
    ((status, answer),) = answers
    lines = answer.splitlines() if status == 200 else [json.dumps(answer)]
    assert json.loads(lines[-1])["reason"] == "stopping"
    assert len(lines) < 240


def test_a_client_that_goes_away_takes_its_work_with_it(two, directory):
    has = wire.decode_weights_id(ask(directory, 0, "/v1/ready")[1])
    body = wire.encode_request(wire.GenerateRequest(has, LONG, PROMPTS, [list(range(100))] * len(PROMPTS)))
    address = json.loads((directory / "server_0.json").read_text())["address"].removeprefix("http://")
    token = (directory / "token").read_text().strip()
    with socket.create_connection(address.split(":"), timeout=10) as connection:
        head = f"POST /v1/generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Length: {len(body)}"
        connection.sendall(f"{head}\r\n\r\n".encode() + body)
        assert b"200 OK" in connection.recv(100)  # so the first completion is there
    end = time.monotonic() + 120
    while "rollout_outstanding_completions 0.0" not in (text := ask(directory, 0, "/v1/metrics")[1]):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert int(re.search(r"^rollout_completions_total\S+ (\d+)", text, re.MULTILINE)[1]) < 500
