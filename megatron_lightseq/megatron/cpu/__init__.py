"""Megatron-Core on CPUs: what stands in for CUDA, and collectives that gloo lacks."""
