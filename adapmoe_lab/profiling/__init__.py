"""What is learnt about a model by running it: routing, sensitivity and surrogates."""
