"""The hooks that PEFT calls."""
