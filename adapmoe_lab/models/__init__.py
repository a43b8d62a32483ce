"""How a transformers Mixture-of-Experts model is seen, loaded and hooked.

The only importer of transformers.
"""
