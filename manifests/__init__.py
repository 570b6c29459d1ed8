"""Typed models of everything TeachOnce reads or writes as a document.

Owns the job, the dataset, the bank record, the commit, their YAML and JSON forms, and
the storage they lie on. Imports nothing else of ours.
"""
