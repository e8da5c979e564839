"""Kernels of linear attention: each computes pieces of one rank's tokens, without communication."""
