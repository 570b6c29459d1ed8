"""The demo's own driving data set: street scenes drawn from a seed, camera and LiDAR.

Everything is a pure function of (seed, index, options); nothing is downloaded. Needs
NumPy and Pillow only.
"""
