"""Training: steps, the loop around them, and what people see of it."""
