"""Where each expert's bytes are: readers for model files and our own sidecar."""
