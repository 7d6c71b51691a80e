"""The package's logger, `logging.getLogger("diffpeft")`: visible by default, silent where the user logs on their own."""

import logging


class _FallbackHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to stderr only while the user has configured no logging, so that no line is ever shown twice."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.root.handlers:
            super().emit(record)


def configure() -> None:
    """Show the package's INFO lines; `logging.getLogger("diffpeft").setLevel(...)` changes that. Idempotent."""
    logger = logging.getLogger("diffpeft")
    if any(isinstance(handler, _FallbackHandler) for handler in logger.handlers):
        return
    handler = _FallbackHandler()
    handler.setFormatter(logging.Formatter("[diffpeft] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
