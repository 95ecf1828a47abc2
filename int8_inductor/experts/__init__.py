"""Mixture of experts: layers whose stacked expert weights are int8 [E, N, K] or packed int4 [E, N, K / 2].

layouts.py      how weights are quantized and stored
reference.py    the eager truth: what a layer of experts computes
ops.py          int8_inductor::moe_experts and ::scaled_grouped_mm: schema, checks, fake, and which implementation runs
kernels.py      the Triton kernels
configs.py      tile sizes, and when each is used
launch.py       the kernels of one call, in order
module.py       QuantizedExperts, and the modules that it takes the place of
"""
