"""A checkpoint's own Jinja chat template, rendered in a sandbox as Hugging Face `apply_chat_template` renders it."""

from __future__ import annotations

import datetime
import functools
import json
from typing import TYPE_CHECKING, Any

from llama_dist.errors import CheckpointError
from llama_dist.text.base import Tokenizer
from llama_dist.text.dialog import Dialog, refusal
from llama_dist.text.guard import make_guard
from llama_dist.text.tokenizer import PieceTokenizer, whole_characters

if TYPE_CHECKING:
    from jinja2 import Template


def encode_template(tokenizer: Tokenizer, dialog: Dialog, now: datetime.datetime | None = None) -> list[int]:
    """The ids of `tokenizer.chat_template` rendered over `dialog`, with a generation prompt.

    Equal to encoding the rendered string with its control tokens parsed, as long as no content spells one; those are
    encoded as text. `now` is the time a template may print; default: the clock's. RequestError if the template refuses
    the dialog, CheckpointError if it is no valid template.
    """
    assert isinstance(tokenizer, PieceTokenizer), "every tokenizer of load_tokenizer and tokenizer_from_gguf is one"
    source = tokenizer.chat_template
    assert source is not None, "pick_chat_format checks that there is a template"
    shown = frozenset(text for text, i in tokenizer.special.items() if tokenizer.pieces[i])
    guard = make_guard(tokenizer.special, shown, [source, *(message["content"] for message in dialog)])
    messages = [{"role": m["role"], "content": guard.protect(m["content"])} for m in dialog]
    parts = list(guard.split(_render(source, messages, tokenizer, now or datetime.datetime.now())))
    ids: list[int] = []
    for at, (text, token) in enumerate(parts):
        if token is not None:
            ids.append(token)
            continue
        # A control token may take the white space beside it.
        if at > 0 and parts[at - 1][0] in tokenizer.strip_right:
            text = text.lstrip()
        if at + 1 < len(parts) and parts[at + 1][0] in tokenizer.strip_left:
            text = text.rstrip()
        if text:
            encode = tokenizer.encode_text if at == 0 else tokenizer.encode_run or tokenizer.encode_text
            ids += encode(whole_characters(text))
    return ids


def _render(source: str, messages: list[dict[str, str]], tokenizer: PieceTokenizer, now: datetime.datetime) -> str:
    import jinja2

    try:
        return _compile(source).render(
            messages=messages,
            add_generation_prompt=True,
            tools=None,
            documents=None,
            bos_token=tokenizer.text_of(tokenizer.bos_id),
            eos_token=tokenizer.text_of(tokenizer.eos_id),
            strftime_now=now.strftime,
        )
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the chat template is not valid Jinja: {_line(error)}; pass --chat_format") from None
    except jinja2.exceptions.SecurityError as error:
        raise CheckpointError(f"the chat template does what it must not: {_line(error)}; pass --chat_format") from None
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise refusal(f"the chat template refuses these messages: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> Template:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks answers for training; here it shows what it holds."""

        tags = {"generation"}  # noqa: RUF012  declared so by jinja2

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own escapes HTML characters.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)
