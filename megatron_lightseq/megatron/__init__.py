"""The seams to Megatron-Core. Only this package and training/ import megatron."""
