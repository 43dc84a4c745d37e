"""Talk to a Sluice server: numpy in, numpy out."""
