"""What a person sees: figures and widgets. They compute nothing that a record does not say."""
