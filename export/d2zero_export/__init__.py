"""Checkpoints into models that run without torch, each verified against its checkpoint."""

from d2zero_export.onnx_export import ExportConfig, export_onnx

__all__ = ["ExportConfig", "export_onnx"]
