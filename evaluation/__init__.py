"""Arms, metrics with intervals, the run of a whole recipe, and its report."""
