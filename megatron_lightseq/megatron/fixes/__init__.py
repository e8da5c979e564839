"""Fixes for incorrect results of Megatron-Core on several ranks, each applied to a built model or to one function."""
