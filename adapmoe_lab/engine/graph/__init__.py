"""The executor that decodes a token by replaying one captured CUDA graph."""
