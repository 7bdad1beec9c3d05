"""Tasks, their options, and the batch that runs them."""
