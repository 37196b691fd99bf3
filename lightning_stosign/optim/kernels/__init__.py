"""The step itself: what a backend is handed, the backends, and which of them takes which parameter."""
