"""Chat templates: rendered as transformers renders them, with the run's date and arguments; bad ones are refused."""

from __future__ import annotations

import json

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nemo_aapo.data.tokenizer import load_tokenizer, render_prompts
from nemo_aapo.errors import DataError
from nemo_aapo.text import chat_template
from nemo_aapo.text.chat_template import ChatTemplate, default_of, read_chat_template
from nemo_aapo.text.checks import prepared_template
from tests.tiny_models import save_character_tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
GOOD = {
    "chatml": TURNS + OPENING,
    "thinking": TURNS + OPENING + "{% if not (enable_thinking | default(true)) %}<think></think>{% endif %}",
    "dated": "{{ bos_token }}Today: {{ strftime_now('%d %b %Y, %H:%M') }}\n" + TURNS + OPENING,
    "dated by argument": "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}"
    "{{ date_string }}" + TURNS + OPENING,
    "llama 2's": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }} "
    "{{ eos_token }}{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}",
    "always opens": "{% for m in messages %}<user>{{ m.content }}<assistant>{% endfor %}",
    "plain": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}{{ {'b': '<é>', 'a': 1} | tojson(indent=2) }}" + OPENING,
    "marked": "{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% endfor %}" + OPENING,
    "strict": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS + OPENING,
}
CHATS = [
    [{"role": "user", "content": "Is 1 < 2 & 'x'?\n "}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "é?"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>b"},
        {"role": "user", "content": "c"},
    ],
]


def outcome(render, *arguments, **more):
    try:
        return render(*arguments, **more)
    except Exception as error:  # both refuse
        return type(error.__cause__ or error)


@pytest.mark.parametrize("name", GOOD)
def test_a_template_is_rendered_as_transformers_renders_it(name):
    template = ChatTemplate(GOOD[name], name, SPECIAL, "2025-01-31")
    day = {"strftime_now": template._strftime} if template.writes_date else {}
    for chat in CHATS:
        for opens in (True, False):
            theirs = outcome(
                lambda **how: render_jinja_template([chat], chat_template=template.source, **how)[0][0],  # noqa: B023
                add_generation_prompt=opens,
                **SPECIAL,
                **day,
            )
            assert outcome(template.render, chat, opens) == theirs
    prepared_template(template, None, "{question}", None, None)


BAD = {
    "a syntax error": (TURNS + "{% if %}", "FILE: the chat template has a syntax error in its line 2"),
    "no end": ("{% for m in messages %}{{ m.content }}", "has a syntax error"),
    "content as parts": (
        "{% for m in messages %}{% for part in m.content %}{% if part['type'] == 'text' %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endfor %}" + OPENING,
        "FILE: the chat template drops the question",
    ),
    "the same for all": ("Say hello." + OPENING, "drops the question"),
    "the first letter": ("{{ messages[0].content[0] }}" + OPENING, "drops the question"),
    "no generation prompt": (TURNS, "FILE: the chat template has no generation prompt: between question and answer"),
    "roles in words": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no generation prompt"),
    "raises": ("{{ raise_exception('not today') }}", "refuses the messages: not today"),
    "undefined": ("{{ messages[0].content + nothing }}", "refuses the messages: 'nothing' is undefined"),
    "a filter that is none": ("{{ messages | shout }}", "has a syntax error"),
    "another error": ("{{ 1 // 0 }}", "FILE: the chat template fails (ZeroDivisionError"),
    "too long a loop": ("{% for i in range(10 ** 12) %}{% endfor %}", "fails (OverflowError"),
    "unsafe": ("{{ messages.__class__.__mro__ }}", "refuses the messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_template_that_cannot_work_is_refused_with_file_and_remedy(name):
    source, said = BAD[name]
    with pytest.raises(DataError) as refused:
        prepared_template(ChatTemplate(source, "FILE", SPECIAL), None, "{question}", None, None)
    assert said in str(refused.value)
    assert "set chat_template to 'none'" in str(refused.value)


def test_a_system_prompt_that_the_template_drops_or_refuses_is_refused_and_an_empty_one_is_not():
    drops = ChatTemplate("{{ messages[-1].content }}" + OPENING, "FILE")
    with pytest.raises(DataError, match="FILE: the chat template drops the system message"):
        prepared_template(drops, "Think.", "{question}", None, None)
    with pytest.raises(DataError, match="no system; unset system_prompt"):
        prepared_template(ChatTemplate(GOOD["strict"], "FILE"), "Think.", "{question}", None, None)
    assert prepared_template(ChatTemplate(GOOD["chatml"], "FILE"), "", "{question}", None, None)


def test_arguments_reach_the_template_and_those_that_it_does_not_read_are_refused():
    template = ChatTemplate(GOOD["thinking"], "FILE")
    chat = CHATS[0]
    assert template.with_arguments({"enable_thinking": False}, None).render(chat).endswith("<think></think>")
    assert template.with_arguments({"enable_thinking": True}, None).render(chat) == template.render(chat)
    for name in ("enable_thinkin", "messages", "add_generation_prompt", "strftime_now"):
        with pytest.raises(DataError, match=rf"FILE: the chat template reads no argument '{name}'"):
            template.with_arguments({name: 1}, None)
    dated = ChatTemplate(GOOD["dated by argument"], "FILE").with_arguments({"date_string": "26 Jul"}, "2025-01-31")
    assert dated.render(chat).startswith("26 Jul")
    with pytest.raises(DataError, match="template_arguments has no effect"):
        prepared_template(None, None, "{question}", {"enable_thinking": True}, None)


def test_only_a_template_that_asks_for_the_date_writes_it_and_it_is_the_given_one(monkeypatch):
    assert {name for name in GOOD if ChatTemplate(GOOD[name], name).writes_date} == {"dated", "dated by argument"}
    monkeypatch.setattr(chat_template, "today", lambda: "2030-12-24")
    dated = ChatTemplate(GOOD["dated"], "FILE", SPECIAL)
    assert "Today: 24 Dec 2030, 00:00" in dated.render(CHATS[0])
    assert "Today: 31 Jan 2025, 00:00" in dated.with_arguments(None, "2025-01-31").render(CHATS[0])


def test_the_template_of_a_directory_is_the_one_that_transformers_finds(tmp_path):
    """A file of its own goes before the settings, several have one by the name default."""
    save_character_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())

    def both() -> str | None:
        found = read_chat_template(tmp_path)
        theirs = load_tokenizer(str(tmp_path)).chat_template
        assert (found and found.source) == default_of(theirs, "here")
        return found and found.source

    assert both() is None
    path.write_text(json.dumps({**settings, "chat_template": "one"}))
    assert both() == "one"
    path.write_text(
        json.dumps({**settings, "chat_template": [{"name": n, "template": n} for n in ("tool_use", "default")]})
    )
    assert both() == "default"
    (tmp_path / "chat_template.jinja").write_text("{# é #}two\n")
    assert both() == "{# é #}two\n"
    (more / "rag.jinja").write_text("three")
    assert both() == "{# é #}two\n"
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="there are chat templates rag, and none is called default"):
        read_chat_template(tmp_path)
    (more / "rag.jinja").unlink()
    for damaged, said in (([{"name": "rag", "template": "x"}], "none is called default"), (7, "is no text but int")):
        path.write_text(json.dumps({**settings, "chat_template": damaged}))
        with pytest.raises(DataError, match=said):
            read_chat_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="can't be read"):
        read_chat_template(tmp_path)


def test_prompts_of_a_tokenizer_take_date_and_arguments_and_an_empty_system_message(tmp_path):
    save_character_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.chat_template = "{{ strftime_now('%Y') }}{{ mood }}" + TURNS + OPENING
    empty = [{"role": "system", "content": ""}]
    (text,), (ids,) = render_prompts(
        tokenizer, ["Why?"], date="2025-01-31", template_arguments={"mood": "!"}, before=[empty]
    )
    assert text == "2025!<|system|><|end|>\n<|user|>Why?<|end|>\n<|assistant|>"
    assert len(ids) == len(text)
