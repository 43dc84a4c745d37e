"""From a trained model to an ONNX file that says, and proves, what it is."""
