"""Graph rewriting and nothing else: one pass a file, the same names for ONNX graphs and for FX graphs."""
