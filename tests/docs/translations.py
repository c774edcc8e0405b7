"""
The pages in other languages; the code in them is that of the English ones.

``python -m tests.docs.translations`` copies it from there, block by block, where it has changed.
"""

from __future__ import annotations

from pathlib import Path

from .blocks import FENCE

ROOT = Path(__file__).parents[2]
TRANSLATIONS = {
    ROOT / "README.zh-CN.md": ROOT / "README.md",
    **{page: ROOT / "docs" / page.name for page in sorted((ROOT / "docs" / "zh").glob("*.md"))},
}
"""The English page of each."""


def with_code_of(original: str, page: str) -> str:
    """
    Return *page* with the code of *original*.

    Raises:
        ValueError: If one of them has more blocks: somebody who reads both has to see to that.
    """
    theirs = [match[0] for match in FENCE.finditer(original)]
    ours = list(FENCE.finditer(page))
    if len(theirs) != len(ours):
        raise ValueError(f"{len(ours)} blocks of code, {len(theirs)} in the English page")
    for match, block in reversed(list(zip(ours, theirs, strict=True))):
        page = page[: match.start()] + block + page[match.end() :]
    return page


def main() -> None:
    for path, original in TRANSLATIONS.items():
        page = path.read_text(encoding="utf-8")
        copied = with_code_of(original.read_text(encoding="utf-8"), page)
        if copied != page:
            path.write_text(copied, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: code copied from {original.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
