"""Benchmarks: `python -m benchmarks.gemm`, `python -m benchmarks.models`, `python -m benchmarks.plot`, `python -m benchmarks.report`.

The first two measure, check every result beside its time, and write JSON and PNG into benchmarks/results/. A peer of the GEMM benchmark is one
object in peers.py, a workload of the model benchmark one in workloads.py, a way to run it one in variants.py.
"""
