"""What a block looks like on the wire: a thin, typed face of the native codecs.

A *plan* says which elements of a tensor stand where in a message; the four operations move between tensors and messages along
a plan. They check what Python knows (dtype, device, layout), the native side checks sizes again and releases the GIL. The wire
formats are shown byte by byte in native/README.md.

Tensors are one-dimensional and contiguous; messages are `uint8`. On CUDA everything is enqueued on the current stream.
"""

from __future__ import annotations

import difflib

CODECS = ("none", "fp16", "bf16", "int8", "minmax_uint8", "int4", "sign")
"""Names of the codecs; the position is the native code."""

NEEDING_FEEDBACK = ("int4", "sign")
"""Codecs that lose so much that error feedback is their default."""


def check_codec(name: str) -> None:
    """Raises ValueError unless `name` is a codec."""
    if name not in CODECS:
        close = difflib.get_close_matches(str(name), CODECS, n=1)
        nearest = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"codec must be one of {', '.join(CODECS)}: got {name!r}{nearest}")


def uses_feedback(codec: str, error_feedback: bool | None) -> bool:
    """Whether residuals are kept: as asked for, or the codec's default where that is None.

    Raises:
        ValueError: for what is neither True, False nor None, or True with codec "none", which loses nothing.
    """
    if error_feedback not in (True, False, None):
        raise ValueError(f"error_feedback must be True, False or None: got {error_feedback!r}")
    if error_feedback and codec == "none":
        raise ValueError("error_feedback=True needs a codec that loses something: 'none' does not")
    return codec in NEEDING_FEEDBACK if error_feedback is None else error_feedback
