"""The kernels in Triton: LUT-GEMM, BiQGEMM, CodeGEMM, dequantize, and a dequantizing GEMM. Imported as lutgemm.kernels.

    y[M, N] = x[M, K] @ W[N, K].T + bias

Read `tiles.py` first, then one file per algorithm. `backends/triton.py` is who calls them.
"""
