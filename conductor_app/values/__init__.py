"""What callers give and rows hold: arguments, options, payloads, results, errors, and how they are stored."""
