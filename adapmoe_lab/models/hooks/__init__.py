"""The extension points of a transformers model: its experts, its residual stream, its cache."""
