"""The study behind RESULTS.md: single runs, what they are stored in, the plan of runs, and the report."""
