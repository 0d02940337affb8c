"""Recording, neuron selection, spectral features and the detectors fitted on them."""
