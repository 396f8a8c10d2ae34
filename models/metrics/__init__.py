"""Published metrics. Each accumulates sums that add up over ranks, and states its variant."""
