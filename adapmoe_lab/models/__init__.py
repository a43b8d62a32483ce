"""How a transformers Mixture-of-Experts model is seen, loaded and hooked. Only importer of transformers."""
