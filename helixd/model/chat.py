"""A checkpoint's chat template: messages in, prompt text out, rendered as transformers renders it.

The template comes from the operator's model directory and never from a client; it runs in a sandbox with a budget of
steps and seconds, and its output is bounded. Render off the event loop all the same. Message contents are the client's,
so whatever goes wrong while rendering is the request's fault (`ChatError`), and what goes wrong while compiling is the
checkpoint's (`ModelError`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Self

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from helixd.errors import ModelError
from helixd.model.files import read_bytes, read_json_object
from helixd.model.sandbox import MAX_SECONDS, MAX_STEPS, MeteredSandbox, OverBudget, metered

MAX_OUTPUT_CHARS = 8 * 2**20
TEMPLATE_ARGUMENTS = frozenset(
    {"enable_thinking", "thinking", "thinking_budget", "reasoning_effort", "preserve_thinking", "date_string"}
)
_MAX_TEMPLATE_BYTES = 4 * 2**20


class ChatError(ValueError):
    """These messages cannot be rendered: a client error. The text is the template's own or names the argument."""


class NoChatTemplate(ChatError):
    """The checkpoint has no chat template, so no chat request can be served."""


class ChatTemplate:
    """A compiled template; immutable, may be used from several threads."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], now: Callable[[], datetime] = datetime.now
    ) -> None:
        """`special_tokens` (`bos_token`, ...) are visible to the template. Raises ModelError for a bad template."""
        environment = MeteredSandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise ModelError(f"the chat template cannot be compiled: {error}") from error

    @classmethod
    def load(
        cls, model_dir: Path, special_tokens: Mapping[str, str], now: Callable[[], datetime] = datetime.now
    ) -> Self | None:
        """`chat_template.jinja`, else `chat_template` of `tokenizer_config.json`; None where there is neither.

        Of several named templates it takes the one called `default`. Raises ModelError for one that is unusable.
        """
        source = _template_source(model_dir)
        return None if source is None else cls(source, special_tokens, now)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        **arguments: str | float | bool | None,
    ) -> str:
        """The prompt text; encode it without adding special tokens.

        Raises ChatError for what the template refuses, for an argument that is not in `TEMPLATE_ARGUMENTS` or is no
        scalar, for output of more than `MAX_OUTPUT_CHARS`, and for more work than a template may do.
        """
        for name, value in arguments.items():
            if name not in TEMPLATE_ARGUMENTS:
                raise ChatError(f"template argument {name!r} is not allowed; allowed: {sorted(TEMPLATE_ARGUMENTS)}")
            if value is not None and not isinstance(value, str | int | float):
                raise ChatError(f"template argument {name!r} must be a string, a number, true, false or null")
        context = {
            **self._special_tokens,
            **arguments,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        size = 0
        try:
            with metered(MAX_STEPS, MAX_SECONDS) as meter:
                for piece in self._template.generate(context):
                    meter.step()
                    size += len(piece)
                    if size > MAX_OUTPUT_CHARS:
                        raise ChatError(f"the rendered chat has more than {MAX_OUTPUT_CHARS} characters")
                    pieces.append(piece)
        except ChatError:
            raise
        except OverBudget as error:
            raise ChatError(f"the chat template cannot render these messages: {error.message}") from error
        except TemplateError as error:
            raise ChatError(f"the chat template refuses these messages: {error.message or error}") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ChatError(f"the chat template cannot render these messages: {error}") from error
        return "".join(pieces)


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's part for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The tag's body, in its own scope."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _template_source(model_dir: Path) -> str | None:
    text = read_bytes(model_dir, "chat_template.jinja", _MAX_TEMPLATE_BYTES)
    if text is not None:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{model_dir / 'chat_template.jinja'} is not UTF-8: {error}") from error
    template = (read_json_object(model_dir, "tokenizer_config.json") or {}).get("chat_template")
    if isinstance(template, list):
        named = [(item.get("name"), item.get("template")) for item in template if isinstance(item, dict)]
        template = next((text for name, text in named if name == "default"), None)
        if template is None:
            names = sorted(str(name) for name, _ in named)
            raise ModelError(f"{model_dir}: chat_template names {names}, none of them 'default'")
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{model_dir}: chat_template must be a string or a list of named templates")
    return template


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
