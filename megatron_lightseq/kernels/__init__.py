"""Attention kernels: each computes one tile on one rank, without communication."""
