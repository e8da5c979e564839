"""Benchmarks that the repository reports: measured, never typed."""
