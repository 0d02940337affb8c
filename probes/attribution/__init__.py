"""Which neurons and heads of a block write what: exact decomposition, direct writes, selection."""
