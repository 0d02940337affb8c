"""The trace viewer: what a page or a terminal shows of a trace, and the recording behind its spectrograms."""
