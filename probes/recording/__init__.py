"""What a model's sites showed while it wrote: teacher forcing, and the store of the series."""
