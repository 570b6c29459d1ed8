"""PointPillars: voxelisation, network, presets, and the layouts of published files."""
