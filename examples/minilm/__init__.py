"""A sentence encoder with real weights on real text, before and after INT8: `python -m examples.minilm`, which `make demo` runs."""
