"""Reference transformers, assembled from the ops."""
