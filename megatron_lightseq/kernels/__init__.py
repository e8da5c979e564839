"""Attention kernels: one tile, one rank, no communication."""
