"""One wrapped module of the base model."""
