"""How the gates move."""
