"""Arguments' descriptions from Google-style docstrings, so that each is written once: beside what takes the argument."""

from __future__ import annotations

import inspect
import re

_SECTION = re.compile(r"^Args:\n(.*?)(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"(\w+)(?: \([^)]*\))?: *(.*)")


def parse_args(docstring: str | None) -> dict[str, str]:
    """Returns what the section "Args:" says of each argument: its first paragraph, on one line."""
    section = _SECTION.search(inspect.cleandoc(docstring or ""))
    docs: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", section[1].rstrip()) if section else []:
        first_paragraph = re.split(r"\n\s*\n", entry.strip())[0]
        if match := _ENTRY.match(" ".join(first_paragraph.split())):
            docs[match[1]] = match[2]
    return docs
