"""How good features are, by one protocol for every model: kNN, linear, dense."""
