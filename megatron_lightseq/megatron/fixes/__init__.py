"""Fixes for faults of Megatron-Core on several ranks, each applied to a built model or to one function."""
