"""What a chat template does to a question, tried out on a question of our own before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_aapo.errors import DataError
from nemo_aapo.text.chat_template import PLAIN, ChatTemplate

QUESTION, SYSTEM = "{question}", "{system_prompt}"
"""Placeholders in a prompt template."""
_ASKED, _ANSWERED = "How many is 6 times 7?", "It is 42."


def prepared_template(
    template: ChatTemplate | None,
    system_prompt: str | None,
    prompt_template: str,
    arguments: Mapping[str, Any] | None,
    date: str | None,
) -> ChatTemplate | None:
    """The template that renders a run's prompts, tried out; None for plain text.

    Raises:
        DataError: what can't be rendered as it was asked for, and what to do.
    """
    check_system_prompt(system_prompt, prompt_template, template is not None)
    if template is None:
        if arguments:
            raise DataError(
                "template_arguments has no effect: prompts are rendered as plain text (the tokenizer has no chat "
                "template, or chat_template is 'none'); unset it"
            )
        return None
    template = template.with_arguments(arguments, date)
    check_rendering(template, system_prompt, prompt_template)
    return template


def check_system_prompt(system_prompt: str | None, prompt_template: str, templated: bool) -> None:
    """Refuse a system prompt without a place, and a place without one.

    Args:
        templated: a chat template renders the prompts.

    Raises:
        DataError: what to leave out, or where to put it.
    """
    place = SYSTEM in prompt_template
    if templated and place:
        raise DataError(
            f"prompt_template holds {SYSTEM}, but the tokenizer's chat template has a place for the system prompt; "
            "leave it out, or set chat_template to 'none'"
        )
    if system_prompt is not None and not templated and not place:
        raise DataError(
            "system_prompt is set, but prompts are rendered as plain text, which has no place for it "
            "(the tokenizer has no chat template, or chat_template is 'none'); unset it, or write "
            f"{SYSTEM} into prompt_template"
        )
    if system_prompt is None and place:
        raise DataError(f"prompt_template holds {SYSTEM}, but system_prompt is not set")


def check_rendering(template: ChatTemplate, system_prompt: str | None, prompt_template: str) -> None:
    """Refuse a template that is damaged, that drops the question or the system prompt, or that opens no answer.

    Raises:
        DataError: the file, what is wrong, and the remedy.
    """
    prompt = _rendered(template, system_prompt, prompt_template)
    if _ASKED not in prompt:
        raise DataError(
            f"{template.where}: the chat template drops the question: {_ASKED!r} becomes {prompt[-80:]!r}. Templates "
            f"that want a message's content as a list of parts do so: take one for plain text, {PLAIN}"
        )
    if system_prompt and prompt == _rendered(template, f"{system_prompt} {_ANSWERED}", prompt_template):
        raise DataError(
            f"{template.where}: the chat template drops the system message, so the model would never see "
            "system_prompt; unset it, and say the same in prompt_template"
        )
    if (missing := _missing_opening(template, system_prompt, prompt_template)) is not None:
        raise DataError(
            f"{template.where}: the chat template has no generation prompt: between question and answer it writes "
            f"{missing!r}, which prompts would not end with. Add that where add_generation_prompt is true, {PLAIN}"
        )


def _missing_opening(template: ChatTemplate, system_prompt: str | None, prompt_template: str) -> str | None:
    """What the template writes before an answer and not at the end of a prompt; None: nothing, or it can't be told.

    A template may do without ``add_generation_prompt``: in Llama 2's the answer follows on ``[/INST]`` at once.
    """
    prompt = _rendered(template, system_prompt, prompt_template)
    if prompt != _rendered(template, system_prompt, prompt_template, opens=False):
        return None
    answered, said_on = (_with_answer(template, system_prompt, prompt_template, role) for role in ("assistant", "user"))
    if answered is None or answered == said_on or _ANSWERED not in answered:  # it takes none, or knows no roles
        return None
    before = answered.partition(_ANSWERED)[0]
    return before[len(prompt) :].strip() or None if before.startswith(prompt) else None


def _with_answer(template: ChatTemplate, system_prompt: str | None, prompt_template: str, role: str) -> str | None:
    """The conversation with an answer of this role; None where the template refuses it."""
    try:
        return _rendered(template, system_prompt, prompt_template, {"role": role, "content": _ANSWERED})
    except DataError:
        return None


def _rendered(
    template: ChatTemplate,
    system_prompt: str | None,
    prompt_template: str,
    *answers: dict[str, str],
    opens: bool = True,
) -> str:
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    question = {"role": "user", "content": prompt_template.replace(QUESTION, _ASKED)}
    return template.render([*system, question, *answers], add_generation_prompt=opens and not answers)
