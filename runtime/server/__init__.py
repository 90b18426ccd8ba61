"""The speech server: HTTP over an engine that knows nothing of HTTP."""
