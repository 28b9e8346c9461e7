"""From a model of transformers to artifacts: quantization schemes, and the exporter."""
