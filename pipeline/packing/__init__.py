"""Packing: files in a folder, or named in a list, to WebDataset shards.

Bytes are copied, never re-encoded; equal input gives equal shards.
"""
