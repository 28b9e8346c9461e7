"""Patterns, rules and program surgery over torch.fx and ExportedProgram; knows no quantization and no backend."""
