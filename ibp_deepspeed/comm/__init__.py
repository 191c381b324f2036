"""What crosses a stage boundary, and how: messages, channels, process groups."""
