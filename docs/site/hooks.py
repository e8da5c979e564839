"""Makes the repository's Markdown files, written to be read on GitHub, pages of one site.

README.md and the other files of the top level become pages. A link to a page stays a link; one to a source file or a
folder, which the site does not have, becomes its text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Files of the top level, and their names in the site."""
SOURCES = {page: source for source, page in PAGES.items()}
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(?P<bang>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the files of the top level."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: Any, files: Files) -> str:
    """Rewrite relative links, outside of code."""
    uri = page.file.src_uri
    source = PurePosixPath(SOURCES.get(uri, f"docs/{uri}"))

    def replaced(match: re.Match[str]) -> str:
        return link_in_site(match, source, lambda uri: files.get_file_from_path(uri) is not None)

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(replaced, part) for part in parts)


def link_in_site(match: re.Match[str], source: PurePosixPath, is_in_site: Callable[[str], bool]) -> str:
    """The link of `match`, which stands in the repository's file `source`, as the site needs it."""
    path, hash_, anchor = match["target"].partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return match[0]
    target = _resolved(source.parent / path)
    uri = PAGES.get(target, target.removeprefix("docs/"))
    if target not in PAGES and not (target.startswith("docs/") and is_in_site(uri)):
        return match["text"]
    depth = len(source.parts) - 2 if source.parts[0] == "docs" else 0
    up = "../" * depth
    return f"{match['bang']}[{match['text']}]({up}{uri}{hash_}{anchor})"


def _resolved(path: PurePosixPath) -> str:
    """The path without `..`, from the repository's top level."""
    return (ROOT / path).resolve().relative_to(ROOT).as_posix()
