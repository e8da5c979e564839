"""Benchmarks, comparisons with Megatron, and verification. Nothing else in the package uses them."""
