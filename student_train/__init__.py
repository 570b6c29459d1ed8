"""Training a student from a bank: reads targets, never a live teacher.

Imports manifests, pipeline.samples and pipeline.bank; neither teachers nor Beam.
"""
