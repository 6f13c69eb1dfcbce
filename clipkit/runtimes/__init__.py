"""Run exported towers without torch: ONNX files in ONNX Runtime, in OpenVINO, or in what you register.

    clipkit export builtin --onnx --out builtin-onnx        # see clipkit.towers.exporting
    encoder = clipkit.load("builtin-onnx")                  # ONNX Runtime
    encoder = clipkit.load("builtin-onnx", runtime="openvino")

A runtime is a function that opens an ONNX file; one entry in RUNTIMES makes it known to `load` and to
the command line's --runtime. The layout of an exported folder is that of `checkpoint.Export`.
"""

from clipkit.runtimes.exported import ExportedEncoder, ExportedTexts, exported_precision
from clipkit.runtimes.graphs import RUNTIMES, Graph, OpenGraph

__all__ = [
    "RUNTIMES",
    "ExportedEncoder",
    "ExportedTexts",
    "Graph",
    "OpenGraph",
    "exported_precision",
]
