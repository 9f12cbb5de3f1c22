"""Prompt templates: those that published numbers were measured with, or one's own."""

from __future__ import annotations

from nemo_aapo.errors import ConfigError
from nemo_aapo.text.checks import QUESTION

TEMPLATES = {
    # The paper's Qwen models: from its authors' evaluate.py (github JianxXiong/AAPO), which has it from open-r1.
    "open_rs": (
        "Solve the following math problem efficiently and clearly.  The last line of your response should be of the "
        "following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without quotes) "
        "where ANSWER is just the final number or expression that solves the problem. Think step by step before "
        "answering.\n\n{question}"
    ),
    # SimpleRL's two (github hkust-nlp/simpleRL-reason): the paper's Llama models were trained on and measured with the
    # first, which is plain text (chat_template=none).
    "simplerl_abel": "Question:\n{question}\nAnswer:\nLet's think step by step.\n",
    "simplerl_qwen": "{question}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "question": "{question}",
}


def template_text(template: str) -> str:
    """The text around a question.

    Args:
        template: a name of ``TEMPLATES``, or a text with ``{question}`` in it.
    """
    return TEMPLATES.get(template, template)


def check_template(template: str) -> None:
    """Raise ConfigError unless it is a known name or a text with a place for the question."""
    if template not in TEMPLATES and QUESTION not in template:
        raise ConfigError(
            f"prompt_template={template!r}: known are {', '.join(TEMPLATES)}; a text of your own needs {QUESTION} in it"
        )
