"""Benchmarks: `python -m benchmarks.gemm`, `benchmarks.models`, `benchmarks.accuracy`, `benchmarks.plot`, `benchmarks.report`.

The first two measure, check every result beside its time, and write JSON and PNG into benchmarks/results/; the third measures what INT8 costs in
accuracy, and writes the same. A peer of the GEMM benchmark is one object in peers.py, a workload of the model benchmark one in workloads.py, a way to
run it one in variants.py, a model and a scheme of the accuracy benchmark one each in subjects.py.
"""
