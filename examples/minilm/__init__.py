"""A sentence encoder with real weights on real text, before and after INT8: `python -m examples.minilm`, which `make demo` runs."""

import os

# Before torch is imported: its profiler, which counts kernels, would write four lines of its own to stderr for each count.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
