"""The CPU's own kernels, in C++: compiled once by the machine's compiler when first wanted, then kept.

Without a compiler everything works as it does with one, by PyTorch's operations and slower.
"""
