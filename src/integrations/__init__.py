"""Recovery for training loops that belong to a framework; each part imports its framework when it is used."""
