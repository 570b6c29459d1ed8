"""Teachers: frozen models, their preprocessing and the outputs they yield.

One file per family. Imports manifests and pipeline.samples, nothing else of ours.
"""
