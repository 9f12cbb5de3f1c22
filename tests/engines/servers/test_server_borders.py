"""What real servers make of foreign bodies, damaged weights, signals and clients that go away."""

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

import pytest

from nemo_aapo.config.compose import load_config
from nemo_aapo.engines.remote import wire
from nemo_aapo.errors import RunError
from tests.engines.servers.hosted import LONG, PROMPTS, SEEDS, SPEC, Engines
from tests.servers import ask

pytestmark = pytest.mark.ranks  # the servers are ranks too


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
