"""How teachers take inputs: a module each for images, clips, sweeps and rasters."""
