"""SAM by name, official files, and the fast mask decoder."""
