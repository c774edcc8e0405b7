"""
``poolkeeper explain``: the pages on errors and causes, as text for a terminal.

The pages are those of the site, ``docs/*.md``, which the wheel carries along. They say themselves
by what a section is found:

- its anchor, or its heading as one;
- the names of classes in code marks at the beginning of a line or of a list's item;
- *words of a message*, three or more in emphasis, where ``…`` stands for one word or for
  something in quotes.
"""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from .errors import DOCS, PoolkeeperError

PAGES = ("errors", "diagnose")

_SECTION = re.compile(
    r'(?:^<a id="(?P<anchor>[\w-]+)"></a>\n+)?^(?P<level>#+) (?P<title>[^\n]+)\n', re.MULTILINE
)
_CODE = re.compile(r"^```.*?^```\n?", re.MULTILINE | re.DOTALL)
_WORDS = re.compile(r"(?<![\w*])\*(?!\*)([^*\n]+)\*(?!\*)")
_CLASS = re.compile(r"^(?:- )?`([A-Z]\w+)`", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s]+)\)")
_NAMED = re.compile(rf"(?:/(?:{'|'.join(PAGES)})/?#|poolkeeper explain )([\w-]+)")


@dataclass(frozen=True)
class Section:
    """What stands below one heading."""

    page: str
    name: str
    title: str
    body: str

    @property
    def url(self) -> str:
        """Where it is on the site."""
        return f"{DOCS}/{self.page}" + ("" if self.is_whole_page else f"#{self.name}")

    @property
    def is_whole_page(self) -> bool:
        """True of what comes before the first section, and goes by the name of the page."""
        return self.name == self.page

    @property
    def prose(self) -> str:
        """It without code."""
        return _CODE.sub("", self.body)

    @property
    def classes(self) -> list[str]:
        """The errors that it is about."""
        return list(dict.fromkeys(_CLASS.findall(self.prose)))

    @property
    def words(self) -> list[str]:
        """By what a message is known to speak of it."""
        return [words for words in _WORDS.findall(self.prose) if len(words.split()) >= 3]

    @property
    def about(self) -> str:
        """It in half a sentence."""
        said = self.words[0] if self.title == self.name else self.title
        return f"{said} ({', '.join(self.classes)})" if self.classes else said


@cache
def sections() -> tuple[Section, ...]:
    """
    Return all sections of the pages.

    Raises:
        PoolkeeperError: If the installation lacks them.
    """
    return tuple(section for page in PAGES for section in _sections(page))


def _sections(page: str) -> Iterator[Section]:
    text = _text(page)
    code = [found.span() for found in _CODE.finditer(text)]
    found = [
        head
        for head in _SECTION.finditer(text)
        if not any(begin <= head.start() < end for begin, end in code)
    ]
    ends = [head.start() for head in found[1:]] + [len(text)]
    for head, end in zip(found, ends, strict=True):
        name = head["anchor"] or (page if head["level"] == "#" else _slug(head["title"]))
        yield Section(page, name, head["title"], text[head.end() : end])


def _text(page: str) -> str:
    checkout = Path(__file__).parents[2] / "docs"
    for place in (files("poolkeeper") / "_pages", checkout):
        if (file := place / f"{page}.md").is_file():
            return file.read_text(encoding="utf-8")
    raise PoolkeeperError(
        f'this installation of poolkeeper lacks its page "{page}"', hint=f"See {DOCS}/{page}"
    )


def _slug(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


# --- what is asked for --------------------------------------------------------------------------


def find(asked: str) -> list[Section]:
    """
    Return the sections on *asked*, which is a name, or a message, or several lines with some.

    In a message a URL, the name of a command and the words count for more than a class, of which
    there may be many kinds.
    """
    return _by_name(asked) or _by_words(asked) or _by_class(asked)


def _by_name(asked: str) -> list[Section]:
    name = asked.strip().strip("`'\":.,").removesuffix("()")
    return _named(_slug(name)) or _of_class(name.rpartition(".")[2])


def _named(name: str) -> list[Section]:
    return [section for section in sections() if section.name == name]


def _of_class(name: str) -> list[Section]:
    return [section for section in sections() if name.lower() in map(str.lower, section.classes)]


def _by_words(asked: str) -> list[Section]:
    text = " ".join(asked.split())
    found = [(match.span(), match[1].lower()) for match in _NAMED.finditer(text)]
    for section in sections():
        for words in section.words:
            found += ((match.span(), section.name) for match in _pattern(words).finditer(text))
    # Some words are the beginning of others. Those that come first in the text come first.
    spans = [span for span, _ in found]
    names = dict.fromkeys(
        name
        for span, name in sorted(found)
        if not any(a <= span[0] and span[1] <= b and (a, b) != span for a, b in spans)
    )
    return [section for name in names for section in _named(name)]


def _pattern(words: str) -> re.Pattern[str]:
    text = re.escape(words).replace("…", r"""(?:"[^"]*"|'[^']*'|\S+)""")
    return re.compile(rf"(?<!\w){text}(?!\w)", re.IGNORECASE)


def _by_class(asked: str) -> list[Section]:
    known = dict.fromkeys(re.findall(r"\b[A-Z]\w+", asked))
    return list(dict.fromkeys(section for name in known for section in _of_class(name)))


def close_to(asked: str) -> list[str]:
    """Return the names that are most like *asked*."""
    from difflib import get_close_matches

    names = {section.name: section.name for section in sections()}
    names |= {name.lower(): name for section in sections() for name in section.classes}
    return [names[name] for name in get_close_matches(asked.strip().lower(), names, n=3)]


# --- how it is shown ----------------------------------------------------------------------------


def contents() -> str:
    """Return in lines what there is on errors, and on causes."""
    there = [each for each in sections() if each.is_whole_page or each.words or each.classes]
    wide = max(len(each.name) for each in there)
    return "\n".join(
        f"\n{each.title}" if each.is_whole_page else f"  {each.name:{wide}}  {each.about}"
        for each in there
    ).lstrip()


def shown(section: Section, columns: int) -> str:
    """Return *section* in lines that are no longer than *columns*, but for code."""
    links: list[str] = []
    blocks = [section.title, "=" * len(section.title)]
    text = re.sub(r"<!--.*?-->\n?", "", section.body, flags=re.DOTALL)
    at = 0
    for code in _CODE.finditer(text):
        blocks += _prose(text[at : code.start()], columns, links)
        blocks += ["", textwrap.indent("\n".join(code[0].splitlines()[1:-1]), "    ")]
        at = code.end()
    blocks += [*_prose(text[at:], columns, links), ""]
    blocks += (f"[{number}] {link}" for number, link in enumerate(links, 1))
    return "\n".join((*blocks, section.url))


def _prose(text: str, columns: int, links: list[str]) -> Iterator[str]:
    def link(found: re.Match[str]) -> str:
        where = _where(found[2])
        if where not in links:
            links.append(where)
        return f"{found[1]} [{links.index(where) + 1}]"

    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if not paragraph.strip():
            continue
        paragraph = re.sub(r"\*\*([^*\n]+)\*\*", r"\1", _LINK.sub(link, paragraph))
        paragraph = _WORDS.sub(r'"\1"', paragraph)
        yield ""
        if paragraph.startswith("|"):
            yield from _table(paragraph, columns)
        else:
            yield from _folded(paragraph, columns)


def _folded(paragraph: str, columns: int) -> Iterator[str]:
    """A paragraph, or the items of a list: an item begins with a mark, what follows is its."""
    for item in re.split(r"\n(?=- |\d+\. )", paragraph):
        mark = match[0] if (match := re.match(r"- |\d+\. ", item)) else ""
        yield _fold(" ".join(item.split()), columns, " " * len(mark))


def _table(rows: str, columns: int) -> Iterator[str]:
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows.splitlines()]
    for first, *rest in (row for row in cells[1:] if set(row[0]) - set("- |")):
        yield _fold(f"{first}: {'; '.join(rest)}", columns, "    ")


def _fold(text: str, columns: int, indent: str) -> str:
    return textwrap.fill(
        text,
        columns,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _where(target: str) -> str:
    """Return where a link of a page leads: what to type for what is here, else a URL."""
    page, _, anchor = target.partition("#")
    if "://" in page:
        return target
    if anchor and _named(anchor) and page in ("", *(f"{name}.md" for name in PAGES)):
        return f"poolkeeper explain {anchor}"
    page = page.removesuffix(".md").removesuffix("index")
    return f"{DOCS}/{page}{'#' if anchor else ''}{anchor}"


# --- the command --------------------------------------------------------------------------------


def explain(words: Iterable[str]) -> int:
    """Print what there is on *words*, on standard input if they are "-"; return the exit status."""
    asked = " ".join(words)
    if asked == "-":
        asked = sys.stdin.buffer.read().decode("utf-8", "replace")
        if not asked.strip():
            print("Standard input was empty.", file=sys.stderr)
            return 2
    if not asked.strip():
        print(f"{contents()}\n\nMore of one: poolkeeper explain NAME, or a message as it came.")
        return 0
    columns = max(40, min(100, shutil.get_terminal_size().columns))
    if found := find(asked):
        print("\n\n\n".join(shown(section, columns) for section in found))
        return 0
    (first, *_) = asked.strip().splitlines()
    like = f" Did you mean {' or '.join(names)}?" if (names := close_to(first)) else ""
    what = textwrap.shorten(first, 60, placeholder=" …")
    print(f'There is nothing on "{what}".{like}\n\n{contents()}', file=sys.stderr)
    return 2
