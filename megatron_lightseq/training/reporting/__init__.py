"""What a run tells its user: progress, metrics, memory, and the report at its end."""
