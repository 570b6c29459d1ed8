"""A plan measured on real samples: bytes, quality and seconds; writes nothing.

``choice`` says which samples, ``live_rows`` reads them and runs the teachers,
``presets`` encodes what they say in every way that fits, ``object_bytes`` goes from a
sample to whole blocks, ``records`` weighs all that is not features, ``whole_job`` adds
up. Prices are ``pipeline.cost``.
"""
