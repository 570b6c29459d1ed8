"""What teachers and students must share: reading, decoding, views, calibration.

Never imports Beam, torch or a model.
"""
