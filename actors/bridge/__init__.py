"""What carries activations and gradients between the roles of a model, and keeps their steps together."""
