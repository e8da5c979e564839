"""The documents as a site, built by Sphinx from the Markdown files as they are on GitHub.

    sphinx-build -c docs/site . build/site         then open build/site/index.html

scripts/lint.sh builds it with warnings as errors. The source folder is the repository itself, so links between
documents and to source files are the same in both places; links to folders, which a site does not have, become text.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]

project = "megatron_lightseq"
author = "the authors of megatron_lightseq"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/reference/*.md"]
exclude_patterns = [".*", "build", "csrc", "data", "megatron_lightseq", "results", "runs", "tests"]

html_theme = "furo"
html_title = "LightSeq for Megatron"
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
suppress_warnings = ["myst.header"]  # a page may begin below the first level, as an included file does

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "exclude-members": "__init__, __new__"}
autoclass_content = "both"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

CONTENTS = {
    "Use": (
        "getting-started",
        "configuration",
        "planning",
        "checkpoints-and-faults",
        "hugging-face-weights",
        "hybrid-models",
        "huggingface",
        "megatron-lm",
        "megatron-options",
        "linear-attention",
    ),
    "Understand": ("tour", "architecture", "algorithms", "glossary"),
    "Measured": ("performance",),
    "Reference": tuple(
        f"reference/{page}" for page in ("attention", "linear", "schedule", "megatron", "kernels", "errors")
    ),
}
"""Captions of the sidebar, and the pages of docs/ below each."""
TOP_LEVEL = ("CONTRIBUTING", "CHANGELOG", "SECURITY")
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)\)")


def contents() -> str:
    """The table of contents, which README.md does not have: GitHub needs none."""
    parts = {caption: [f"docs/{page}" for page in pages] for caption, pages in CONTENTS.items()}
    parts["Contribute"] = list(TOP_LEVEL)
    return "\n".join(
        "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", *pages, "```"])
        for caption, pages in parts.items()
    )


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """What Sphinx reads in place of a file's own text."""
    folder = (ROOT / name).parent

    def without_folder(match: re.Match[str]) -> str:
        return match[1] if (folder / match[2]).is_dir() else match[0]

    text = LINK.sub(without_folder, source[0])
    source[0] = f"{text}\n\n{contents()}\n" if name == root_doc else text


def finish(app: Sphinx, error: Exception | None) -> None:
    """Lead from the address of the site to its first page."""
    if error is None and app.builder.format == "html":
        page = f'<!DOCTYPE html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>{project}</title>\n'
        (Path(app.outdir) / "index.html").write_text(page)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # imports for docstrings must not touch a GPU
    logging.getLogger("megatron").setLevel(logging.WARNING)
    with contextlib.redirect_stderr(io.StringIO()):  # Megatron-Core names the packages that are not installed
        importlib.import_module("megatron_lightseq.megatron.spec")
    app.connect("source-read", read)
    app.connect("build-finished", finish)
