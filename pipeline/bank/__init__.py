"""The format: layout, encodings, reading, writing, statistics, verifying.

Never imports Beam, torch or a model: a bank opens without them.
"""
