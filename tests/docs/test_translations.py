"""A page in another language has the code of the English one, and points where that does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .blocks import FENCE
from .translations import TRANSLATIONS, with_code_of

PAGES = pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)


@PAGES
def test_the_code_of_a_translation_is_that_of_the_english_page(page: Path) -> None:
    """If not: python -m tests.docs.translations, and a look at the words around it."""
    text = page.read_text(encoding="utf-8")
    assert text == with_code_of(TRANSLATIONS[page].read_text(encoding="utf-8"), text)


def outline(page: Path) -> list[str]:
    """The levels of its headings, the anchors, and the first cells of its tables."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [
        found[1] or found[2] or found[3]
        for found in re.finditer(
            r'^(#+) |^<a id="([^"]+)"></a>|^\| (\[`[^|]*) \|', text, re.MULTILINE
        )
    ]


@PAGES
def test_a_translation_has_the_sections_of_the_english_page(page: Path) -> None:
    assert outline(page) == outline(TRANSLATIONS[page])


def test_every_page_that_is_translated_can_be_found_from_the_index() -> None:
    docs = next(iter(TRANSLATIONS)).parent / "docs"
    index = (docs / "index.md").read_text(encoding="utf-8")
    for page in TRANSLATIONS:
        assert page.parent.name != "zh" or f"(zh/{page.name})" in index


def test_code_that_differs_is_replaced_and_code_that_is_missing_is_told() -> None:
    english = "Says\n\n```sh\nnew\n```\n\n<!-- keeps running -->\n```sh\nserver\n```\n"
    chinese = "说\n\n```sh\nold\n```\n\n```text\n?\n```\n"
    copied = "说\n\n```sh\nnew\n```\n\n<!-- keeps running -->\n```sh\nserver\n```\n"
    assert with_code_of(english, chinese) == copied
    with pytest.raises(ValueError, match="2 blocks of code, 1 in the English page"):
        with_code_of("```sh\none\n```\n", chinese)
