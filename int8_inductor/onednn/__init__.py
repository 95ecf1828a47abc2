"""oneDNN's int8 linear, which Inductor's frozen graphs on a CPU call: in which form it takes an activation (forms.py), what it computes of a product
whose constants are known (kernels.py), its calls in generated code (calls.py), and when it is called (prepacked.py).
"""
