"""Files that a replay reads and writes: fleets, traces, measured costs, results, plots."""
