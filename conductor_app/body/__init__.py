"""What a body calls, and what is around it."""
