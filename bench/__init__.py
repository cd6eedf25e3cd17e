"""Microbenchmarks: the kernels beside torch's own matmul, measured in one run. `lutgemm bench` is the command."""
