"""Loading prompts: what comes out, and what a user is told when a file can't be used."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2TokenizerFast

from nemo_aapo.data.prompts import gold_answer, load_prompts
from nemo_aapo.data.tokenizer import load_tokenizer
from nemo_aapo.errors import DataError
from nemo_aapo.rewards import build_reward

SHARED = Path(__file__).parents[3] / "shared"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
GSM8K_ROWS = [
    {"question": "Ada buys 3 bags of 4 pears. How many pears?", "answer": "3*4 = <<3*4=12>>12 pears.\n#### 12"},
    {
        "question": "A town of 1,000 grows by half. How many?",
        "answer": "1000*1.5 = <<1000*1.5=1500>>1,500.\n#### 1,500",
    },
    {"question": "From 5 take 8. What is left?", "answer": "5-8 = <<5-8=-3>>-3\n#### -3"},
]


@pytest.fixture
def tokenizer():
    """One token a byte, an end-of-sequence token, no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture
def write(tmp_path):
    """Writes lines (objects, text or bytes) to data.jsonl."""

    def write_lines(*lines):
        raw = [line if isinstance(line, bytes) else (json.dumps(line)).encode() for line in lines]
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"\n".join(raw) + b"\n")
        return path

    return write_lines


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("work\n#### 12", "12"),
        ("#### 1\nno, wait\n####   1,234,567  ", "1234567"),
        ("#### -3", "-3"),
        ("#### $1,000.50", "$1000.50"),
        ("#### (1,2)", "(1,2)"),
        (" \\frac{1}{2}\n", "\\frac{1}{2}"),
        ("1,000", "1,000"),
    ],
)
def test_gold_answer_is_what_stands_behind_the_last_mark_and_a_plain_one_is_kept(answer, gold):
    assert gold_answer(answer) == gold


def test_prompts_carry_tokens_text_answer_and_source(write, tokenizer):
    path = write(*GSM8K_ROWS, b"", {"question": "A number as an answer?", "answer": 7})
    loaded = load_prompts(path, tokenizer, max_prompt_tokens=200)
    assert [p.answer for p in loaded.prompts] == ["12", "1500", "-3", "7"]
    assert [p.source for p in loaded.prompts] == [f"{path}:{n}" for n in (1, 2, 3, 5)]
    for prompt, row in zip(loaded.prompts, GSM8K_ROWS, strict=False):
        assert prompt.text == row["question"]
        assert prompt.token_ids.dtype == np.int32
        assert tokenizer.decode(prompt.token_ids) == row["question"]
    assert (loaded.bad_lines, loaded.dropped_long, loaded.duplicates, loaded.path) == (0, 0, 0, str(path))


@pytest.mark.parametrize("system_prompt", [None, "Be brief."])
def test_a_chat_template_is_used_as_the_tokenizer_itself_would(write, tokenizer, system_prompt):
    tokenizer.chat_template = CHAT_TEMPLATE
    path = write(*GSM8K_ROWS)
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    loaded = load_prompts(path, tokenizer, max_prompt_tokens=200, system_prompt=system_prompt)
    for prompt, row in zip(loaded.prompts, GSM8K_ROWS, strict=True):
        chat = [*system, {"role": "user", "content": row["question"]}]
        assert prompt.token_ids.tolist() == tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        assert prompt.text.endswith("<assistant>")
    with pytest.raises(DataError, match="chat_template must be one of auto, none, not 'non'"):
        load_prompts(path, tokenizer, max_prompt_tokens=200, chat_template="non")
    plain = load_prompts(path, tokenizer, max_prompt_tokens=200, chat_template="none")
    assert [p.text for p in plain.prompts] == [row["question"] for row in GSM8K_ROWS]


def test_plain_text_gets_the_tokenizers_own_special_tokens_and_a_template_writes_its_own(write, tokenizer):
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", bos)])
    path = write(*GSM8K_ROWS)
    for template in (None, "<bos>" + CHAT_TEMPLATE):
        tokenizer.chat_template = template
        for prompt in load_prompts(path, tokenizer, max_prompt_tokens=200).prompts:
            assert [i for i, token in enumerate(prompt.token_ids) if token == bos] == [0]


def test_a_system_prompt_that_would_have_no_effect_is_refused(write, tokenizer):
    with pytest.raises(DataError, match="system_prompt is set, but"):
        load_prompts(write(*GSM8K_ROWS), tokenizer, max_prompt_tokens=200, system_prompt="Be brief.")


def test_a_template_without_a_system_role_is_named(write, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"System role not supported.*unset system_prompt"):
        load_prompts(write(*GSM8K_ROWS), tokenizer, max_prompt_tokens=200, system_prompt="Be brief.")


def reject_words(answer: str) -> None:
    if not answer.lstrip("-").isdigit():
        raise ValueError("not a number")


BAD_LINES = {
    "not JSON": (b"{'question': 1}", "not JSON"),
    "too deep": (b"[" * 100_000, "not JSON"),
    "not an object": (b"[1, 2]", r"not a JSON object but \[1, 2\]"),
    "not UTF-8": (b'{"question": "caf\xe9", "answer": "1"}', "not UTF-8: byte 0xe9 at column 18"),
    "no prompt": ({"qestion": "a", "answer": "1"}, 'no prompt: the key "question" is missing; did you mean "qestion"'),
    "empty prompt": ({"question": "  ", "answer": "1"}, 'no prompt: "question" is empty'),
    "prompt of another type": ({"question": ["a"], "answer": "1"}, 'no prompt: "question" is .* not text'),
    "no answer": ({"question": "a", "label": "1"}, 'no answer: the key "answer" is missing; there is'),
    "null answer": ({"question": "a", "answer": None}, 'no answer: "answer" is None, not text'),
    "true as an answer": ({"question": "a", "answer": True}, 'no answer: "answer" is True, not text'),
    "nothing behind the mark": ({"question": "a", "answer": "so\n#### "}, "no answer: nothing stands behind"),
    "half a surrogate pair": (b'{"question": "a \\ud800", "answer": "1"}', '"question" holds half of a surrogate pair'),
    "refused by the verifier": (
        {"question": "a", "answer": "seven"},
        "the gold answer 'seven' can't be verified: not a",
    ),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named_before_anything_is_tokenised(write, kind):
    line, message = BAD_LINES[kind]
    path = write(*GSM8K_ROWS, line)
    with pytest.raises(DataError, match=f"(?s)1 line.*data.jsonl:4: {message}.*on_bad_line"):
        load_prompts(path, None, max_prompt_tokens=200, verify_answer=reject_words)


@pytest.mark.parametrize("kind", BAD_LINES)
def test_skipping_leaves_out_the_bad_lines_only(write, tokenizer, kind, caplog):
    line, message = BAD_LINES[kind]
    path = write(line, *GSM8K_ROWS[:2], line, GSM8K_ROWS[2])
    options = {"max_prompt_tokens": 200, "verify_answer": reject_words}
    with caplog.at_level(logging.WARNING):
        loaded = load_prompts(path, tokenizer, on_bad_line="skip", **options)
    assert [p.answer for p in loaded.prompts] == ["12", "1500", "-3"]
    assert loaded.bad_lines == 2
    assert len(caplog.records) == 1
    assert "2 line(s) can't be used and are left out" in caplog.text
    with pytest.raises(DataError, match=f"no prompts: none of its 2 lines can be used, such as .*:1: {message}"):
        load_prompts(write(line, line), tokenizer, on_bad_line="skip", **options)


def test_one_error_shows_the_first_five_bad_lines_and_their_number(write):
    lines = [b"no" if n % 3 else GSM8K_ROWS[0] for n in range(20)]
    with pytest.raises(DataError) as error:
        load_prompts(write(*lines), None, max_prompt_tokens=200)
    text = str(error.value)
    assert "13 line(s) can't be used" in text
    assert [n for n in range(1, 21) if f"data.jsonl:{n}: " in text] == [2, 3, 5, 6, 8]
    assert "and 8 more" in text


def test_the_verifier_is_asked_once_for_each_different_answer(write, tokenizer):
    asked = []
    rows = [{"question": f"q{n}", "answer": str(n % 3)} for n in range(30)]
    load_prompts(write(*rows), tokenizer, max_prompt_tokens=200, verify_answer=asked.append)
    assert asked == ["0", "1", "2"]


def test_long_prompts_are_an_error_that_names_both_lengths_or_are_dropped_and_counted(write, tokenizer):
    rows = [{"question": "x" * n, "answer": "1"} for n in (10, 11, 9, 30)]
    path = write(*rows)
    with pytest.raises(DataError, match=r"(?s)2 prompt.*:2: .* 11 tokens, max_prompt_tokens is 10.*:4: .* 30 tokens"):
        load_prompts(path, tokenizer, max_prompt_tokens=10)
    loaded = load_prompts(path, tokenizer, max_prompt_tokens=10, on_long_prompt="drop")
    assert [len(p.token_ids) for p in loaded.prompts] == [10, 9]
    assert loaded.dropped_long == 2
    with pytest.raises(DataError, match="every one is too long"):
        load_prompts(path, tokenizer, max_prompt_tokens=8, on_long_prompt="drop")


def test_a_missing_file_names_the_nearest_and_an_empty_one_is_refused(write, tokenizer, tmp_path):
    write(*GSM8K_ROWS)
    with pytest.raises(DataError, match=r"dta\.jsonl: no such file; did you mean .*data\.jsonl"):
        load_prompts(tmp_path / "dta.jsonl", tokenizer, max_prompt_tokens=9)
    with pytest.raises(DataError, match="there is no directory"):
        load_prompts(tmp_path / "no" / "data.jsonl", tokenizer, max_prompt_tokens=9)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="this is a directory without a data set"):
        load_prompts(tmp_path / "empty", tokenizer, max_prompt_tokens=9)
    with pytest.raises(DataError, match="no prompts: empty"):
        load_prompts(write(b"", b"  "), tokenizer, max_prompt_tokens=9)


def test_an_id_depends_on_tokens_and_answer_alone_and_duplicates_are_dropped(write, tokenizer):
    row, other = {"question": "1+1?", "answer": "2"}, {"question": "1+1?", "answer": "10"}
    first = load_prompts(write(row, other, row), tokenizer, max_prompt_tokens=9)
    assert first.duplicates == 1
    assert len({p.id for p in first.prompts}) == len(first.prompts) == 2
    second = load_prompts(write(b"", {**row, "more": 1}, other), tokenizer, max_prompt_tokens=9)
    assert [p.id for p in second.prompts] == [p.id for p in first.prompts]
    assert second.digest == first.digest
    assert load_prompts(write(other, row), tokenizer, max_prompt_tokens=9).digest != first.digest


def test_a_byte_order_mark_and_windows_line_ends_are_taken(tokenizer, tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in GSM8K_ROWS) + b"\r\n")
    assert len(load_prompts(path, tokenizer, max_prompt_tokens=200).prompts) == 3


def test_a_saved_tokenizer_loads_and_encodes_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded("Grüße, 3+4").input_ids == tokenizer("Grüße, 3+4").input_ids


def test_a_tokenizer_that_cant_be_loaded_is_named_with_the_reason(tmp_path):
    with pytest.raises(DataError, match="no such tokenizer directory"):
        load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="~nobody_of_that_name/x: no such tokenizer directory"):
        load_tokenizer("~nobody_of_that_name/x")
    with pytest.raises(DataError, match=r"no tokenizer here \(none of tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="this is a file"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="can't load a tokenizer from here"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizers_own_code_does_not_run_unasked(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.update(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(DataError, match="Set trust_remote_code=true only after reading"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not (SHARED / "data/gsm8k").is_dir(), reason="no GSM8K beside the repository")
def test_all_of_gsm8k_loads_with_integer_answers():
    qwen2 = SHARED / "tokenizers/qwen2"
    tokenizer = Qwen2TokenizerFast(str(qwen2 / "vocab.json"), str(qwen2 / "merges.txt"))
    tokenizer.chat_template = CHAT_TEMPLATE
    check = build_reward({"name": "integer"}).check_answer
    loaded = load_prompts(SHARED / "data/gsm8k/train.jsonl", tokenizer, max_prompt_tokens=512, verify_answer=check)
    assert len(loaded.prompts) + loaded.duplicates == 7473
    assert all("," not in p.answer for p in loaded.prompts)
