"""Megatron-Core on CPUs: replacements for its CUDA calls, and collectives that gloo lacks."""
