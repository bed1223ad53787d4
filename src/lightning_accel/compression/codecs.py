"""The codecs, and which of them need error feedback. native/README.md shows their wire formats byte by byte."""

from __future__ import annotations

import difflib

CODECS = ("none", "fp16", "bf16", "int8", "minmax_uint8", "int4", "sign")
"""Names of the codecs; a name's position is its native code."""

NEEDING_FEEDBACK = ("int4", "sign")
"""Codecs that use error feedback by default, because they lose much."""


def check_codec(name: str) -> None:
    """Raises ValueError unless `name` is the name of a codec."""
    if name not in CODECS:
        close = difflib.get_close_matches(str(name), CODECS, n=1)
        nearest = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"codec must be one of {', '.join(CODECS)}: got {name!r}{nearest}")


def uses_feedback(codec: str, error_feedback: bool | None) -> bool:
    """Tells whether residuals are kept: `error_feedback` itself, or the codec's default if it is None.

    Raises:
        ValueError: `error_feedback` is not True, False or None, or is True with codec "none", which loses nothing.
    """
    if error_feedback not in (True, False, None):
        raise ValueError(f"error_feedback must be True, False or None: got {error_feedback!r}")
    if error_feedback and codec == "none":
        raise ValueError("error_feedback=True needs a codec that loses something: 'none' loses nothing")
    return codec in NEEDING_FEEDBACK if error_feedback is None else error_feedback
