"""TensorRT engines: the ONNX handed over, the builder process, the side file."""
