"""Export of models of transformers, and generation with what was exported."""
