"""UniUGG (arXiv 2508.11952): a geometric-semantic encoder, a Spatial-VAE, and a unified model that sees and imagines."""
