"""Measuring tools: benchmarks, comparisons with Megatron, verification. Nothing else in the package needs them."""
