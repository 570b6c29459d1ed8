"""Names of what lies in a bank that more than one file of this package needs."""

FEATURES = "features.zarr"
