"""A Griffe extension: the cross-reference roles of our docstrings, such as :func:`name`, become code in Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")
LITERAL = re.compile(r"``([^`]+)``")


class Roles(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """`:func:`name`` and ` ``name`` ` become `name` between single backticks."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda match: f"`{match[1].lstrip('.')}`", obj.docstring.value)
            obj.docstring.value = LITERAL.sub(r"`\1`", text)
