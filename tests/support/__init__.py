"""Model files made on the spot, so that no test needs a download."""
