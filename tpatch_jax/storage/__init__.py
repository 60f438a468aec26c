"""What reads and writes files: whole or not at all, cached, line by line."""
