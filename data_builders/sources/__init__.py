"""Corpora of reasoning traces: reading any common format, choosing the correct, removing what benchmarks hold."""
