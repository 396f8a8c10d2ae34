"""Geometry of posed pinhole cameras: OpenCV axes, camera-to-world poses in metres, pixel centres at integers."""
