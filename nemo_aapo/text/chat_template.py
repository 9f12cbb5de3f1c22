"""A model's chat template: found among its files or in its tokenizer, and rendered as transformers renders it.

It is rendered here and not by transformers because the same rendering is tried before torch is imported, and because
the date that some templates write (``strftime_now``) is the run's and not the clock's.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_aapo.config.build import nearest
from nemo_aapo.errors import DataError, one_line
from nemo_aapo.text.files import TOKENIZER_CONFIG, read_settings, special_tokens

if TYPE_CHECKING:
    import jinja2

OWN_VARIABLES = ("messages", "add_generation_prompt", "strftime_now")
"""What rendering itself gives a template; no arguments of a user's."""
PLAIN = "or set chat_template to 'none', which renders plain text"
"""The way out that all messages offer."""
_DATE = "strftime_now"


@dataclass(frozen=True)
class ChatTemplate:
    """One template with all that it reads besides the messages.

    Example: ``ChatTemplate("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "chat_template.jinja",
    {"eos_token": "<eos>"}).render([{"role": "user", "content": "1+1?"}])`` is ``"1+1?<eos>"``.
    """

    source: str
    """The text, in Jinja."""
    where: str
    """The file or tokenizer that it comes from, for messages."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Special tokens by name, and a user's arguments."""
    date: str | None = None
    """The day that the template writes, ``YYYY-MM-DD``; None: today."""

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Raises:
            DataError: the template is damaged, or refuses the messages.
        """
        from jinja2 import TemplateError

        given = {"messages": messages, "add_generation_prompt": add_generation_prompt, _DATE: self._strftime}
        try:
            return self._compiled.render({"tools": None, "documents": None, **self.variables, **given})
        except DataError:
            raise
        except TemplateError as error:
            raise DataError(
                f"{self.where}: the tokenizer's chat template refuses the messages: {one_line(error)}; unset "
                f"system_prompt if it is the system role that is refused, {PLAIN}"
            ) from error
        except Exception as error:  # a template is a program, and may fail in any way
            raise DataError(
                f"{self.where}: the chat template fails ({type(error).__name__}: {one_line(error)}); mend it, {PLAIN}"
            ) from error

    def reads(self) -> frozenset[str]:
        """The names that the template looks up: what arguments it takes.

        Raises:
            DataError: a syntax error.
        """
        from jinja2 import meta

        self._compiled  # noqa: B018, its message for a syntax error
        return frozenset(meta.find_undeclared_variables(_environment().parse(self.source)))

    @property
    def writes_date(self) -> bool:
        """Whether it asks for the date, so that prompts differ from day to day."""
        return _DATE in self.reads()

    def with_arguments(self, arguments: Mapping[str, Any] | None, date: str | None) -> ChatTemplate:
        """The template for the rendering of one run.

        Raises:
            DataError: an argument that the template does not read, or that is not the user's to give.
        """
        takes = sorted(self.reads() - set(OWN_VARIABLES) - set(self.variables))
        for name in arguments or ():
            if name not in takes:
                hint = nearest(name, takes) or f"; it reads {', '.join(takes) or 'none'}"
                raise DataError(f"{self.where}: the chat template reads no argument {name!r}{hint}")
        return dataclasses.replace(self, variables={**self.variables, **(arguments or {})}, date=date)

    @property
    def _compiled(self) -> jinja2.Template:
        from jinja2 import TemplateSyntaxError

        try:
            return _compile(self.source)
        except TemplateSyntaxError as error:
            raise DataError(
                f"{self.where}: the chat template has a syntax error in its line {error.lineno}: {error.message} "
                f"Mend it, {PLAIN}"
            ) from error

    def _strftime(self, form: str) -> str:
        day = datetime.date.fromisoformat(self.date or today())
        return datetime.datetime.combine(day, datetime.time()).strftime(form)


def today() -> str:
    """``YYYY-MM-DD`` by this machine's clock."""
    return datetime.date.today().isoformat()


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """The template that transformers would find in a model directory; None where there is none.

    Raises:
        DataError: several without a default, or no text.
    """
    main, more = directory / "chat_template.jinja", sorted((directory / "additional_chat_templates").glob("*.jinja"))
    files = {**({"default": main} if main.is_file() else {}), **{path.stem: path for path in more}}
    where = str(files.get("default", main.parent / TOKENIZER_CONFIG) if not more else directory)
    try:
        found: Any = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: the chat template can't be read ({error})") from None
    source = default_of(found or read_settings(directory / TOKENIZER_CONFIG).get("chat_template"), where)
    return None if source is None else ChatTemplate(source, where, special_tokens(directory))


def default_of(found: Any, where: str) -> str | None:
    """The template that prompts are rendered by, of one or of several by name; None where there is none.

    Args:
        found: text, a mapping, or a list of ``{"name": ..., "template": ...}``.

    Raises:
        DataError: several without a default, or no text.
    """
    if isinstance(found, list) and all(isinstance(entry, dict) and "name" in entry for entry in found):
        found = {entry["name"]: entry.get("template") for entry in found}
    if isinstance(found, dict) and found:
        if "default" not in found:
            names = ", ".join(sorted(map(str, found)))
            raise DataError(
                f"{where}: there are chat templates {names}, and none is called default, by which prompts are "
                f"rendered; call one of them so, {PLAIN}"
            )
        found = found["default"]
    if found is not None and not isinstance(found, str):
        raise DataError(f"{where}: the chat template is no text but {type(found).__name__}; mend it, {PLAIN}")
    return found or None


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """What transformers 4.57 compiles templates in (``utils/chat_template_utils.py``)."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what an assistant says, for those who train on given answers."""

        tags = {"generation"}  # noqa: RUF012, as Jinja declares it

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **form)  # Jinja's own escapes HTML

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    return made
