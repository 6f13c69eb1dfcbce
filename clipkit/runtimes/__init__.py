"""Run exported towers without torch: ONNX files in ONNX Runtime, in OpenVINO, or in what you register.

    clipkit export builtin --onnx --out builtin-onnx        # see clipkit.towers.exporting
    encoder = clipkit.load("builtin-onnx")                  # ONNX Runtime
    encoder = clipkit.load("builtin-onnx", runtime="openvino")

A runtime is a function that opens an ONNX file; one entry in RUNTIMES makes it known to `load` and to
the command line's --runtime. The layout of an exported folder is that of `checkpoint.Export`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipkit.runtimes.exported import ExportedEncoder, ExportedTexts, exported_precision
    from clipkit.runtimes.graphs import Graph, OpenGraph

__all__ = [
    "RUNTIMES",
    "ExportedEncoder",
    "ExportedTexts",
    "Graph",
    "OpenGraph",
    "exported_precision",
]

# By the name that `load` and --runtime take; "module:name" is imported when it is first used. The
# command line lists them before numpy is imported.
RUNTIMES: dict[str, str | OpenGraph] = {
    "onnx": "clipkit.runtimes.graphs:open_onnx",
    "openvino": "clipkit.runtimes.graphs:open_openvino",
}

_EXPORTED = ("ExportedEncoder", "ExportedTexts", "exported_precision")
_HOMES = dict.fromkeys(_EXPORTED, "exported") | dict.fromkeys(("Graph", "OpenGraph"), "graphs")


def __getattr__(name: str) -> Any:
    """Import the package's names when they are first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value
