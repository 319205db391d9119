"""The API server process: which requests are refused, and what a response says of a group."""
