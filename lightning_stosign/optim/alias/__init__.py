"""Parameter-free Sign-SGD: ALIAS, its estimates, and the search for one fixed step size."""
