"""All that is stored about one execution, and what it means in plain words."""
