"""Open an ONNX file in a runtime. Only this module imports ONNX Runtime's and OpenVINO's inference.

ONNX Runtime's telemetry is off: see `standalone`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from clipkit.arrays import Float32
from clipkit.errors import InputError, ModelError

Graph = Callable[[npt.NDArray[Any]], Float32]  # the one input (N, ...) -> the one output (N, D)


class OpenGraph(Protocol):
    """Open an ONNX file and return what runs it: see `open_onnx`."""

    def __call__(self, file: Path, *, device: str, precision: str, calls: int) -> Graph: ...


def open_onnx(file: Path, *, device: str, precision: str, calls: int) -> Graph:  # noqa: ARG001
    """Open an ONNX file in ONNX Runtime.

    device: "auto" (a CUDA GPU if the installed package has that provider, else the CPU), "cpu", "cuda".
    precision: "auto" or "float32"; what the file holds is computed as it is.
    calls: how many threads may call the graph at a time; on a CPU each call computes in its own thread.
    Raises InputError for another device or precision, ModelError without the package or for a file
    that it cannot read.
    """
    ort = _package("onnxruntime", "onnx")
    if precision not in ("auto", "float32"):
        raise InputError(
            f"ONNX Runtime computes in the precision of the exported files, not in {precision}; "
            "leave --precision out, or use --runtime openvino"
        )
    kind, _, number = device.partition(":")
    cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if kind not in ("auto", "cpu", "cuda") or (kind == "cuda" and not cuda):
        raise InputError(
            f"device {device!r} is not usable with the installed ONNX Runtime; use auto or cpu"
        )
    providers: list[Any] = ["CPUExecutionProvider"]
    if kind != "cpu" and cuda:
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(number or 0)}))
    options = ort.SessionOptions()
    # Calls run side by side, one thread each: see towers.encoder.Cores.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors: it warns of what its own optimizer could not fold
    try:
        session = ort.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # it raises many classes of its own
        raise _unreadable(file, error) from error
    name = session.get_inputs()[0].name

    def run(batch: npt.NDArray[Any]) -> Float32:
        return np.asarray(session.run(None, {name: batch})[0], np.float32)

    return run


def open_openvino(file: Path, *, device: str, precision: str, calls: int) -> Graph:
    """Open an ONNX file in OpenVINO.

    device: "auto" or "cpu" (the CPU), or one of OpenVINO's own names, such as "GPU" or "NPU".
    precision: "auto" and "float32" compute in float32, "bfloat16" and "float16" in that.
    calls: as of `open_onnx`. Raises as `open_onnx` does.
    """
    ov = _package("openvino", "openvino")
    hints = {"auto": "f32", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    name = "CPU" if device in ("auto", "cpu") else device
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hints[precision]}
    if name == "CPU":
        settings |= {"NUM_STREAMS": calls, "INFERENCE_NUM_THREADS": calls}
    try:
        core = ov.Core()
        if name.split(".")[0] not in core.available_devices and name not in core.available_devices:
            raise InputError(
                f"device {device!r} is none of OpenVINO's here; "
                f"use auto or {' or '.join(core.available_devices)}"
            )
        compiled = core.compile_model(str(file), name, settings)
    except RuntimeError as error:
        raise _unreadable(file, error) from error
    requests: SimpleQueue[Any] = SimpleQueue()  # a request is not for two calls at once
    for _ in range(calls):
        requests.put(compiled.create_infer_request())

    def run(batch: npt.NDArray[Any]) -> Float32:
        request = requests.get()
        try:
            output = request.infer([np.ascontiguousarray(batch)])[compiled.output(0)]
            return np.array(output, np.float32)  # a copy: the request uses its memory again
        finally:
            requests.put(request)

    return run


def _package(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise ModelError(
            f"exported towers need {module}, which is not installed; "
            f"install it: pip install 'clipkit[{extra}]'"
        ) from None


def _unreadable(file: Path, error: Exception) -> ModelError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ModelError(f"{file} cannot be opened ({reason}); export the model again")
