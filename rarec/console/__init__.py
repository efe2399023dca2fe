"""What a command prints: messages, progress, and the last resort when something unforeseen ends it."""
