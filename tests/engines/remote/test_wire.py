"""What crosses the wire comes out as it went in; what is wrong is refused by the name of its field."""

from __future__ import annotations

import dataclasses
import gc
import json
import random

import numpy as np
import pytest

from nemo_aapo.engines.messages import dump_object, load_object
from nemo_aapo.engines.remote import wire
from nemo_aapo.errors import WireError
from nemo_aapo.types import Completion, Routes, SamplingSpec

LIMITS = wire.Limits(vocab_size=150, max_sequence_tokens=64)
SPEC = SamplingSpec(temperature=0.7, max_new_tokens=24, stop_token_ids=(3, 149), min_new_tokens=2, top_p=0.9)
BODY = {
    "policy_version": 3,
    "digest": "ab",
    "sampling": dataclasses.asdict(SPEC),
    "prompts": [[1, 2], [149]],
    "seeds": [[0, 2**63 - 1], []],
}


def test_every_float32_log_prob_survives_bit_for_bit():
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    logprobs = bits.view(np.float32)
    logprobs = np.append(logprobs[np.isfinite(logprobs)], np.float32([0.0, -0.0, 1e-45, 3.4028235e38]))
    sent = Completion(np.arange(len(logprobs), dtype=np.int32), logprobs, "stop", 7)
    line = wire.encode_completion(4, 2, sent)
    assert line.count(b"\n") == 1
    i, j, got = wire.decode_completion(load_object(line))
    assert (i, j, got.finish_reason, got.policy_version) == (4, 2, "stop", 7)
    assert got.logprobs.tobytes() == sent.logprobs.tobytes()
    assert got.token_ids.dtype == np.int32
    np.testing.assert_array_equal(got.token_ids, sent.token_ids)


def routed(prompt: np.ndarray, length: int) -> Completion:
    """A completion of so many tokens of a mixture of experts with 3 layers and 2 choices."""
    fed = np.random.default_rng(length).integers(0, 256, (max(length - 1, 0), 3, 2)).astype(np.uint8)
    return Completion(np.arange(length, dtype=np.int32), np.zeros(length, np.float32), "stop", 7, Routes(prompt, fed))


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_routes_follow_their_line_as_bytes_and_those_of_a_prompt_come_once(size):
    """However the connection cuts them: a newline among the bytes ends no line."""
    prompts = [np.full((4, 3, 2), ord("\n"), np.uint8), np.full((2, 3, 2), 255, np.uint8)]
    sent = [(0, 1, routed(prompts[0], 5)), (1, 0, routed(prompts[1], 1)), (0, 0, routed(prompts[0], 0))]
    parts = [wire.encode_completion(*sent[0]), wire.encode_completion(*sent[1])]
    data = b"".join([*parts, wire.encode_completion(*sent[2], with_prompt=False), dump_object({"done": 3})])
    reader, memory, got = wire.MessageReader(), {}, []
    for start in range(0, len(data), size):
        for message, binary in reader.read(data[start : start + size]):
            got.append(message if "done" in message else wire.decode_completion(message, binary, memory))
    assert got.pop() == {"done": 3}
    for (i, j, expected), (i_got, j_got, completion) in zip(sent, got, strict=True):
        assert (i_got, j_got) == (i, j)
        np.testing.assert_array_equal(completion.routes.prompt, expected.routes.prompt)
        np.testing.assert_array_equal(completion.routes.completion, expected.routes.completion)
    assert got[0][2].routes.prompt is got[2][2].routes.prompt


@pytest.mark.parametrize("counts", [None, [4, 4, 3], [4, 3, 3, 2], [4, 4, 0, 2], [-1, 4, 3, 2], [4.0, 4, 3, 2]])
def test_routes_of_another_number_than_the_completions_tokens_are_refused(counts):
    with pytest.raises(WireError, match="routes="):
        wire.binary_size({"routes": counts, "token_ids": [1] * 5})


def test_a_completion_whose_prompts_routes_never_came_is_refused():
    reader = wire.MessageReader()
    line = wire.encode_completion(0, 0, routed(np.zeros((4, 3, 2), np.uint8), 3), with_prompt=False)
    ((message, binary),) = reader.read(line)
    with pytest.raises(WireError, match="routes of its prompt"):
        wire.decode_completion(message, binary, {})


def test_a_request_survives_with_every_field_of_the_sampling_spec():
    prompts = [np.array([1, 2], np.int32), np.array([149], np.int32)]
    sent = wire.GenerateRequest(wire.WeightsId(3, "ab"), SPEC, prompts, [[0, 2**63 - 1], []])
    got = wire.decode_request(load_object(wire.encode_request(sent)), LIMITS)
    assert (got.weights, got.sampling, got.seeds) == (sent.weights, sent.sampling, sent.seeds)
    assert [prompt.tolist() for prompt in got.prompts] == BODY["prompts"]
    assert json.loads(wire.encode_request(sent)) == json.loads(json.dumps(BODY))


def changed(path: str, value) -> dict:
    body = json.loads(json.dumps(BODY))
    *parents, last = path.split(".")
    place = body
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(last) if isinstance(place, list) else last] = value
    return body


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("prompts", None, "prompts"),
        ("prompts.0", "text", r"prompts\[0\]"),
        ("prompts.0", [], r"prompts\[0\]: 0 tokens"),
        ("prompts.0", [1] * 41, r"prompts\[0\]: 41 tokens.*1 to 40"),
        ("prompts.1.0", 150, r"prompts\[1\]\[0\]=150"),
        ("prompts.1.0", -1, r"prompts\[1\]\[0\]"),
        ("prompts.1.0", True, r"prompts\[1\]\[0\]"),
        ("prompts.1.0", 1.0, r"prompts\[1\]\[0\]"),
        ("seeds", [[1]], "seeds: 1 rows for 2 prompts"),
        ("seeds.0.1", 2**63, r"seeds\[0\]\[1\]"),
        ("sampling", 3, "sampling"),
        ("sampling.temperature", "hot", "sampling.temperature"),
        ("sampling.temperature", -1, "sampling.temperature"),
        ("sampling.max_new_tokens", 0, "sampling.max_new_tokens"),
        ("sampling.min_new_tokens", 25, "sampling.min_new_tokens"),
        ("sampling.top_p", 0, "sampling.top_p"),
        ("sampling.stop_token_ids", [150], "sampling.stop_token_ids"),
        ("sampling.beam_width", 4, "sampling.beam_width"),
        ("policy_version", "3", "policy_version"),
        ("digest", None, "digest"),
        ("n", 4, "n"),
    ],
)
def test_a_wrong_field_is_refused_by_its_name(path, value, named):
    with pytest.raises(WireError, match=named):
        wire.decode_request(changed(path, value), LIMITS)


@pytest.mark.parametrize("field", [*BODY, *(f"sampling.{field.name}" for field in dataclasses.fields(SamplingSpec))])
def test_a_missing_field_is_refused_by_its_name(field):
    body = changed("prompts", BODY["prompts"])
    place = body["sampling"] if "." in field else body
    del place[field.rpartition(".")[2]]
    with pytest.raises(WireError, match=field):
        wire.decode_request(body, LIMITS)


@pytest.fixture
def nothing_is_finalized_at_the_recursion_limit():
    """What other tests left behind would be, when the collector runs within a deep text, and say so."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("nothing_is_finalized_at_the_recursion_limit")
def test_whatever_bytes_come_they_are_a_request_or_a_wire_error():
    whole, rng = json.dumps(BODY).encode(), random.Random(0)
    texts = [b"", b"null", b"[]", b"1e999", b"NaN", b"[" * 100_000, b"\xff\xfe", b"9" * 5000, b'{"a":' * 50_000]
    for _ in range(3000):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice(b'0e-"[]{},:nt\xff ')
        texts.append(bytes(damaged))
    refused = 0
    for text in texts:
        try:
            wire.decode_request(load_object(text), LIMITS)
        except WireError:
            refused += 1
    assert refused > len(texts) / 2


@pytest.mark.parametrize("text", ['{"logprobs": [NaN]}', "-Infinity", "[Infinity]"])
def test_numbers_that_json_does_not_have_are_no_json(text):
    with pytest.raises(WireError, match="no JSON number"):
        load_object(text)


def test_a_damaged_completion_is_a_wire_error():
    fields = {"token_ids": [1, 2], "logprobs": [-1.0, -2.0], "finish_reason": "stop", "policy_version": 0}
    good = {"i": 0, "j": 1, **fields}
    wire.decode_completion(good)
    for change in (
        {"i": "x"},
        {"token_ids": [1]},
        {"token_ids": [[1], [2]]},
        {"token_ids": [2**40, 1]},
        {"token_ids": [1.5, 1]},
        {"extra": 1},
    ):
        with pytest.raises(WireError):
            wire.decode_completion({**good, **change})
    for name in good:
        with pytest.raises(WireError):
            wire.decode_completion({key: value for key, value in good.items() if key != name})
