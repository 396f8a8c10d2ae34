"""UniUGG (arXiv 2508.11952): a geometric-semantic encoder, a Spatial-VAE, a unified model that sees and imagines."""
