"""ONNX Runtime, imported here and nowhere else: its telemetry is off before it is loaded.

From 1.29 on the official builds for Linux record sessions, models and the machine, keep an identifier of the
machine below ~/.cache/Microsoft, and send it all to Microsoft. Only this variable prevents it, and only when
it is set before the library is loaded: `disable_telemetry_events` comes too late for the files and the first
event. What the operator has set is left as it is; 0 allows it.
"""

import os

TELEMETRY_OFF = "ORT_DISABLE_TELEMETRY"

os.environ.setdefault(TELEMETRY_OFF, "1")

import onnxruntime  # noqa: E402 - only now

__all__ = ["TELEMETRY_OFF", "onnxruntime"]
