"""What a training costs before it starts: time, memory and messages of each strategy and of other pipelines."""
