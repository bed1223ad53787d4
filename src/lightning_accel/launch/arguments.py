"""Kinds of arguments on the command line."""

from __future__ import annotations

import argparse


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
