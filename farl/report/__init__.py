"""What a run looks like: curves, retrieval, masked patches, and one page that shows them together.

Names load on first use: a run imports this at its start and needs matplotlib only at its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farl.report.curves import draw_curves, read_metrics
    from farl.report.page import write_page
    from farl.report.patches import draw_masked_patches
    from farl.report.retrieval import draw_caption_queries, draw_image_queries
    from farl.report.run import predict_tokens, report_run, write_report

_HOME = {
    "draw_caption_queries": "retrieval",
    "draw_curves": "curves",
    "draw_image_queries": "retrieval",
    "draw_masked_patches": "patches",
    "predict_tokens": "run",
    "read_metrics": "curves",
    "report_run": "run",
    "write_page": "page",
    "write_report": "run",
}

__all__ = [
    "draw_caption_queries",
    "draw_curves",
    "draw_image_queries",
    "draw_masked_patches",
    "predict_tokens",
    "read_metrics",
    "report_run",
    "write_page",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'farl.report' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"farl.report.{_HOME[name]}"), name)
