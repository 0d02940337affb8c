"""Final answers: where they stand, and whether they are right. Knows nothing of judges, corpora or arms."""
