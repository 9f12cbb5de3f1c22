"""Stop strings are found where the whole text says so, whatever the tokens' borders, by decoding little."""

from __future__ import annotations

import numpy as np
import pytest

from nemo_aapo.engines.megatron.stop_strings import StopStrings

LIMIT = 60


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level, so that a character may be cut over tokens, with merged tokens that hold parts of the strings."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [
        "ST",
        "OP",
        "STO",
        "P!",
        "OPS",
        "Ġ#",
        "##",
        "Ã©",
        "ĠST",
        "\u010a\u010a",
    ]  # Ġ: a space, Ã©: é, Ċ: a line break
    tokenizer = Tokenizer(models.BPE({text: i for i, text in enumerate([*alphabet, *merged])}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>")])
    return tokenizer


def first_end(text_of, tokens: np.ndarray, strings: tuple[str, ...], at_least: int) -> int | None:
    """By counting the strings in the whole text before and after each token."""
    counts = np.array([[text_of(tokens[:n]).count(string) for string in strings] for n in range(len(tokens) + 1)])
    return next((n for n in range(at_least, len(tokens) + 1) if (counts[n] > counts[n - 1]).any()), None)


@pytest.mark.parametrize("at_least", [1, 20])
@pytest.mark.parametrize("strings", [("STOP",), ("é",), ("\n\n", "##"), (" #", "€!"), ("OPS", "P!", "→")])
def test_a_row_ends_where_its_whole_text_first_has_one_string_more(tokenizer, strings, at_least):
    calls = []

    def decode(ids):
        calls.append(len(ids))
        return tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)

    generator = np.random.default_rng(len(strings[0]))
    size = tokenizer.get_vocab_size()
    # tokens that say something of the strings, now and then any other
    related = [
        i for i in range(size) if set(tokenizer.decode([i])) & set("".join(strings) + "\N{REPLACEMENT CHARACTER}")
    ]
    rows = np.where(
        generator.random((150, LIMIT)) < 0.8,
        generator.choice(related, (150, LIMIT)),
        generator.integers(0, size, (150, LIMIT)),
    ).astype(np.int32)
    for row, string in zip(rows, strings * 20, strict=False):  # and the strings themselves, byte by byte
        spelled = [tokenizer.token_to_id(ch) for ch in byte_characters(string)]
        at = generator.integers(0, LIMIT - len(spelled))
        row[at : at + len(spelled)] = spelled
    stop = StopStrings(strings, decode, size)
    ends: list[int | None] = [None] * len(rows)
    for drawn in range(at_least, LIMIT + 1):
        live = [i for i, end in enumerate(ends) if end is None]
        found = stop.found(rows[live], np.full(len(live), drawn), rows[live, drawn - 1].astype(np.int64))
        for i in np.flatnonzero(found):
            ends[live[i]] = drawn
    assert ends == [first_end(lambda ids: tokenizer.decode(ids.tolist()), row, strings, at_least) for row in rows]
    assert sum(end is not None for end in ends) > 12
    assert max(calls) <= max(len(string.encode()) for string in strings) + 8


def byte_characters(text: str) -> str:
    """The characters by which byte-level tokenizers write the bytes of a text."""
    from tokenizers import pre_tokenizers

    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return "".join(piece for piece, _ in pieces)


def test_tokens_that_cannot_complete_a_string_cost_nothing(tokenizer):
    calls = []

    def decode(ids):
        calls.append(len(ids))
        return tokenizer.decode(np.asarray(ids).tolist())

    stop = StopStrings(("STOP",), decode, tokenizer.get_vocab_size())
    rows = np.full((8, LIMIT), tokenizer.token_to_id("x"), dtype=np.int32)
    for drawn in range(1, LIMIT + 1):
        assert not stop.found(rows, np.full(8, drawn), rows[:, drawn - 1].astype(np.int64)).any()
    assert calls == [1]


def test_an_empty_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopStrings(("a", ""), str, 4)
