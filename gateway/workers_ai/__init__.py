"""Workers AI's native form, as clients speak it: what it asks becomes a request of another dialect, and its answer goes back."""
