"""Chat templates: the Jinja2 dialect that Hugging Face checkpoints bring, in a sandbox."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvmesh.services.common.errors import ConfigError, InvalidRequest

TEMPLATE_FILE = "chat_template.jinja"  # wins over the template in tokenizer_config.json
DEFAULT_TEMPLATE = "default"  # of a list of named ones


class _GenerationBlock(Extension):
    """`{% generation %}` marks what the model says, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """Messages to the prompt that the model was trained on.

    variables: bos_token, eos_token and the like.
    now: for templates that print the date (`strftime_now`); without it they do not have it.
    Raises ConfigError if `source` is not a template.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str],
        now: Callable[[], datetime] | None = None,
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        if now is not None:
            environment.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = environment.from_string(source)
            free_names = meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"the chat template, line {error.lineno}: {error}") from error
        self._knows_tools = "tools" in free_names
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Ends where the assistant's answer begins.

        Raises InvalidRequest with the template's own words for roles or an order it refuses, or
        for tools that it would leave out.
        """
        if tools and not self._knows_tools:
            raise InvalidRequest(
                f"{len(tools)} tools are given; this model's chat template has no place for tools"
            )
        try:
            return self._template.render(
                self._variables,
                messages=[dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                documents=None,
                add_generation_prompt=True,
            )
        # Errors of any class may come out of a template that meets what it did not expect.
        except Exception as error:
            raise InvalidRequest(f"the model's chat template refuses the messages: {error}") from (
                error
            )


def load_chat_template(
    folder: Path, config: Mapping[str, Any], now: Callable[[], datetime] | None = None
) -> ChatTemplate | None:
    """The template of a checkpoint; None if it has none. Raises ConfigError if it is not valid."""
    file = folder / TEMPLATE_FILE
    source = file.read_text() if file.is_file() else config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        only = next(iter(named.values())) if len(named) == 1 else None
        source = named.get(DEFAULT_TEMPLATE, only)
        if source is None:
            raise ConfigError(
                f"{folder}: none of the chat templates ({', '.join(named) or 'empty list'}) "
                f"is named {DEFAULT_TEMPLATE!r}"
            )
    if source is None:
        return None
    if not isinstance(source, str):
        raise ConfigError(f"{folder}: chat_template is {type(source).__name__}, must be text")
    return ChatTemplate(source, special_tokens(config), now)


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token ... of tokenizer_config.json, each written as text or as a table."""
    tokens: dict[str, str] = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without jinja2's HTML escapes, as the models saw it in training."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
