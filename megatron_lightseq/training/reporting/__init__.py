"""What a run tells its user: progress, metrics, memory use, and the report at its end."""
