"""The CUDA backend: kernels, the host code that launches them, and what compiles them."""
