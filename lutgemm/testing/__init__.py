"""What tests and benchmarks share: the list of cases, the error bounds, the one timer. Needs no pytest."""
