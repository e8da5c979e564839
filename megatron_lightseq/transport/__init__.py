"""Moving tensors between ranks: no maths, no schedules."""
