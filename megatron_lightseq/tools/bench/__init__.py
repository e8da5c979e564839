"""Benchmarks of kernels and of overlap; every figure in the documents is written by one of them."""
