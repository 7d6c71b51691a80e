"""The command line, extraction, other formats, the Hub, pictures."""
