"""What can be asked of an engine: a task takes input as users have it, makes the engine's requests, and outputs."""
