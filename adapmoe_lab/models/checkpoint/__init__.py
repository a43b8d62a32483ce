"""Reading a model's files: configuration, headers, tensors, tokenizer."""
