"""The ranks of a run as one job: how they start, agree before the first step, notice faults, stop and leave."""
