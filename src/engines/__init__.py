"""Where a job runs: it plans, loads, runs and explains."""
