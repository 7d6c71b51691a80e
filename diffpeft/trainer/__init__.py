"""The three phases in transformers' Trainer."""
