"""
The site, made of these pages by Sphinx: ``make docs``.

They are written to be read on a forge as well, so what only the site needs is put in here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from poolkeeper import __version__
from poolkeeper.errors import DOCS

project = "poolkeeper"
project_copyright = "poolkeeper contributors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["conf.py"]
myst_enable_extensions = ["attrs_block"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # an excerpt may begin below a heading of its own

default_role = "code"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
autodoc_typehints = "signature"
# The adapters import their frameworks, of which the site needs none.
autodoc_mock_imports = [
    "aiohttp", "blacksheep", "celery", "dramatiq", "falcon", "fastapi", "faststream", "guardpost",
    "litestar", "opentelemetry", "prometheus_client", "quart", "sanic", "sqlalchemy", "starlette",
    "taskiq",
]  # fmt: skip

html_theme = "furo"
# Pygments' own: for the theme's choice it loads the styles of all packages that are installed, and
# among those of the suite there is one that cannot be loaded.
pygments_style = "default"
pygments_dark_style = "github-dark"
html_title = "poolkeeper"
html_baseurl = f"{DOCS}/"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False


def _anchored(found: re.Match[str]) -> str:
    anchor, heading = found.groups()
    own = heading.strip("# \n").lower().replace(" ", "-")  # what it is called anyway
    return heading if anchor == own else f"{{#{anchor}}}\n{heading}"


# The end of a sentence's line within a paragraph: in Chinese no space stands there.
_JOINED = re.compile(r"(?<=[。：；，、）”])\n *(?=\S)(?!- |\d+\. |[|#<]|!\[|```)")


def _of_the_site(_app: Any, page: str, source: list[str]) -> None:
    """Turn what a forge understands into what Sphinx does."""
    here = Path(__file__).parent
    if page == "changelog":
        source[0] = (here.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    text = re.sub(r'^<a id="([\w-]+)"></a>\n+(#+ .+\n)', _anchored, source[0], flags=re.MULTILINE)
    text = text.replace("](../CHANGELOG.md)", "](changelog.md)")
    if page.startswith("zh/"):
        text = _JOINED.sub("", text)
    if page == "index":  # its lists are what the sidebar shows
        first, *more = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
        for caption, part in zip(["", *more[::2]], [first, *more[1::2]], strict=True):
            lines = "".join(re.findall(r"^- .+", part, re.MULTILINE))
            pages = dict.fromkeys(re.findall(r"\]\(([\w/-]+)\.md\)", lines))
            listed = "\n".join((f":caption: {caption}" if caption else "", "", *pages))
            text += f"\n```{{toctree}}\n:hidden:\n{listed}\n```\n"
    source[0] = text


def _say_the_language(
    _app: Any, page: str, _template: str, context: dict[str, Any], _: Any
) -> None:
    """Let a browser choose the font, and a screen reader the voice, for pages in Chinese."""
    if page.startswith("zh/"):
        context["language"] = "zh-CN"


def _in_docstrings(_app: Any, *about: Any) -> None:
    """Let a fence in a docstring be a block of code."""
    lines: list[str] = about[-1]
    inside = False
    for number, line in enumerate(lines):
        if line.startswith("```"):
            inside = not inside
            lines[number] = f".. code-block:: {line[3:]}\n" if inside else ""
        elif inside:
            lines[number] = f"   {line}"
    lines[:] = "\n".join(lines).split("\n")


def setup(app: Any) -> None:
    """Tell Sphinx of these."""
    app.connect("source-read", _of_the_site)
    app.connect("html-page-context", _say_the_language)
    app.connect("autodoc-process-docstring", _in_docstrings)
