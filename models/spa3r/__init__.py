"""Spa3R: a spatial field predicted from a few views (arXiv 2602.21186); see README.md beside this file."""
