"""Ranks as one job: how they start, agree before the first step, notice faults, and stop."""
