"""One rewrite a file; the first line of its docstring is the rewrite."""
