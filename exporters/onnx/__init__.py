"""ONNX in, ONNX out: the rewritten file, and what its river needs of ONNX Runtime."""
