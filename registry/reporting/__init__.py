"""One page of finished runs: tables, figures, clips and settings, to look at and to send."""

from __future__ import annotations

from .page import report

__all__ = ["report"]
