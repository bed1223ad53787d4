"""Kinds of arguments on the command line, and those that are a script's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def positive(text: str) -> int:
    """Reads a whole number above 0."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: got {value}")
    return value


def port(text: str) -> int:
    """Reads a port."""
    if not 1 <= (value := int(text)) <= 65535:
        raise argparse.ArgumentTypeError(f"must be from 1 to 65535: got {value}")
    return value


def of_script(script: str, parsed: Sequence[str], words: Sequence[str]) -> list[str]:
    """The script's arguments, with a "--" right after its name, which argparse takes for its own.

    Args:
        script: its name.
        parsed: what argparse made of the arguments.
        words: the command line, which ends with them.
    """
    before = list(words[: len(words) - len(parsed)])
    return ["--", *parsed] if before[-2:] == [script, "--"] else list(parsed)
