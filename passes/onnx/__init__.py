"""The passes for ONNX graphs."""
