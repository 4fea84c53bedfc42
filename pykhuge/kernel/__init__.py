"""What every kernel has: locks, tasks, a clock, a trace buffer, and the ways it dies."""
