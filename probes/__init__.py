"""Recording, attribution, spectral features and the detectors fitted on them."""
