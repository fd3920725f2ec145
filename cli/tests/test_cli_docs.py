"""What the documents say holds: links lead somewhere, every page is found, every command parses."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.core
import typer.main

from kvmesh.cli.main import app

ROOT = Path(__file__).parents[2]
INDEX = ROOT / "README.md"
PAGES = (INDEX, *sorted((ROOT / "docs").glob("*.md")), ROOT / "integration/training/README.md")

FENCED = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PLACEHOLDER = re.compile(r"[A-Z]+|\.\.\.|…")  # `devices show NAME`, `generate ...`


def names(paths: tuple[Path, ...]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def prose(text: str) -> str:
    """The page without its blocks of code."""
    return FENCED.sub("", text)


def anchors(text: str) -> set[str]:
    """What `#...` may name: each heading in lower case, without punctuation, joined by dashes."""
    titles = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def shell_commands(text: str) -> Iterator[list[str]]:
    """Arguments of each whole `kvmesh` line in a block of code, fenced or indented."""
    blocks = FENCED.findall(text) + INDENTED.findall(prose(text))
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        if line.strip().startswith("kvmesh "):
            yield arguments(line)


def inline_commands(text: str) -> Iterator[list[str]]:
    """Arguments of each `kvmesh ...` in running text, where they may be an abridged form."""
    for span in INLINE.findall(prose(text)):
        if span.startswith("kvmesh "):
            yield arguments(span)


def arguments(line: str) -> list[str]:
    """The words after `kvmesh`, up to a comment, a pipe or a redirection."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>&;")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    words = list(lexer)[1:]
    ends = [i for i, word in enumerate(words) if set(word) <= set("|<>&;")]
    return words[: ends[0]] if ends else words


def resolve(words: list[str]) -> tuple[typer.core.TyperCommand | typer.core.TyperGroup, list[str]]:
    """The command that the first words name, and what is left for it to parse."""
    command = COMMAND
    rest = list(words)
    while isinstance(command, typer.core.TyperGroup) and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"kvmesh {shlex.join(words)}: no command {rest[0]}"
        command = command.commands[rest.pop(0)]
    return command, rest


def check_options(words: list[str]) -> None:
    command, rest = resolve(words)
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    unknown = {word.split("=")[0] for word in rest if word.startswith("--")} - known - {"--help"}
    assert not unknown, f"kvmesh {shlex.join(words)}: no option {', '.join(sorted(unknown))}"


def check_parses(words: list[str], page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Parses all of it, values and arguments too; what would then run does not."""
    try:
        COMMAND.main(args=words, prog_name="kvmesh")
    except SystemExit as end:
        said = capsys.readouterr()
        assert not end.code, f"{page}: kvmesh {shlex.join(words)}: {said.err or said.out}"


def without_callbacks(command: Any) -> Any:
    command.callback = None
    for inner in getattr(command, "commands", {}).values():
        without_callbacks(inner)
    return command


COMMAND = without_callbacks(typer.main.get_command(app))


@pytest.mark.parametrize("page", names(PAGES))
def test_docs_links_lead_somewhere(page: str):
    path = ROOT / page
    for link in LINK.findall(prose(path.read_text("utf-8"))):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_relative_to(ROOT) and target.exists(), f"{page}: {link} is not there"
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), f"{page}: no heading {link}"


def test_docs_every_page_is_reached_from_the_readme():
    seen: set[Path] = set()
    ahead = [INDEX]
    while ahead:
        page = ahead.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        links = LINK.findall(prose(page.read_text("utf-8")))
        ahead += [(page.parent / link.partition("#")[0]).resolve() for link in links
                  if "://" not in link and not link.startswith("#")]  # fmt: skip
    assert set(PAGES) <= seen, f"no way to {names(tuple(set(PAGES) - seen))}"


@pytest.mark.parametrize("page", names(PAGES))
def test_docs_commands_parse(
    page: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text("utf-8")
    for words in shell_commands(text):
        check_parses(words, page, capsys)
    for words in inline_commands(text):
        check_options([word for word in words if not PLACEHOLDER.fullmatch(word)])


def test_docs_are_searched_for_commands(capsys: pytest.CaptureFixture[str]):
    """That the search finds what it is for, and that a wrong command is one."""
    text = INDEX.read_text("utf-8")
    assert ["status"] in list(shell_commands(text)) and len(list(shell_commands(text))) > 20
    assert ["bench", "codec", "--json"] in list(inline_commands(text))
    with pytest.raises(AssertionError, match="no option --nonsense"):
        check_options(["up", "--nonsense"])
    for wrong in (
        ["up", "--nonsense"],
        ["nonsense"],
        ["grpc", "call"],
        ["bench", "serve", "--rate", "x"],
    ):
        with pytest.raises(AssertionError, match="Error"):
            check_parses(wrong, "here", capsys)
