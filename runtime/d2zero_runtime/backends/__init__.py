"""What runs an exported network: ONNX Runtime, OpenVINO, TensorRT, torch's compiled `.pt2`."""
