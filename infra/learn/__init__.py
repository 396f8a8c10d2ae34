"""The longer experiments behind the figures in the documents; results are committed beside the models."""
