"""The communication benchmark's parts: hosts, what each does, what it found, and the report."""
