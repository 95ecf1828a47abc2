"""Kernels in Gluon, Triton's lower language, for Hopper: warps with roles of their own, and products of int8 that stay in flight.

Triton keeps a wgmma in flight while its warps go on only where the accumulator is float32; for one of int8 it waits at once (3.6 and 3.7), so a
program's tensor cores idle through every step's address arithmetic, rescaling and epilogue. Gluon says when to wait. Inductor's TritonTemplate
renders Triton alone, so these kernels are calls in the generated code, of a text that was rendered like a template's.
"""
